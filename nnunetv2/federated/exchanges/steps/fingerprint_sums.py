"""Pool fingerprints by one masked sum after the other.

The requests, and the results of the sums, are made in `aggregation/fingerprint_sums.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Generic, TypeVar

import numpy as np

from nnunetv2.federated.aggregation import fingerprint_sums
from nnunetv2.federated.errors import RefusedError, StatisticsError
from nnunetv2.federated.exchanges import document_limits
from nnunetv2.federated.exchanges.documents import DocumentReader
from nnunetv2.federated.exchanges.exchange import Exchange, Policy
from nnunetv2.federated.exchanges.secure_fingerprint import SUM, plan_fingerprint_sum, plan_shape_sum
from nnunetv2.federated.exchanges.secure_sums import SecureSum
from nnunetv2.federated.exchanges.steps.base import LARGEST_MESSAGE, Computed, State, messages_of
from nnunetv2.federated.exchanges.steps.secure_sum import ConfirmationStep, Opened, UnmaskingStep, UploadStep
from nnunetv2.federated.privacy.secure_aggregation.protocol import CHECK_WORDS
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.document import Document, Limits, write_document
from nnunetv2.federated.protocol.keys import (
    CensusKey,
    FingerprintSumKey,
    FingerprintSumSurvivorsKey,
    FingerprintSumUploadKey,
    Key,
    LateCensusKey,
    ShapeSumKey,
    ShapeSumSurvivorsKey,
    ShapeSumUploadKey,
)
from nnunetv2.federated.protocol.messages import PooledFingerprint
from nnunetv2.federated.protocol.secure_fingerprint_messages import NextSum, ResampledShape
from nnunetv2.federated.protocol.secure_messages import Confirmed, MaskedUpdate, Survivors, UnmaskingShares

FingerprintResult = NextSum | PooledFingerprint
ShapeResult = NextSum | ResampledShape
F = TypeVar("F", FingerprintSumUploadKey, FingerprintSumSurvivorsKey, FingerprintSumKey)
S = TypeVar("S", ShapeSumUploadKey, ShapeSumSurvivorsKey, ShapeSumKey)
K = TypeVar("K", bound=Key)


# -------------------------------------------------------------------------------------------------------- sums, by whom
class _OfAllSites(Generic[K]):
    """Sums of all sites of the census: none of fewer is opened."""

    def cohort(self, key: K, state: State) -> frozenset[str]:
        """Return the sites of the census."""
        return state.contributors(CensusKey())

    def may_read(self, key: K, site: str, state: State) -> bool:
        """Tell whether a site plans late, from the others' pooled fingerprint."""
        return state.is_closed(LateCensusKey(site))


class _OfFingerprint(_OfAllSites[F]):
    """A sum for the pooled fingerprint."""

    def upload_key(self, key: F) -> FingerprintSumUploadKey:
        """Return the exchange of the masked statistics."""
        return FingerprintSumUploadKey(key.number)

    def survivors_key(self, key: F) -> FingerprintSumSurvivorsKey:
        """Return the exchange of the confirmations."""
        return FingerprintSumSurvivorsKey(key.number)

    def asked(self, key: F, reader: DocumentReader) -> NextSum:
        """Return the request of the sum before."""
        before = FingerprintSumKey(key.number - 1) if key.number else None
        return fingerprint_sums.FIRST if before is None else _asked_by(before, reader)

    def sum_of(self, key: F, reader: DocumentReader) -> SecureSum:
        """Return the masked sum of the statistics."""
        with reader.result(CensusKey()) as document:
            return plan_fingerprint_sum(
                FingerprintSumKey(key.number),
                self.asked(key, reader),
                federation=reader.settings.federation,
                census=document.message,
                num_channels=_num_channels(reader),
            )


class _OfShapes(_OfAllSites[S]):
    """A sum for the median shape at the target spacing of some plans."""

    def upload_key(self, key: S) -> ShapeSumUploadKey:
        """Return the exchange of the masked counts."""
        return ShapeSumUploadKey(key.plans, key.number)

    def survivors_key(self, key: S) -> ShapeSumSurvivorsKey:
        """Return the exchange of the confirmations."""
        return ShapeSumSurvivorsKey(key.plans, key.number)

    def asked(self, key: S, reader: DocumentReader) -> NextSum:
        """Return the request of the sum before."""
        before = ShapeSumKey(key.plans, key.number - 1) if key.number else None
        return fingerprint_sums.FIRST_RESAMPLED if before is None else _asked_by(before, reader)

    def sum_of(self, key: S, reader: DocumentReader) -> SecureSum:
        """Return the masked sum of the counts."""
        with reader.result(CensusKey()) as document:
            return plan_shape_sum(
                ShapeSumKey(key.plans, key.number),
                self.asked(key, reader),
                federation=reader.settings.federation,
                census=document.message,
                target=None,
            )


