"""Define the three exchanges of all masked sums, and the unmasking.

    uploads      masked vectors, envelopes      ->  the survivors, and to each site its envelopes
    survivors    a signature each               ->  t of these
    the result   shares of seeds                ->  a result made of the sums

The first one closes as any exchange does, with t sites at least. The other two close as soon as t sites have answered,
since any t answers give the same. The site's part is in `site/masking.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nnunetv2.federated.errors import RefusedError, WireError
from nnunetv2.federated.exchanges import document_limits
from nnunetv2.federated.exchanges.documents import DocumentReader
from nnunetv2.federated.exchanges.exchange import Closed, Exchange
from nnunetv2.federated.exchanges.secure_sums import OPTIONAL, SecureSum
from nnunetv2.federated.exchanges.steps.base import MESSAGE_ALLOWANCE, Computed, K, State, Step
from nnunetv2.federated.privacy import identities
from nnunetv2.federated.privacy.secure_aggregation import protocol
from nnunetv2.federated.privacy.secure_aggregation.key_agreement import ENVELOPE_OVERHEAD
from nnunetv2.federated.privacy.secure_aggregation.masking import SEED_BYTES
from nnunetv2.federated.privacy.secure_aggregation.protocol import CHECK_WORDS, Lane, Masks, threshold_of
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.document import DTYPES, Document, Limits, TensorSpec, check_tensors, write_document
from nnunetv2.federated.protocol.keys import ExchangeKey, Key, Q, R
from nnunetv2.federated.protocol.secure_messages import (
    Confirmation,
    Confirmed,
    MaskedUpdate,
    Survivors,
    UnmaskingShares,
)

Uploads = ExchangeKey[MaskedUpdate, Any]
Confirmations = ExchangeKey[Confirmation, Any]
U = TypeVar("U", bound=Uploads)
C = TypeVar("C", bound=Confirmations)
MASKED, ENVELOPE, COMMITMENTS, SHARES = "masked.", "envelope.", "commitments", "shares"
"""Prefixes of tensors' names, and whole names."""
LARGEST_ENVELOPES = 64 << 20
"""Bytes that a site gets from all others."""
_HEADER = Limits(header_bytes=1 << 20, elements=20_000)


def is_masked(state: State) -> bool:
    """Tell whether a federation masks its sums."""
    return state.settings.secure is not None


