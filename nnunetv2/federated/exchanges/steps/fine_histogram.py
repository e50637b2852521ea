"""Look into the bins that hold the percentiles, and pool the fingerprint of all sites."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from nnunetv2.federated.aggregation import fingerprint_statistics
from nnunetv2.federated.aggregation.fingerprint_statistics import NUM_BINS
from nnunetv2.federated.errors import WireError
from nnunetv2.federated.exchanges import document_limits, plausibility
from nnunetv2.federated.exchanges.documents import DocumentReader
from nnunetv2.federated.exchanges.exchange import Policy
from nnunetv2.federated.exchanges.steps.base import LARGEST_MESSAGE, State, Step
from nnunetv2.federated.exchanges.steps.coarse_histogram import (
    HISTOGRAM_BYTES,
    check_in_clear,
    coarse_specs,
    pool_channels,
    wanted_bins,
)
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.document import Document, Limits, TensorSpec
from nnunetv2.federated.protocol.keys import CoarseKey, FineKey, Key, LateCensusKey
from nnunetv2.federated.protocol.messages import FineSummary, PooledFingerprint, WantedBins

FineResult = PooledFingerprint | WantedBins


class FineHistogramStep(Step[FineKey, FineSummary, FineResult]):
    """The sites count the voxels inside the bins that were asked for."""

    key = FineKey
    contribution, results = FineSummary, (PooledFingerprint, WantedBins)
    policy = Policy(pooled=True, missable=True)
    contribution_note = (
        "; `fine.<c>` I64 (bins, 65536), `coarse.<c>` of channels in `corrected`. With `/<n>`, n from 1 on: the same "
        "for the bins that the one before asked for"
    )

    def prerequisite(self, key: FineKey) -> CoarseKey | FineKey:
        """Return the exchange that has asked for the bins."""
        return FineKey(key.again - 1) if key.again else CoarseKey()

    def check_may_begin(self, key: FineKey, settings: FederationSettings) -> None:
        """Raise RefusedError where no site is to show its statistics."""
        check_in_clear(key, settings)

    def expected(self, key: FineKey, state: State) -> frozenset[str]:
        """Return the sites that have contributed to the exchange before."""
        return frozenset(state.settings.sites) & state.contributors(self.prerequisite(key))

    def may_read(self, key: FineKey, site: str, state: State) -> bool:
        """Tell whether a site plans late, from the others' pooled fingerprint."""
        return state.is_closed(LateCensusKey(site))

    def limits(self, key: FineKey, site: str, reader: DocumentReader) -> Limits:
        """Return the limits for the wanted bins and all coarse histograms."""
        bins = self._asked_for(key, reader) or ()
        histograms = sum(map(len, bins)) + len(bins)  # fine ones of the bins, and coarse ones that are corrected
        return document_limits.with_tensors(self.header, tensor_bytes=histograms * HISTOGRAM_BYTES)

    def tensors(self, key: FineKey, site: str, message: FineSummary, reader: DocumentReader) -> dict[str, TensorSpec]:
        """Return fine histograms per channel, and corrected coarse ones."""
        fine = {f"fine.{c}": TensorSpec("I64", (len(bins), NUM_BINS)) for c, bins in enumerate(message.bins)}
        return fine | coarse_specs(message.corrected)

    def check(
        self,
        key: FineKey,
        site: str,
        document: Document[FineSummary],
        reader: DocumentReader,
        settings: FederationSettings,
    ) -> None:
        """Raise WireError unless the bins are the wanted ones and hold as much as before."""
        if self._asked_for(key, reader) != document.message.bins:
            raise WireError("the bins are not those that were asked for")
        for channel, bins in enumerate(document.message.bins):
            coarse = before = fingerprint_statistics.pool_histograms([self._coarse_of(key, site, channel, reader)])
            if channel in document.message.corrected:
                coarse = fingerprint_statistics.pool_histograms([document.read(f"coarse.{channel}")])
                with reader.contribution(CoarseKey(), site) as earlier:
                    first = fingerprint_statistics.pool_histograms([earlier.read(f"coarse.{channel}")])
                plausibility.check_corrected(first, before, coarse)
            fine = fingerprint_statistics.pool_histograms([document.read(f"fine.{channel}")])
            if (fine.sum(axis=1) != coarse[list(bins)]).any():
                raise WireError(f"channel {channel}: fine and coarse histograms of site {site} count different voxels")

    def pool(
        self,
        key: FineKey,
        documents: Mapping[str, Document[FineSummary]],
        settings: FederationSettings,
        reader: DocumentReader,
    ) -> FineResult:
        """Pool the fingerprint.

        Or return other bins, if corrected histograms show that percentiles lie in those.
        """
        following = FineKey(key.again + 1)  # before which these histograms are the last
        with ExitStack() as stack:
            summaries = [stack.enter_context(reader.contribution(CoarseKey(), site)).message for site in documents]
            coarse = [
                fingerprint_statistics.pool_histograms(
                    self._coarse_of(following, site, channel, reader) for site in documents
                )
                for channel in range(len(summaries[0].moments))
            ]
            wanted = wanted_bins(coarse)
            if any(document.message.bins != wanted.bins for document in documents.values()):
                return wanted
            fingerprint = fingerprint_statistics.pool_fingerprint(
                summaries, coarse, pool_channels(documents.values(), "fine")
            )
        return PooledFingerprint(num_cases=sum(len(summary.spacings) for summary in summaries), fingerprint=fingerprint)

    def result_limits(self, num_cases: int | None) -> Limits:
        """Return the limits of a fingerprint of so many cases."""
        return document_limits.fingerprint_limits(num_cases)

    def largest_result(self, weights: int) -> int:
        """Return how many bytes a pooled fingerprint may have."""
        return LARGEST_MESSAGE

    def _asked_for(self, key: FineKey, reader: DocumentReader) -> tuple[tuple[int, ...], ...] | None:
        """Return the bins that the exchange before asked for; None if it asked for none."""
        before: Key = self.prerequisite(key)
        with reader.result(before) as wanted:
            return wanted.message.bins if isinstance(wanted.message, WantedBins) else None

    def _coarse_of(self, key: FineKey, site: str, channel: int, reader: DocumentReader) -> Any:
        """Return a site's coarse histogram as it was before it contributed to a fine one: the last that it has sent."""
        for again in reversed(range(key.again)):
            with reader.contribution(FineKey(again), site) as document:
                if channel in document.message.corrected:
                    return document.read(f"coarse.{channel}")
        with reader.contribution(CoarseKey(), site) as summary:
            return summary.read(f"coarse.{channel}")


STEPS = (FineHistogramStep(),)