def _asked_by(before: Key, reader: DocumentReader) -> NextSum:
    """Return the request in the result of a sum.

    Raises:
        RefusedError: It asks for nothing any more.
    """
    with reader.result(before) as document:
        if isinstance(document.message, NextSum):
            return document.message
    raise RefusedError(f"{before} was the last sum: nothing follows", code="unknown_gathering")


def _num_channels(reader: DocumentReader) -> int:
    return len(next(iter(reader.messages_of(CensusKey()).values())).channel_names)


def _num_cases(reader: DocumentReader) -> int:
    with reader.result(CensusKey()) as document:
        return document.message.num_cases


def _total(opened: Opened) -> np.ndarray:
    """Return the sum of the vectors without masks. It is small: all of it is held at once."""
    size = opened.found.lane(SUM).size
    return next(opened.parts(SUM, CHECK_WORDS, size, size)).copy()


@contextmanager
def _named(key: Key) -> Iterator[None]:
    """Turn the error of an impossible sum into a refusal naming it.

    Raises:
        RefusedError: In the place of StatisticsError.
    """
    try:
        yield
    except StatisticsError as error:
        raise RefusedError(
            f"{key}: {error}",
            "One of the sites has added what it should not, and nobody can see which. Compare the versions of the "
            "software, and plan in a new federation: nothing is masked twice for the same one.",
            code="sum_implausible",
        ) from error


# ------------------------------------------------------------------------------------------------- masked vectors
class _UploadOfAllStep(UploadStep[K]):
    """Base of the steps in which every site of the census sends a masked vector."""

    policy = Policy(pooled=True, first_stays=True, missable=True)
    closing_note = "all of the census"

    def floor(self, key: K, state: State) -> int:
        """Return how many sites there are: nothing is made of fewer."""
        return max(len(self.cohort(key, state)), state.settings.min_sites)

    def newest(self, key: K, state: State) -> Key:
        """Return the sum, for sites that come when it is there."""
        return self.used_by(key) if state.is_closed(self.used_by(key)) else key

    def result_limits(self, num_cases: int | None) -> Limits:
        """Return the limits of the sum."""
        return document_limits.fingerprint_limits(num_cases)

    def largest_result(self, weights: int) -> int:
        """Return how many bytes the sum may have."""
        return LARGEST_MESSAGE


class FingerprintUploadStep(_OfFingerprint[FingerprintSumUploadKey], _UploadOfAllStep[FingerprintSumUploadKey]):
    """The sites send masked statistics."""

    key, results = FingerprintSumUploadKey, (Survivors, NextSum, PooledFingerprint)

    def used_by(self, key: FingerprintSumUploadKey) -> FingerprintSumKey:
        """Return the sum."""
        return FingerprintSumKey(key.number)

    def prerequisite(self, key: FingerprintSumUploadKey) -> Key:
        """Return the sum before, or the census."""
        return FingerprintSumKey(key.number - 1) if key.number else CensusKey()


class ShapeUploadStep(_OfShapes[ShapeSumUploadKey], _UploadOfAllStep[ShapeSumUploadKey]):
    """The sites send masked counts of their shapes at a target spacing."""

    key, results = ShapeSumUploadKey, (Survivors, NextSum, ResampledShape)

    def used_by(self, key: ShapeSumUploadKey) -> ShapeSumKey:
        """Return the sum."""
        return ShapeSumKey(key.plans, key.number)

    def prerequisite(self, key: ShapeSumUploadKey) -> Key:
        """Return the sum before, or the census."""
        return ShapeSumKey(key.plans, key.number - 1) if key.number else CensusKey()

    def check_may_begin(self, key: ShapeSumUploadKey, settings: FederationSettings) -> None:
        """Raise RefusedError unless geometry is told by order statistics."""
        super().check_may_begin(key, settings)
        if settings.secure is None or settings.secure.geometry != "quantiles":
            raise RefusedError(
                f"{key}: the fingerprint of this federation lists all cases, so that nothing else is counted",
                code="unknown_gathering",
            )

    def check(
        self,
        key: ShapeSumUploadKey,
        site: str,
        document: Document[MaskedUpdate],
        reader: DocumentReader,
        settings: FederationSettings,
    ) -> None:
        """Leave it to `combine`: only sites know the target spacing of their masks."""

    def combine(
        self,
        exchange: Exchange,
        documents: Mapping[str, Document[MaskedUpdate]],
        settings: FederationSettings,
        reader: DocumentReader,
    ) -> Computed:
        """Name the survivors, if all have the same target spacing."""
        bound_to = {site: message.lanes[SUM] for site, message in messages_of(documents).items()}
        usual = max(bound_to.values(), key=list(bound_to.values()).count)
        if odd := sorted(site for site, digest in bound_to.items() if digest != usual):
            raise RefusedError(
                f"the sites plan for different target spacings: {', '.join(odd)} for others than most of them",
                "Plan again at all sites, with the same options and the same version, "
                + (
                    "and under another name (-overwrite_plans_name): nothing is masked twice for the same one."
                    if settings.networks == "equal"
                    else "in a new federation: nothing is masked twice for the same spacing."
                ),
                code="plans_differ",
            )
        return super().combine(exchange, documents, settings, reader)