# -------------------------------------------------------------------------------------------------- masked vectors
class UploadStep(Step[U, MaskedUpdate, Any]):
    """The sites send masked vectors. Children define the sum."""

    contribution = MaskedUpdate
    contribution_note = "; `masked.<lane>` U16, U32 or U64, `envelope.<site>` and `commitments` U8"
    result_note = "; `envelope.<sender>.<site>` U8, of each site its own"
    closing_note = "all of the cohort, or the quorum at the deadline; at least t"

    def sum_of(self, key: U, reader: DocumentReader) -> SecureSum:
        """Return the masked sums, one per lane."""
        raise NotImplementedError

    def cohort(self, key: U, state: State) -> frozenset[str]:
        """Name the sites that mask with each other."""
        raise NotImplementedError

    def expected(self, key: U, state: State) -> frozenset[str]:
        """Return the sites of the cohort that are there."""
        return frozenset(state.settings.sites) & self.cohort(key, state)

    def floor(self, key: U, state: State) -> int:
        """Return how many sites can unmask, or are asked for."""
        return max(threshold_of(len(self.cohort(key, state))), state.settings.min_sites)

    def used_by(self, key: U) -> Key:
        """Return the exchange that results in the sum."""
        raise NotImplementedError

    def check_may_begin(self, key: U, settings: FederationSettings) -> None:
        """Raise RefusedError unless this federation masks."""
        if settings.secure is None:
            raise RefusedError(f"{key}: this federation does not mask its updates", code="unknown_gathering")

    def limits(self, key: U, site: str, reader: DocumentReader) -> Limits:
        """Return the limits for a site's lanes and envelopes."""
        found = self.sum_of(key, reader)
        lanes = found.held_by(site)
        specs = _upload_specs(found, site, lanes)
        return replace(_HEADER, file_bytes=8 + _HEADER.header_bytes + sum(spec.nbytes for spec in specs.values()))

    def tensors(self, key: U, site: str, message: MaskedUpdate, reader: DocumentReader) -> Mapping[str, TensorSpec]:
        """Return the vectors of the lanes that it says it sends, envelopes and commitments."""
        found = self.sum_of(key, reader)
        return _upload_specs(found, site, [lane for lane in found.held_by(site) if lane.name in message.lanes])

    def check(
        self, key: U, site: str, document: Document[MaskedUpdate], reader: DocumentReader, settings: FederationSettings
    ) -> None:
        """Raise WireError unless the masks are bound to the coordinator's lanes."""
        found = self.sum_of(key, reader)
        expected = {lane.name: lane.context(found.cohort).hex() for lane in found.held_by(site)}
        for name, digest in document.message.lanes.items():
            if digest != expected.get(name):
                raise WireError(
                    f"what site {site} has masked in lane {name} is bound to another cohort, or to other weights than "
                    "those that it was sent: its masks would not cancel out"
                )
        if missing := sorted(expected.keys() - document.message.lanes.keys() - OPTIONAL):
            raise WireError(f"lane {missing[0]} is missing ({len(missing)} in all)")

    def combine(
        self,
        exchange: Exchange,
        documents: Mapping[str, Document[MaskedUpdate]],
        settings: FederationSettings,
        reader: DocumentReader,
    ) -> Computed:
        """Name the survivors of every lane. Envelopes are handed on when their sites ask."""
        lanes = sorted({name for document in documents.values() for name in document.message.lanes})
        sent = {name: tuple(site for site, one in documents.items() if name in one.message.lanes) for name in lanes}
        return Computed(write_document(reader.result_path(exchange.key), Survivors(sent=sent), {}, []))

    def abandon(self, exchange: Exchange, settings: FederationSettings, reader: DocumentReader) -> Computed:
        """Write that nobody's vectors are added."""
        return Computed(write_document(reader.result_path(exchange.key), Survivors(sent={}), {}, []))

    def tensors_for(self, key: U, site: str, reader: DocumentReader) -> tuple[str, ...]:
        """Return the envelopes for a site."""
        if site not in self.sum_of(key, reader).cohort.sites:
            return ()
        return tuple(f"{ENVELOPE}{sender}.{site}" for sender in protocol.sites_among(survivors_of(key, reader)))

    def write_for_sites(
        self, key: U, names: Sequence[str], path: Path, reader: DocumentReader, *, whole: bool = True
    ) -> str:
        """Write these envelopes from the survivors' documents, and return the SHA-256."""
        envelopes = {}
        for name in names:
            sender, site = name.removeprefix(ENVELOPE).split(".")
            with reader.contribution(key, sender) as document:
                envelopes[name] = np.array(document.read(ENVELOPE + site))
        specs = {name: TensorSpec.of(values) for name, values in envelopes.items()}
        return write_document(path, Survivors(sent=survivors_of(key, reader)), specs, envelopes.values())

    def result_limits(self, num_cases: int | None) -> Limits:
        """Return the limits of the survivors, or of a later aggregate."""
        return document_limits.AGGREGATE

    def largest_result(self, weights: int) -> int:
        """Return how many bytes envelopes have, or a later aggregate."""
        return MESSAGE_ALLOWANCE + max(weights, LARGEST_ENVELOPES)


def _upload_specs(found: SecureSum, site: str, lanes: Sequence[Lane]) -> dict[str, TensorSpec]:
    seeds = len(protocol.seed_names(site, lanes))
    return {
        **{MASKED + lane.name: TensorSpec(lane.dtype, (lane.length,)) for lane in lanes},
        **{
            ENVELOPE + other: TensorSpec("U8", (seeds * SEED_BYTES + ENVELOPE_OVERHEAD,))
            for other in found.cohort.sites
        },
        COMMITMENTS: TensorSpec("U8", (seeds, SEED_BYTES)),
    }


# ---------------------------------------------------------------------------------------------------- confirmations
class ConfirmationStep(Step[C, Confirmation, Any]):
    """The survivors sign the list of survivors. Children define the sum."""

    contribution = Confirmation
    contribution_note = ", of one set of survivors only"
    result_note = ": as many signatures as sites unmask"
    closing_note = "t of the survivors"

    def upload_key(self, key: C) -> Uploads:
        """Return the exchange of the masked vectors."""
        raise NotImplementedError

    def sum_of(self, key: C, reader: DocumentReader) -> SecureSum:
        """Return the masked sums, one per lane."""
        raise NotImplementedError

    def cohort(self, key: C, state: State) -> frozenset[str]:
        """Name the sites that mask with each other."""
        raise NotImplementedError

    def prerequisite(self, key: C) -> Key:
        """Return the exchange of the masked vectors."""
        return self.upload_key(key)

    def expected(self, key: C, state: State) -> frozenset[str]:
        """Return the survivors that are there."""
        return frozenset(state.settings.sites) & state.contributors(self.upload_key(key))

    def floor(self, key: C, state: State) -> int:
        """Return how many sites unmask."""
        return threshold_of(len(self.cohort(key, state)))

    def closes_at(self, key: C, state: State) -> int:
        """Return the same."""
        return self.floor(key, state)

    def check(
        self, key: C, site: str, document: Document[Confirmation], reader: DocumentReader, settings: FederationSettings
    ) -> None:
        """Raise WireError unless a site has signed the survivors that it was sent."""
        found, survivors = self.sum_of(key, reader), survivors_of(self.upload_key(key), reader)
        digest = protocol.survivors_digest(found.cohort, survivors)
        if document.message.digest != digest:
            raise WireError(f"site {site} confirms other survivors than those that it was sent")
        check_confirmations(key, {site: document.message.signature}, found, survivors, least=1)

    def abandon(self, exchange: Exchange, settings: FederationSettings, reader: DocumentReader) -> Computed:
        """Write that nobody has confirmed anything."""
        return Computed(write_document(reader.result_path(exchange.key), Confirmed(signatures={}), {}, []))

    def pool(
        self,
        key: C,
        documents: Mapping[str, Document[Confirmation]],
        settings: FederationSettings,
        reader: DocumentReader,
    ) -> Confirmed:
        """Return the signatures."""
        return Confirmed(signatures={site: document.message.signature for site, document in documents.items()})

    def result_limits(self, num_cases: int | None) -> Limits:
        """Return the limits of the signatures, or of a later aggregate."""
        return document_limits.AGGREGATE

    def largest_result(self, weights: int) -> int:
        """Return how many bytes signatures have, or a later aggregate."""
        return MESSAGE_ALLOWANCE + weights


