"""Find the fingerprint of all sites by one sum after the other.

Every sum is of one vector of 64-bit words per site. Its result determines the next sum:

    coarse      65536 counts per channel                                          -> which bins hold the percentiles
    fine        1 if a case of the site has no foreground; per channel 4 words of
                moments, its coarse histogram once more, 65536 counts per bin     -> intensities, or other bins
    cases       the cells of a table of cases                                     -> the fingerprint, or a larger table
    digits      65536 counts per branch, four times in place of `cases`           -> the fingerprint

The coarse histogram comes again with every look into bins, whether it is corrected or not (see `outermost`): so nobody
learns at which site a percentile lies among the outermost values. Last, where geometry is told by its order statistics
only, `digits` of the shapes at the target spacing give the median of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from nnunetv2.federated.aggregation import case_table, geometry_quantiles, order_statistics
from nnunetv2.federated.aggregation.fingerprint_statistics import (
    NUM_BINS,
    as_fingerprint,
    listed_geometry,
    pool_histograms,
    pooled_intensities,
    wanted_bins,
)
from nnunetv2.federated.aggregation.integer_moments import WORDS_PER_CHANNEL, from_words, moments_of, steps_of
from nnunetv2.federated.errors import StatisticsError
from nnunetv2.federated.protocol.messages import PooledFingerprint
from nnunetv2.federated.protocol.secure_fingerprint_messages import (
    Branch,
    CaseTable,
    CoarseHistograms,
    DigitCounts,
    FineHistograms,
    Geometry,
    NextSum,
    ResampledShape,
)

Question = CoarseHistograms | FineHistograms | CaseTable | DigitCounts


class FineChannel(NamedTuple):
    """The statistics of one channel that are added up with `fine`."""

    moments: np.ndarray
    """uint64 (4,), see `integer_moments`."""
    coarse: np.ndarray
    """int64 (65536,)."""
    fine: np.ndarray
    """int64 (number of bins, 65536)."""


# -------------------------------------------------------------------------------------------------------- questions
FIRST = NextSum(question=CoarseHistograms())
"""The first sum of a fingerprint,"""
FIRST_RESAMPLED = NextSum(
    question=DigitCounts(level=0, branches=geometry_quantiles.roots(geometry_quantiles.OF_RESAMPLED_SHAPES))
)
"""and of the median shape at a target spacing."""


def num_words(question: Question, *, num_channels: int, num_cases: int) -> int:
    """Return the length of the vectors that answer a question.

    Args:
        num_cases: Of all sites.
    """
    if isinstance(question, CoarseHistograms):
        return num_channels * NUM_BINS
    if isinstance(question, FineHistograms):
        return 1 + sum(WORDS_PER_CHANNEL + NUM_BINS * (1 + len(bins)) for bins in question.bins)
    if isinstance(question, CaseTable):
        return case_table.num_cells(num_cases, question.doublings) * case_table.LANES
    return NUM_BINS * sum(map(len, question.branches))


# ------------------------------------------------------------------------------------------------- one site's part
def coarse_vector(histograms: Sequence[np.ndarray]) -> np.ndarray:
    """Return the coarse histogram of each channel as it is added up."""
    return np.concatenate(histograms).astype(np.uint64)


def fine_vector(channels: Sequence[FineChannel], *, promotes_to_float64: bool) -> np.ndarray:
    """Return the statistics of each channel as they are added up."""
    parts = [np.array([promotes_to_float64], np.uint64)]
    for channel in channels:
        parts += [channel.moments, channel.coarse.astype(np.uint64), channel.fine.astype(np.uint64).reshape(-1)]
    return np.concatenate(parts)


def cases_vector(cases: Sequence[case_table.Case], question: CaseTable, *, num_cases: int) -> np.ndarray:
    """Return a table of cases as it is added up.

    Args:
        num_cases: Of all sites.
    """
    return case_table.fill_table(cases, num_cases, question.doublings).reshape(-1)


def digits_vector(quantities: Sequence[np.ndarray], question: DigitCounts) -> np.ndarray:
    """Return the counts behind each branch of each quantity as they are added up."""
    prefixes = [[branch.prefix for branch in of_quantity] for of_quantity in question.branches]
    return np.concatenate(
        [counts.reshape(-1) for counts in geometry_quantiles.count_all(quantities, prefixes, question.level)]
    )


# ---------------------------------------------------------------------------------------------------------- pooling
def next_sum(
    asked: NextSum, total: np.ndarray, *, num_channels: int, num_cases: int, geometry: Geometry
) -> NextSum | PooledFingerprint:
    """Return the next sum to ask for, or the pooled fingerprint.

    Args:
        asked: The sum that was asked for, with the intensities known before.
        total: uint64, the sum of the sites' vectors.
        num_cases: Of all sites.
        geometry: Whether cases are listed, or described by order statistics.

    Raises:
        StatisticsError: The sum is not one of valid vectors, or no case has foreground.
    """
    question = asked.question
    if isinstance(question, CoarseHistograms):
        return NextSum(question=_look_into([_histogram(part) for part in total.reshape(num_channels, NUM_BINS)]))
    if isinstance(question, FineHistograms):
        return _after_fine(question, total, geometry)
    if isinstance(question, CaseTable):
        return _after_cases(asked, question, total, num_cases)
    branches = _narrowed(question, total, geometry_quantiles.OF_CASES, num_cases)
    if question.level < order_statistics.LEVELS - 1:
        return asked.model_copy(update={"question": DigitCounts(level=question.level + 1, branches=branches)})
    described = geometry_quantiles.described_cases(branches, num_cases)
    return PooledFingerprint(num_cases=num_cases, fingerprint=as_fingerprint(asked.intensities, described))


def next_resampled(asked: NextSum, total: np.ndarray, *, num_cases: int) -> NextSum | ResampledShape:
    """Return the next sum for resampled shapes, or their median; see `next_sum`."""
    question = asked.question
    assert isinstance(question, DigitCounts)
    branches = _narrowed(question, total, geometry_quantiles.OF_RESAMPLED_SHAPES, num_cases)
    if question.level < order_statistics.LEVELS - 1:
        return NextSum(question=DigitCounts(level=question.level + 1, branches=branches))
    first, second, third = geometry_quantiles.median_resampled_shape(branches, num_cases)
    return ResampledShape(median=(first, second, third))


def _look_into(coarse: Sequence[np.ndarray]) -> FineHistograms:
    """Return the bins in which the percentiles lie, and the steps in which intensities are summed."""
    return FineHistograms(bins=tuple(map(wanted_bins, coarse)), steps=tuple(map(steps_of, coarse)))


def _after_fine(question: FineHistograms, total: np.ndarray, geometry: Geometry) -> NextSum:
    sizes = [1, *(size for bins in question.bins for size in (WORDS_PER_CHANNEL, NUM_BINS, NUM_BINS * len(bins)))]
    parts = _parts(total, sizes)
    promotes = bool(next(parts)[0])
    channels = [
        FineChannel(next(parts), _histogram(next(parts)), _histogram(next(parts).reshape(-1, NUM_BINS)))
        for _ in question.bins
    ]
    wanted = _look_into([channel.coarse for channel in channels])
    if wanted.bins != question.bins:
        return NextSum(question=wanted)
    intensities = tuple(
        _describe(number, channel, question, promotes_to_float64=promotes) for number, channel in enumerate(channels)
    )
    if geometry == "list":
        return NextSum(question=CaseTable(), intensities=intensities)
    roots = geometry_quantiles.roots(geometry_quantiles.OF_CASES)
    return NextSum(question=DigitCounts(level=0, branches=roots), intensities=intensities)


def _describe(
    number: int, channel: FineChannel, question: FineHistograms, *, promotes_to_float64: bool
) -> dict[str, float]:
    try:
        moments = moments_of(*from_words(channel.moments), int(channel.coarse.sum()), question.steps[number])
    except StatisticsError as error:
        raise StatisticsError(f"channel {number}: {error}") from error
    return pooled_intensities(number, moments, channel.coarse, channel.fine, promotes_to_float64=promotes_to_float64)


def _after_cases(asked: NextSum, question: CaseTable, total: np.ndarray, num_cases: int) -> NextSum | PooledFingerprint:
    try:
        cases = case_table.read_table(total.reshape(-1, case_table.LANES), num_cases)
    except case_table.TableTooSmallError as error:
        if question.doublings == case_table.MAX_DOUBLINGS:
            raise StatisticsError(
                "the cases of the sites cannot be told apart, however large their table: one of the sites does not "
                "send a table of its cases"
            ) from error
        return asked.model_copy(update={"question": CaseTable(doublings=question.doublings + 1)})
    described = listed_geometry(
        [case.spacing for case in cases], [case.shape for case in cases], [case.relative_size for case in cases]
    )
    return PooledFingerprint(num_cases=num_cases, fingerprint=as_fingerprint(asked.intensities, described))


def _narrowed(
    question: DigitCounts, total: np.ndarray, percentiles: Sequence[Sequence[float]], num_cases: int
) -> tuple[tuple[Branch, ...], ...]:
    counted = [
        part.reshape(-1, NUM_BINS)
        for part in _parts(total, [NUM_BINS * len(of_quantity) for of_quantity in question.branches])
    ]
    if question.level == 0:
        geometry_quantiles.check_total(counted, num_cases)
    return geometry_quantiles.narrow_all(question.branches, counted, percentiles, num_cases)


def _parts(vector: np.ndarray, sizes: Sequence[int]) -> Iterator[np.ndarray]:
    return iter(np.split(vector, np.cumsum(sizes)[:-1]))


def _histogram(counts: np.ndarray) -> np.ndarray:
    """Return a sum as a histogram.

    Counts too large for int64 are negative there, and are refused.
    """
    return pool_histograms([counts.astype(np.int64)])
