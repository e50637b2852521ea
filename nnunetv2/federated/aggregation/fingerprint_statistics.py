"""Turn voxels into sums that add up across sites, and sums into a fingerprint.

Percentiles are order statistics, and float32 values can be ordered by their bits. So two histograms find any rank
exactly: a coarse one of the high 16 bits of every value, then a fine one of the low 16 bits inside the few coarse
bins that hold the wanted ranks. Both are counts, which add up whatever the split into sites.

    float32 bits   s eeeeeeee mmmmmmm | mmmmmmmmmmmmmmmm      (flipped so that unsigned order is numerical order)
                   coarse bin, 0..65535 | place in the fine histogram, 0..65535
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nnunetv2.federated.errors import StatisticsError

NUM_BINS = 1 << 16
PERCENTILES = (0.5, 50.0, 99.5)
"""Percentiles of the foreground intensities in nnU-Net's fingerprint; the second is the median."""
_SIGN = np.uint32(1 << 31)
_CHUNK = 1 << 20
_MAX_COUNT = 2**53


# ------------------------------------------------------------------------------------------- values and their keys
def order_keys(values: np.ndarray) -> np.ndarray:
    """Return uint32 keys that sort as the float32 `values` do; -0.0 comes just before 0.0.

    Raises:
        StatisticsError: A value is NaN or infinite, or the array is not float32.
    """
    if values.dtype != np.float32:
        raise StatisticsError(f"intensities must be float32, got {values.dtype}")
    if not np.isfinite(values).all():
        raise StatisticsError("intensities hold NaN or infinite values")
    bits = np.ascontiguousarray(values).view(np.uint32)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def key_values(keys: np.ndarray) -> np.ndarray:
    """Return the float32 values of uint32 keys: the inverse of `order_keys`."""
    keys = np.asarray(keys, np.uint32)
    return np.where(keys & _SIGN, keys ^ _SIGN, ~keys).view(np.float32)


