"""Add up coarse histograms, and ask for the bins with the percentiles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nnunetv2.federated.aggregation import fingerprint_statistics
from nnunetv2.federated.aggregation.fingerprint_statistics import NUM_BINS
from nnunetv2.federated.errors import RefusedError, StatisticsError, WireError
from nnunetv2.federated.exchanges import document_limits, plausibility
from nnunetv2.federated.exchanges.documents import DocumentReader
from nnunetv2.federated.exchanges.exchange import Policy
from nnunetv2.federated.exchanges.steps.base import State, Step
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.document import Document, Limits, TensorSpec
from nnunetv2.federated.protocol.keys import CensusKey, CoarseKey, Key, LateCensusKey
from nnunetv2.federated.protocol.messages import CoarseSummary, WantedBins

HISTOGRAM_BYTES = 8 * NUM_BINS


class CoarseHistogramStep(Step[CoarseKey, CoarseSummary, WantedBins]):
    """The sites send geometry, moments and coarse histograms."""

    key = CoarseKey
    contribution, results = CoarseSummary, (WantedBins,)
    policy = Policy(pooled=True, missable=True)
    contribution_note = "; `coarse.<c>` I64 (65536)"

    def prerequisite(self, key: CoarseKey) -> CensusKey:
        """Return the census."""
        return CensusKey()

    def check_may_begin(self, key: CoarseKey, settings: FederationSettings) -> None:
        """Raise RefusedError where no site is to show its statistics."""
        check_in_clear(key, settings)

    def expected(self, key: CoarseKey, state: State) -> frozenset[str]:
        """Return the sites of the census."""
        return frozenset(state.settings.sites) & state.contributors(CensusKey())

    def may_read(self, key: CoarseKey, site: str, state: State) -> bool:
        """Tell whether a site plans late, from the others' pooled fingerprint."""
        return state.is_closed(LateCensusKey(site))

    def limits(self, key: CoarseKey, site: str, reader: DocumentReader) -> Limits:
        """Return the limits for the cases and channels of the site's census."""
        with reader.contribution(CensusKey(), site) as earlier:
            cases, channels = earlier.message.num_cases, len(earlier.message.channel_names)
        return document_limits.coarse_limits(cases, channels, tensor_bytes=channels * HISTOGRAM_BYTES)

    def tensors(
        self, key: CoarseKey, site: str, message: CoarseSummary, reader: DocumentReader
    ) -> dict[str, TensorSpec]:
        """Return a histogram per channel."""
        return coarse_specs(range(len(message.moments)))

    def check(
        self,
        key: CoarseKey,
        site: str,
        document: Document[CoarseSummary],
        reader: DocumentReader,
        settings: FederationSettings,
    ) -> None:
        """Raise WireError or StatisticsError unless cases, channels, geometry and moments can be."""
        with reader.contribution(CensusKey(), site) as earlier, reader.result(CensusKey()) as pooled:
            census, num_all_cases = earlier.message, pooled.message.num_cases
        summary = document.message
        if (len(summary.spacings), len(summary.moments)) != (census.num_cases, len(census.channel_names)):
            raise WireError(
                f"the summary has {len(summary.spacings)} cases and {len(summary.moments)} channels, the "
                f"census of site {site} {census.num_cases} and {len(census.channel_names)}"
            )
        plausibility.check_geometry(summary.spacings, summary.relative_sizes)
        for channel, moments in enumerate(summary.moments):
            histogram = fingerprint_statistics.pool_histograms([document.read(f"coarse.{channel}")])
            try:
                plausibility.check_count(moments.count, census.num_cases, num_all_cases)
                plausibility.check_moments(moments, histogram, is_whole=summary.extrema is not None)
            except StatisticsError as error:
                raise StatisticsError(f"channel {channel}: {error}") from error

    def pool(
        self,
        key: CoarseKey,
        documents: Mapping[str, Document[CoarseSummary]],
        settings: FederationSettings,
        reader: DocumentReader,
    ) -> WantedBins:
        """Return the bins of the pooled histograms in which the percentiles lie."""
        check_same_units({site: _geometry_of(document.message) for site, document in documents.items()})
        return wanted_bins(pool_channels(documents.values(), "coarse"))

    def remarks(
        self, key: CoarseKey, documents: Mapping[str, Document[CoarseSummary]], result: WantedBins
    ) -> Iterator[str]:
        """Yield a line for each site whose scans are of an odd size."""
        return _remarks_on_geometry({site: _geometry_of(document.message) for site, document in documents.items()})


def check_in_clear(key: Key, settings: FederationSettings) -> None:
    """Raise RefusedError if a federation adds up masked statistics, and takes none in clear."""
    if settings.secure is not None:
        raise RefusedError(
            f"{key}: this federation adds up masked statistics (fingerprint/sums/...), and takes none that it can read",
            "Use matching versions of the software at all sites.",
            code="masked_only",
        )


def coarse_specs(channels: Iterable[int]) -> dict[str, TensorSpec]:
    """Return the coarse histograms of these channels."""
    return {f"coarse.{channel}": TensorSpec("I64", (NUM_BINS,)) for channel in channels}


def wanted_bins(coarse: Iterable[Any]) -> WantedBins:
    """Return the bins in which the percentiles of pooled histograms lie, channel by channel."""
    return WantedBins(bins=tuple(fingerprint_statistics.wanted_bins(histogram) for histogram in coarse))


def pool_channels(documents: Iterable[Document[Any]], name: str) -> list[Any]:
    """Add up the histograms `<name>.<channel>` of all sites, channel by channel."""
    documents = list(documents)
    num_channels = sum(tensor.startswith(f"{name}.") for tensor in documents[0].specs)
    return [
        fingerprint_statistics.pool_histograms(document.read(f"{name}.{channel}") for document in documents)
        for channel in range(num_channels)
    ]


def check_same_units(geometries: Mapping[str, plausibility.Geometry]) -> None:
    """Raise RefusedError if sizes of scans show that units differ.

    It names the sites.
    """
    odd = {
        site: factor
        for site, factor in plausibility.factors_to_nearest(geometries).items()
        if plausibility.is_at_least(factor, plausibility.IMPOSSIBLE_FACTOR)
    }
    if odd:
        described = ", ".join(
            f"those of site {site} are {plausibility.describe_factor(factor)}" for site, factor in sorted(odd.items())
        )
        raise RefusedError(
            f"the scans cannot all have spacings in millimetres: in every direction and in voxel size, "
            f"{described} than those of any other site",
            "Look at the spacings in the images' headers at these sites, mend them, and plan again.",
            code="datasets_differ",
        )


def _geometry_of(summary: CoarseSummary) -> plausibility.Geometry:
    return plausibility.Geometry.of(summary.spacings, summary.shapes)


def _remarks_on_geometry(geometries: Mapping[str, plausibility.Geometry]) -> Iterator[str]:
    for site, factor in sorted(plausibility.factors_to_nearest(geometries).items()):
        if plausibility.is_at_least(factor, plausibility.ODD_FACTOR):
            spacing, extent = (
                plausibility.in_mm(lengths) for lengths in (geometries[site].spacing, geometries[site].extent)
            )
            yield (
                f"the scans of site {site} are {plausibility.describe_factor(factor)} than those of any other site: "
                f"median spacing {spacing}, extent {extent}. Ask whether its units are right before anybody "
                "preprocesses"
            )


STEPS = (CoarseHistogramStep(),)
