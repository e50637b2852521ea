"""Find values by their rank among those of all sites, from four sums of histograms.

Numbers from 0 on sort as the bits of their float64. So the first histogram counts the highest 16 of the 64 bits; the
next one counts the following 16, of the values that share the highest with a wanted rank; and after four of them the
bits of the value itself are known. Nothing but these counts leaves a site.

    float64 bits   s eeeeeeeeeee mmmm | mmmmmmmmmmmmmmmm | mmmmmmmmmmmmmmmm | mmmmmmmmmmmmmmmm
    prefix         0 bits               16                 32                 48               64: found

As in `fingerprint_statistics`, which does the same with the two halves of float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from nnunetv2.federated.aggregation.fingerprint_statistics import NUM_BINS, interpolate, locate, neighbours
from nnunetv2.federated.errors import StatisticsError
from nnunetv2.federated.protocol.secure_fingerprint_messages import Branch

LEVELS = 4
_DIGIT_BITS = 16
_DIGITS = np.uint64(NUM_BINS - 1)


ROOT = (Branch(prefix=0, below=0),)
"""The root of the search: all values."""


def count_digits(values: np.ndarray, prefixes: Sequence[int], level: int) -> np.ndarray:
    """Count the next 16 bits of the values behind each prefix.

    Args:
        values: float64, one-dimensional, finite and not below 0.
        level: 0 to 3, how many digits of 16 bits a prefix has.

    Returns:
        uint64 (number of prefixes, 65536).

    Raises:
        StatisticsError: A value is negative, NaN or infinite.
    """
    values = np.asarray(values, np.float64) + 0.0  # no -0.0
    if not (np.isfinite(values) & (values >= 0)).all():
        raise StatisticsError("only finite numbers from 0 on can be counted by their bits")
    bits = values.view(np.uint64)
    shift = np.uint64(_DIGIT_BITS * (LEVELS - 1 - level))
    leading, digits = bits >> shift >> np.uint64(_DIGIT_BITS), (bits >> shift & _DIGITS).astype(np.int64)
    return np.stack(
        [np.bincount(digits[leading == np.uint64(prefix)], minlength=NUM_BINS) for prefix in prefixes]
    ).astype(np.uint64)


def narrow(branches: Sequence[Branch], histograms: np.ndarray, ranks: Iterable[int]) -> tuple[Branch, ...]:
    """Return the branches of the wanted ranks, 16 bits longer, ascending.

    Args:
        branches: The branches that were counted.
        histograms: uint64 (branches, 65536), the counts of all sites together.

    Raises:
        StatisticsError: The histograms hold no such rank.
    """
    found = {}
    for rank in ranks:
        row = max(row for row, branch in enumerate(branches) if branch.below <= rank)
        branch, histogram = branches[row], histograms[row].astype(np.int64)
        if (histogram < 0).any() or not rank - branch.below < histogram.sum(dtype=np.float64):
            raise StatisticsError("the sites' counts do not hold the rank that is looked for")
        digit, inside = locate(histogram, rank - branch.below)
        prefix = branch.prefix << _DIGIT_BITS | digit
        found[prefix] = Branch(prefix=prefix, below=rank - inside)
    return tuple(found[prefix] for prefix in sorted(found))


def value_at(branches: Sequence[Branch], rank: int) -> float:
    """Return the value of a rank, from 0, when all four histograms are known.

    Raises:
        StatisticsError: It is negative, infinite or no number.
    """
    prefix = max((branch for branch in branches if branch.below <= rank), key=lambda branch: branch.below).prefix
    value = float(np.array([prefix], np.uint64).view(np.float64)[0])
    if not 0 <= value < math.inf:
        raise StatisticsError("the sites' counts lead to a value that is impossible")
    return value


# ------------------------------------------------------------------------------------------------ of so many values
def ranks_of(count: int, percentiles: Iterable[float]) -> tuple[int, ...]:
    """Return the ranks, from 0, around percentiles of so many values.

    Those of 50 give the median, too.
    """
    return tuple(sorted({rank for percentile in percentiles for rank in neighbours(count, percentile)[:2]}))


def percentile_of(branches: Sequence[Branch], count: int, percentile: float) -> float:
    """Compute np.percentile of all values to the bit."""
    low, high, fraction = neighbours(count, percentile)
    return interpolate(np.float64(value_at(branches, low)), np.float64(value_at(branches, high)), fraction)


def median_of(branches: Sequence[Branch], count: int) -> float:
    """Compute np.median of all values to the bit.

    It may differ from the 50th percentile in the last digit.
    """
    low, high = (value_at(branches, rank) for rank in ((count - 1) // 2, count // 2))
    return (low + high) / 2