# -------------------------------------------------------------------------------------------------- one site's part
def coarse_histogram(values: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Count values by the high 16 bits of their keys.

    Args:
        values: float32, one-dimensional.
        counts: How often each value occurs; once each if None.

    Returns:
        int64 counts of shape (65536,).
    """
    histogram = np.zeros(NUM_BINS, np.int64)
    for keys, multiplicity in _chunks_of_keys(values, counts):
        histogram += _count(keys >> np.uint32(16), multiplicity)
    return histogram


def fine_histogram(values: np.ndarray, bins: Sequence[int], counts: np.ndarray | None = None) -> np.ndarray:
    """Count the values of some coarse bins by the low 16 bits of their keys.

    Returns:
        int64 counts of shape (number of bins, 65536), rows in the order of `bins`.
    """
    histogram = np.zeros((len(bins), NUM_BINS), np.int64)
    for keys, multiplicity in _chunks_of_keys(values, counts):
        coarse = keys >> np.uint32(16)
        for row, number in enumerate(bins):
            inside = coarse == number
            histogram[row] += _count(
                keys[inside] & np.uint32(0xFFFF), None if multiplicity is None else multiplicity[inside]
            )
    return histogram


@dataclass(frozen=True)
class Moments:
    """Count, mean, and sum of squared deviations of values that need not be kept."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    @classmethod
    def of(cls, values: np.ndarray, counts: np.ndarray | None = None) -> Moments:
        """Compute the moments of `values`, each occurring `counts` times, in float64."""
        total = cls()
        for begin in range(0, values.size, _CHUNK):
            chunk = values[begin : begin + _CHUNK].astype(np.float64)
            weights = np.ones(chunk.size) if counts is None else counts[begin : begin + _CHUNK].astype(np.float64)
            number = int(weights.sum())
            if number:
                mean = float(weights @ chunk) / number
                total = total.merge(cls(number, mean, float(weights @ np.square(chunk - mean))))
        return total

    def merge(self, other: ChannelMoments) -> Moments:
        """Return the moments of both sets of values together.

        Chan, Golub and LeVeque 1979, equations 2.1.
        """
        if not self.count or not other.count:
            return Moments(other.count, other.mean, other.m2) if not self.count else self
        count = self.count + other.count
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        return Moments(count, mean, self.m2 + other.m2 + difference * difference * (self.count * (other.count / count)))

    @property
    def std(self) -> float:
        """Return the standard deviation, of the population and not of a sample."""
        return math.sqrt(self.m2 / self.count)


def sorted_geometry(
    spacings: Iterable[Sequence[float]], shapes: Iterable[Sequence[int]]
) -> tuple[tuple[tuple[float, ...], ...], tuple[tuple[int, ...], ...]]:
    """Return spacings and shapes of the same cases, sorted together.

    The order of cases is not told.
    """
    pairs = sorted(
        (tuple(map(float, spacing)), tuple(map(int, shape))) for spacing, shape in zip(spacings, shapes, strict=True)
    )
    return tuple(spacing for spacing, _ in pairs), tuple(shape for _, shape in pairs)


# ---------------------------------------------------------------------------------------------------------- pooling
def pool_histograms(histograms: Iterable[np.ndarray]) -> np.ndarray:
    """Add up the histograms of the sites.

    Raises:
        StatisticsError: There is none, they differ in shape, or a count is negative or beyond all reason.
    """
    total = None
    for histogram in histograms:
        if histogram.dtype != np.int64 or (total is not None and histogram.shape != total.shape):
            raise StatisticsError(f"a histogram is {histogram.dtype}{list(histogram.shape)}, unlike the others")
        if histogram.size and (histogram.min() < 0 or histogram.sum(dtype=np.float64) > _MAX_COUNT):
            raise StatisticsError("a histogram holds negative or impossibly large counts")
        total = histogram.copy() if total is None else total + histogram
    if total is None:
        raise StatisticsError("there is no histogram to pool")
    return total


def wanted_ranks(count: int) -> tuple[int, ...]:
    """Return the ranks, from 0, of sorted values that the percentiles need."""
    return tuple(sorted({rank for percentile in PERCENTILES for rank in neighbours(count, percentile)[:2]}))


def wanted_bins(coarse: np.ndarray) -> tuple[int, ...]:
    """Return the bins of a pooled coarse histogram that hold the wanted ranks.

    Ascending, at most six.

    Raises:
        StatisticsError: The histogram is empty: no case of any site has foreground.
    """
    count = int(coarse.sum())
    if count == 0:
        raise StatisticsError("no case of any site has foreground: there are no intensities to pool")
    return tuple(sorted({locate(coarse, rank)[0] for rank in wanted_ranks(count)}))


def pooled_percentiles(
    coarse: np.ndarray, fine: np.ndarray, *, promotes_to_float64: bool
) -> tuple[float, float, float]:
    """Compute np.percentile(all values, PERCENTILES) to the bit from pooled histograms.

    Args:
        coarse: int64 (65536,), summed over the sites.
        fine: int64 (number of bins, 65536), the insides of `wanted_bins(coarse)`, summed over the sites.
        promotes_to_float64: Whether the array with all values would be float64 and not float32: numpy subtracts
            neighbours in that dtype.

    Raises:
        StatisticsError: The histograms contradict each other.
    """
    rows = {number: row for row, number in enumerate(wanted_bins(coarse))}
    if fine.shape != (len(rows), NUM_BINS) or any(fine[row].sum() != coarse[number] for number, row in rows.items()):
        raise StatisticsError("fine and coarse histograms do not describe the same values")
    dtype = np.float64 if promotes_to_float64 else np.float32

    def value_at(rank: int) -> np.float32 | np.float64:
        number, rank_inside = locate(coarse, rank)
        place, _ = locate(fine[rows[number]], rank_inside)
        return dtype(key_values(np.array([number << 16 | place]))[0])

    def percentile(wanted: float) -> float:
        low, high, fraction = neighbours(int(coarse.sum()), wanted)
        return interpolate(value_at(low), value_at(high), fraction)

    first, median, last = (percentile(wanted) for wanted in PERCENTILES)
    return first, median, last


def outermost_bounds(coarse: np.ndarray) -> tuple[float, float]:
    """Return the bounds of the lowest and highest coarse bin in use.

    All values lie between them, none is told.
    """
    used = np.flatnonzero(coarse)
    low, high = key_values(np.array([used[0] << 16, used[-1] << 16 | 0xFFFF]))
    return float(low), float(high)


# ------------------------------------------------------------------------------------------------------- fingerprint
class ChannelMoments(Protocol):
    """The moments of a channel, as pooling reads them.

    `Moments` and the message of that name have them.
    """

    @property
    def count(self) -> int: ...
    @property
    def mean(self) -> float: ...
    @property
    def m2(self) -> float: ...


class SiteSummary(Protocol):
    """The summary of a site, as pooling reads it.

    `messages.CoarseSummary` explains the fields.
    """

    @property
    def spacings(self) -> Sequence[Sequence[float]]: ...
    @property
    def shapes(self) -> Sequence[Sequence[int]]: ...
    @property
    def relative_sizes(self) -> Sequence[float]: ...
    @property
    def moments(self) -> Sequence[ChannelMoments]: ...
    @property
    def promotes_to_float64(self) -> bool: ...
    @property
    def extrema(self) -> Sequence[tuple[float, float]] | None: ...


def pool_fingerprint(
    summaries: Iterable[SiteSummary], coarse: Sequence[np.ndarray], fine: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Build the content of dataset_fingerprint.json that one centre with all cases would have written.

    Equal for any split of the cases into sites and any order of the sites. Cases are sorted. Mean and standard
    deviation are rounded to float32, beyond which their digits would depend on the split. Unless every site shares
    its extrema, `min` and `max` are the outermost histogram bounds.

    Args:
        summaries: One per site.
        coarse: Per channel, the pooled coarse histogram.
        fine: Per channel, the pooled fine histogram.

    Raises:
        StatisticsError: Channels differ between sites, numbers contradict each other, or no case has foreground.
    """
    summaries = list(summaries)
    if any(len(summary.moments) != len(coarse) for summary in summaries) or len(fine) != len(coarse):
        raise StatisticsError(f"the sites' summaries do not all describe {len(coarse)} channels")
    spacings, shapes = sorted_geometry(
        (spacing for summary in summaries for spacing in summary.spacings),
        (shape for summary in summaries for shape in summary.shapes),
    )
    promotes = any(summary.promotes_to_float64 for summary in summaries)
    relative_sizes = [size for summary in summaries for size in summary.relative_sizes]
    intensities = [
        pooled_intensities(
            channel,
            merge_moments(summary.moments[channel] for summary in summaries),
            coarse[channel],
            fine[channel],
            promotes_to_float64=promotes,
            extrema=_extrema(channel, summaries),
        )
        for channel in range(len(coarse))
    ]
    return as_fingerprint(intensities, listed_geometry(spacings, shapes, relative_sizes))


def as_fingerprint(intensities: Sequence[Mapping[str, float]], geometry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of dataset_fingerprint.json.

    Args:
        intensities: One per channel.
        geometry: The fields that tell of the cases: `listed_geometry`, or statistics in the place of its lists.
    """
    by_channel = {str(channel): dict(properties) for channel, properties in enumerate(intensities)}
    content = {"foreground_intensity_properties_per_channel": by_channel, **geometry}
    return {name: content[name] for name in sorted(content)}


def listed_geometry(
    spacings: Iterable[Sequence[float]], shapes: Iterable[Sequence[int]], relative_sizes: Sequence[float]
) -> dict[str, Any]:
    """Return the fields of a fingerprint that list its cases, in the given order."""
    return {
        "median_relative_size_after_cropping": float(np.median(relative_sizes)),
        "shapes_after_crop": [list(shape) for shape in shapes],
        "spacings": [list(spacing) for spacing in spacings],
    }


def merge_moments(parts: Iterable[ChannelMoments]) -> Moments:
    """Return the moments of all values together, whatever the order of the parts."""
    moments = Moments()
    for part in sorted(parts, key=lambda one: (one.count, one.mean, one.m2)):
        moments = moments.merge(part)
    return moments


def pooled_intensities(
    channel: int,
    moments: Moments,
    coarse: np.ndarray,
    fine: np.ndarray,
    *,
    promotes_to_float64: bool,
    extrema: tuple[float, float] | None = None,
) -> dict[str, float]:
    """Describe the values of one channel at all sites, as dataset_fingerprint.json does.

    Args:
        coarse, fine: As for `pooled_percentiles`.
        extrema: Smallest and largest value; None for the outermost histogram bounds.

    Raises:
        StatisticsError: The numbers contradict each other, or are too large.
    """
    if moments.count != int(coarse.sum()):
        raise StatisticsError(f"channel {channel}: moments and histograms do not describe the same values")
    low, median, high = pooled_percentiles(coarse, fine, promotes_to_float64=promotes_to_float64)
    smallest, largest = extrema or outermost_bounds(coarse)
    properties = {
        "max": largest,
        "mean": float(np.float32(moments.mean)),
        "median": median,
        "min": smallest,
        "percentile_00_5": low,
        "percentile_99_5": high,
        "std": float(np.float32(moments.std)),
    }
    if not all(map(math.isfinite, properties.values())):
        raise StatisticsError(f"channel {channel}: intensities are too large for float32 arithmetic")
    return properties


def _extrema(channel: int, summaries: Sequence[SiteSummary]) -> tuple[float, float] | None:
    """Return the extrema of a channel if every site that has foreground shares its own."""
    of_sites = [summary.extrema for summary in summaries if summary.moments[channel].count]
    shared = [extrema for extrema in of_sites if extrema is not None]
    if len(shared) < len(of_sites):
        return None
    return min(extrema[channel][0] for extrema in shared), max(extrema[channel][1] for extrema in shared)


# ------------------------------------------------------------------------------------------------------------ ranks
def neighbours(count: int, percentile: float) -> tuple[int, int, float]:
    """Return the two ranks around a percentile and the fraction between.

    As numpy's method linear.
    """
    position = (count - 1) * (percentile / 100)
    if position >= count - 1:
        return count - 1, count - 1, 0.0
    low = math.floor(position)
    return low, low + 1, position - low


def interpolate(low: np.floating, high: np.floating, fraction: float) -> float:
    """Interpolate with numpy's arithmetic.

    The difference in the values' dtype, the rest in float64.
    """
    with np.errstate(over="ignore"):
        difference = float(high - low)
    if fraction >= 0.5:
        return float(high) - difference * (1 - fraction)
    return float(low) + difference * fraction


def locate(histogram: np.ndarray, rank: int) -> tuple[int, int]:
    """Return the bin that holds a rank, and the rank inside that bin."""
    cumulative = np.cumsum(histogram)
    number = int(np.searchsorted(cumulative, rank, side="right"))
    return number, rank - int(cumulative[number] - histogram[number])


def _chunks_of_keys(values: np.ndarray, counts: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yield keys and counts in pieces, so that no copy of all values is needed."""
    if counts is not None and counts.shape != values.shape:
        raise StatisticsError(f"{values.size} values have {counts.size} counts")
    for begin in range(0, values.size, _CHUNK):
        part = slice(begin, begin + _CHUNK)
        yield order_keys(values[part]), None if counts is None else counts[part]


def _count(places: np.ndarray, multiplicity: np.ndarray | None) -> np.ndarray:
    # bincount weighs in float64, which is exact for counts below 2**53
    return np.bincount(places, multiplicity, minlength=NUM_BINS).astype(np.int64)
