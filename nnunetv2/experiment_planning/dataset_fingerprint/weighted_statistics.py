"""Compute percentiles, mean and deviation of values that carry multiplicities, without writing them out.

A dataset is a sequence of `(values, counts)`, one per case: float32 values and how often each was drawn (int64).
Percentiles are exact order statistics. Floats are ordered by their bit pattern, so two histograms find any rank
in memory that does not depend on the number of values: one of the upper 16 bits, then one of the lower 16 bits
within the bin that holds the rank.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WeightedValues = tuple[np.ndarray, np.ndarray]

NUM_BINS = 1 << 16
_SIGN = np.uint32(0x80000000)


def count_values(samples: Sequence[WeightedValues]) -> int:
    """Return the number of values, each counted as often as it was drawn."""
    return int(sum(int(counts.sum()) for _, counts in samples))


def percentile_ranks(num_values: int, percentiles: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what numpy interpolates for linear percentiles: lower ranks, upper ranks (int64) and upper weights."""
    position = (num_values - 1) * np.true_divide(percentiles, 100)
    lower = np.floor(position)
    upper = np.minimum(lower + 1, num_values - 1)
    return lower.astype(np.int64), upper.astype(np.int64), position - lower


def interpolate(lower: np.ndarray, upper: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Go from `lower` to `upper` by `weight`, starting at the nearer end as numpy does: equal to the last bit.

    The difference is taken in the dtype of the values (float32 or float64), the rest in float64.
    """
    difference = upper - lower
    return np.where(weight >= 0.5, upper - difference * (1 - weight), lower + difference * weight)


def percentiles_of(samples: Sequence[WeightedValues], percentiles: Sequence[float],
                   dtype: np.dtype | type = np.float32) -> np.ndarray:
    """Return `np.percentile(expanded, percentiles)`, where `expanded` repeats each value by its count in `dtype`."""
    lower, upper, weight = percentile_ranks(count_values(samples), percentiles)
    neighbours = order_statistics(samples, np.concatenate([lower, upper])).astype(dtype)
    return interpolate(neighbours[:len(lower)], neighbours[len(lower):], weight)


def order_statistics(samples: Sequence[WeightedValues], ranks: Sequence[int]) -> np.ndarray:
    """Return the values (float32) at the given ranks, counted from 0, of the expanded and sorted samples.

    Raises:
        ValueError: A rank is not below the number of values.
    """
    ranks = np.asarray(ranks, dtype=np.int64)
    if len(ranks) and ranks.max() >= (total := count_values(samples)):
        raise ValueError(f"rank {ranks.max()} of {total} values")
    upper_bits, ranks_inside = _locate(upper_histogram(samples), ranks)
    keys = np.empty(len(ranks), dtype=np.uint32)
    for bits in np.unique(upper_bits):
        here = upper_bits == bits
        lower_bits, _ = _locate(lower_histogram(samples, int(bits)), ranks_inside[here])
        keys[here] = (int(bits) << 16) + lower_bits
    return _from_sortable_bits(keys)


def upper_histogram(samples: Sequence[WeightedValues]) -> np.ndarray:
    """Count values by the upper half of their sortable bits: int64, 65536 bins in ascending order of value."""
    histogram = np.zeros(NUM_BINS, dtype=np.int64)
    for values, counts in samples:
        histogram += _histogram(_to_sortable_bits(values) >> 16, counts)
    return histogram


def lower_histogram(samples: Sequence[WeightedValues], upper_bits: int) -> np.ndarray:
    """Count the values of one bin of `upper_histogram` by the lower half of their sortable bits."""
    histogram = np.zeros(NUM_BINS, dtype=np.int64)
    for values, counts in samples:
        keys = _to_sortable_bits(values)
        inside = (keys >> 16) == upper_bits
        histogram += _histogram(keys[inside] & 0xFFFF, counts[inside])
    return histogram


def mean_and_std_of(samples: Sequence[WeightedValues]) -> tuple[float, float]:
    """Return mean and population standard deviation of the expanded samples, summed in float64."""
    total = count_values(samples)
    mean = sum(float(np.dot(values.astype(np.float64), counts)) for values, counts in samples) / total
    squares = sum(float(np.dot(np.square(values.astype(np.float64) - mean), counts)) for values, counts in samples)
    return mean, float(np.sqrt(squares / total))


def range_of(samples: Sequence[WeightedValues]) -> tuple[float, float]:
    """Return the smallest and the largest value that was drawn at least once."""
    drawn = [values[counts > 0] for values, counts in samples]
    return (float(min(values.min() for values in drawn if values.size)),
            float(max(values.max() for values in drawn if values.size)))


def _locate(histogram: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each rank the bin that holds it and its rank inside that bin."""
    below = np.cumsum(histogram)
    bins = np.searchsorted(below, ranks, side="right")
    return bins, ranks - (below[bins] - histogram[bins])


def _histogram(bins: np.ndarray, counts: np.ndarray) -> np.ndarray:
    # bincount adds in float64, exact up to 2^53 draws
    return np.bincount(bins, weights=counts, minlength=NUM_BINS).astype(np.int64)


def _to_sortable_bits(values: np.ndarray) -> np.ndarray:
    """Map float32 to uint32 of the same order: negatives descend in their bits, so all of theirs are inverted."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def _from_sortable_bits(keys: np.ndarray) -> np.ndarray:
    return np.where(keys & _SIGN, keys ^ _SIGN, ~keys).astype(np.uint32).view(np.float32)