def survivors_of(key: Uploads, reader: DocumentReader) -> dict[str, tuple[str, ...]]:
    """Return the survivors of a closed exchange of masked vectors: lane -> sites."""
    with reader.result(key) as document:
        return dict(document.message.sent)


def check_confirmations(
    key: Confirmations, signatures: Mapping[str, str], found: SecureSum, survivors: protocol.Survivors, *, least: int
) -> None:
    """Raise RefusedError unless so many survivors have signed exactly this set; see `privacy/identities.py`."""
    names = protocol.sites_among(survivors)
    identities.check_confirmations(
        signatures,
        {site: found.cohort.identities[site].hex() for site in names},
        federation=found.cohort.federation,
        gathering=str(key),
        digest=protocol.survivors_digest(found.cohort, survivors),
        least=least,
    )


# -------------------------------------------------------------------------------------------------------- unmasking
@dataclass(frozen=True)
class Opened:
    """Masked vectors that can be summed, and the masks of their sums."""

    found: SecureSum
    survivors: Mapping[str, tuple[str, ...]]
    """Lane -> sites."""
    uploads: Mapping[str, Document[MaskedUpdate]]
    """Site -> its masked vectors."""
    masks: Mapping[str, Masks]
    """Lane -> the masks that its sum still has. Lanes that are not here stay sealed."""
    false_sites: tuple[str, ...]
    """Sites whose shares were false."""

    def total_weight(self, lane: str) -> int:
        """Return the total weight of the sites of a lane."""
        return sum(self.found.weights[site] for site in self.survivors[lane])

    def parts(self, name: str, begin: int, size: int, block: int) -> Iterator[np.ndarray]:
        """Yield the unmasked sum of a lane's vectors, part by part.

        Args:
            name: Of the lane.
            begin: The first word; check words come first.
            size: How many words.
            block: Words of a part. A part is valid until the next is asked for.
        """
        lane = self.found.lane(name)
        dtype, streams = DTYPES[lane.dtype], protocol.unmasking(self.masks[name], lane, begin)
        total, one = (np.empty(min(block, size), dtype) for _ in range(2))
        for start in range(begin, begin + size, block):
            part = slice(0, min(block, begin + size - start))
            total[part] = 0
            for site in self.survivors[name]:
                self.uploads[site].read_into(MASKED + name, start, one[part])
                total[part] += one[part]
            streams.apply_(total[part])
            yield total[part]

    def small(self, name: str) -> list[int] | None:
        """Return the sum of a small lane as numbers; None if it stays sealed."""
        if name not in self.masks:
            return None
        size = self.found.lane(name).size
        return [int(word) for part in self.parts(name, CHECK_WORDS, size, max(1, size)) for word in part]