# ------------------------------------------------------------------------------------------------- confirmations
class FingerprintSurvivorsStep(
    _OfFingerprint[FingerprintSumSurvivorsKey], ConfirmationStep[FingerprintSumSurvivorsKey]
):
    """The sites confirm to each other that the statistics of all of them are there."""

    key, results = FingerprintSumSurvivorsKey, (Confirmed,)
    policy = Policy(first_stays=True, missable=True)


class ShapeSurvivorsStep(_OfShapes[ShapeSumSurvivorsKey], ConfirmationStep[ShapeSumSurvivorsKey]):
    """The sites confirm to each other that the counts of all of them are there."""

    key, results = ShapeSumSurvivorsKey, (Confirmed,)
    policy = Policy(first_stays=True, missable=True)


# ------------------------------------------------------------------------------------------------------ unmasking
class FingerprintSumStep(
    _OfFingerprint[FingerprintSumKey], UnmaskingStep[FingerprintSumKey, UnmaskingShares, FingerprintResult]
):
    """The sites help to unmask a sum, and learn the next one, or the fingerprint."""

    key = FingerprintSumKey
    contribution, results = UnmaskingShares, (NextSum, PooledFingerprint)
    policy = Policy(first_stays=True, missable=True)
    contribution_note = "; `shares` U8"
    closing_note = "t of the census"

    def prerequisite(self, key: FingerprintSumKey) -> FingerprintSumSurvivorsKey:
        """Return the confirmations."""
        return self.survivors_key(key)

    def combine_opened(
        self, exchange: Exchange, opened: Opened, settings: FederationSettings, reader: DocumentReader
    ) -> Computed:
        """Write the request for the next sum, or the fingerprint."""
        assert isinstance(exchange.key, FingerprintSumKey) and settings.secure is not None
        with _named(exchange.key):
            result = fingerprint_sums.next_sum(
                self.asked(exchange.key, reader),
                _total(opened),
                num_channels=_num_channels(reader),
                num_cases=_num_cases(reader),
                geometry=settings.secure.geometry,
            )
        return Computed(write_document(reader.result_path(exchange.key), result, {}, []))

    def result_limits(self, num_cases: int | None) -> Limits:
        """Return the limits of a fingerprint of so many cases."""
        return document_limits.fingerprint_limits(num_cases)

    def largest_result(self, weights: int) -> int:
        """Return how many bytes a pooled fingerprint may have."""
        return LARGEST_MESSAGE


class ShapeSumStep(_OfShapes[ShapeSumKey], UnmaskingStep[ShapeSumKey, UnmaskingShares, ShapeResult]):
    """The sites help to unmask a sum, and learn the next one, or a median."""

    key = ShapeSumKey
    contribution, results = UnmaskingShares, (NextSum, ResampledShape)
    policy = Policy(first_stays=True, missable=True)
    contribution_note = "; `shares` U8"
    closing_note = "t of the census"

    def prerequisite(self, key: ShapeSumKey) -> ShapeSumSurvivorsKey:
        """Return the confirmations."""
        return self.survivors_key(key)

    def combine_opened(
        self, exchange: Exchange, opened: Opened, settings: FederationSettings, reader: DocumentReader
    ) -> Computed:
        """Write the request for the next sum, or the median shape."""
        assert isinstance(exchange.key, ShapeSumKey)
        with _named(exchange.key):
            result = fingerprint_sums.next_resampled(
                self.asked(exchange.key, reader), _total(opened), num_cases=_num_cases(reader)
            )
        return Computed(write_document(reader.result_path(exchange.key), result, {}, []))


STEPS = (
    FingerprintUploadStep(),
    FingerprintSurvivorsStep(),
    FingerprintSumStep(),
    ShapeUploadStep(),
    ShapeSurvivorsStep(),
    ShapeSumStep(),
)