class UnmaskingStep(Step[K, Q, R]):
    """Base of the steps whose result is made of masked sums, where the federation masks.

    It comes first among the bases.
    """

    def upload_key(self, key: K) -> Uploads:
        """Return the exchange of the masked vectors."""
        raise NotImplementedError

    def survivors_key(self, key: K) -> Confirmations:
        """Return the exchange of the confirmations."""
        raise NotImplementedError

    def sum_of(self, key: K, reader: DocumentReader) -> SecureSum:
        """Return the masked sums, one per lane."""
        raise NotImplementedError

    def cohort(self, key: K, state: State) -> frozenset[str]:
        """Name the sites that mask with each other."""
        raise NotImplementedError

    def combine_opened(
        self, exchange: Exchange, opened: Opened, settings: FederationSettings, reader: DocumentReader
    ) -> Computed:
        """Make the result of masked sums, and write it."""
        raise NotImplementedError

    def expected(self, key: K, state: State) -> frozenset[str]:
        """Return the survivors that are there; before they are known, the sites that mask."""
        if not is_masked(state):
            return super().expected(key, state)
        survivors = state.contributors(self.upload_key(key)) or self.cohort(key, state)
        return frozenset(state.settings.sites) & survivors

    def floor(self, key: K, state: State) -> int:
        """Return how many sites unmask."""
        return threshold_of(len(self.cohort(key, state))) if is_masked(state) else super().floor(key, state)

    def closes_at(self, key: K, state: State) -> int | None:
        """Return the same."""
        return self.floor(key, state) if is_masked(state) else super().closes_at(key, state)

    def limits(self, key: K, site: str, reader: DocumentReader) -> Limits:
        """Return the limits of a site's shares."""
        if not reader.is_masked:
            return super().limits(key, site, reader)
        return document_limits.with_tensors(self.header, tensor_bytes=self._shares_spec(key, reader).nbytes)

    def check_contribution(
        self, key: K, site: str, document: Document[Any], reader: DocumentReader, settings: FederationSettings
    ) -> None:
        """Raise WireError unless a document has a site's shares."""
        if not reader.is_masked:
            super().check_contribution(key, site, document, reader, settings)
            return
        if not isinstance(document.message, UnmaskingShares):
            raise WireError(
                f"{key} takes shares of masks only, this message is of kind {document.message.kind}: in this "
                "federation, updates are masked. Use matching versions of the software"
            )
        check_tensors(document, {SHARES: self._shares_spec(key, reader)})

    def _shares_spec(self, key: K, reader: DocumentReader) -> TensorSpec:
        if not reader.is_closed(self.survivors_key(key)):
            raise RefusedError(f"{key} cannot begin before {self.survivors_key(key)} is closed", code="too_early")
        found, survivors = self.sum_of(key, reader), survivors_of(self.upload_key(key), reader)
        return TensorSpec("U8", (protocol.count_revealed(found.lanes, survivors, found.least), SEED_BYTES))

    def outcome(self, exchange: Exchange, now: float, state: State) -> Closed:
        """Count the survivors, not the sites that helped to unmask."""
        if not is_masked(state):
            return super().outcome(exchange, now, state)
        key: Any = exchange.key
        survivors = state.contributors(self.upload_key(key))
        missing = self.cohort(key, state) - survivors
        return Closed(now, contributors=tuple(sorted(survivors)), missing=tuple(sorted(missing)))

    def close(self, exchange: Exchange, settings: FederationSettings, reader: DocumentReader) -> Computed:
        """Rebuild the seeds that are needed, and make the result of the sums."""
        if not reader.is_masked:
            return super().close(exchange, settings, reader)
        with self._opened(exchange, reader) as opened:
            computed = self.combine_opened(exchange, opened, settings, reader)
        return replace(computed, remarks=(*computed.remarks, *_remarks_on(exchange, opened)))

    @contextmanager
    def _opened(self, exchange: Exchange, reader: DocumentReader) -> Iterator[Opened]:
        key: Any = exchange.key
        found, survivors = self.sum_of(key, reader), survivors_of(self.upload_key(key), reader)
        with ExitStack() as stack:
            uploads = {
                site: stack.enter_context(reader.contribution(self.upload_key(key), site))
                for site in protocol.sites_among(survivors)
            }
            answers = {}
            for site in exchange.contributions:
                with reader.contribution(key, site) as document:
                    answers[site] = np.array(document.read(SHARES))
            commitments = {site: document.read(COMMITMENTS) for site, document in uploads.items()}
            try:
                masks, false_sites = protocol.rebuild_seeds(
                    found.cohort, found.lanes, survivors, answers, commitments, least=found.least
                )
            except protocol.SharesDoNotFitError as error:
                if exchange.waiting_for:
                    raise OSError(str(error)) from error  # to be tried again with others' answers
                raise
            opened = Opened(found, survivors, uploads, masks, false_sites)
            for name in masks:
                check_words = next(opened.parts(name, 0, CHECK_WORDS, CHECK_WORDS))
                protocol.check_sum(found.lane(name), check_words, found.weights, survivors[name])
            yield opened


def _remarks_on(exchange: Exchange, opened: Opened) -> Iterator[str]:
    """Say whose shares were false, and which sums stay sealed."""
    for site in opened.false_sites:
        yield f"{exchange.key}: the shares of site {site} are false; those of others were used"
    sealed = [lane for lane in opened.found.lanes if lane.name not in opened.masks and lane.name not in OPTIONAL]
    if sealed:
        yield (
            f"{exchange.key}: {len(sealed)} of {len(opened.found.lanes)} sums stay sealed, since fewer than "
            f"{opened.found.least} of their sites took part"
        )
