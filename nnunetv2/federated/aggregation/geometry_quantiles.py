"""Describe the geometry of all cases by the planners' order statistics.

First per axis the 10th and 50th percentile of the spacings and the median of the shapes, and the median relative size;
then, at the target spacing that follows from these, the median of the resampled shapes. `order_statistics` finds the
values; this module chooses them and writes them into the fingerprint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nnunetv2.federated.aggregation.order_statistics import (
    ROOT,
    count_digits,
    median_of,
    narrow,
    percentile_of,
    ranks_of,
)
from nnunetv2.federated.errors import StatisticsError
from nnunetv2.federated.protocol.secure_fingerprint_messages import Branch

AXES = 3
OF_CASES = ((10.0, 50.0),) * AXES + ((50.0,),) * (AXES + 1)
"""Percentiles of each quantity: spacings, shapes, relative size."""
OF_RESAMPLED_SHAPES = ((50.0,),) * AXES
MOST_BRANCHES = 4
"""Of one quantity: two ranks for each of two percentiles."""

Branches = Sequence[Sequence[Branch]]
"""Per quantity."""


def roots(percentiles: Sequence[Sequence[float]]) -> tuple[tuple[Branch, ...], ...]:
    """Return where the search for these percentiles of each quantity begins."""
    return (ROOT,) * len(percentiles)


def quantities_of_cases(
    spacings: Sequence[Sequence[float]], shapes: Sequence[Sequence[int]], relative_sizes: Sequence[float]
) -> list[np.ndarray]:
    """Return the values of each quantity of `OF_CASES`, float64."""
    return [*np.array(spacings, float).T, *np.array(shapes, float).T, np.array(relative_sizes, float)]


def quantities_of_shapes(shapes: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Return the values of each quantity of `OF_RESAMPLED_SHAPES`, float64."""
    return list(np.array(shapes, float).T)


def count_all(quantities: Sequence[np.ndarray], prefixes: Sequence[Sequence[int]], level: int) -> list[np.ndarray]:
    """Count the next 16 bits behind the prefixes of each quantity."""
    return [count_digits(values, asked, level) for values, asked in zip(quantities, prefixes, strict=True)]


def narrow_all(
    branches: Branches, histograms: Sequence[np.ndarray], percentiles: Sequence[Sequence[float]], count: int
) -> tuple[tuple[Branch, ...], ...]:
    """Return the branches of each quantity to look into next.

    Args:
        count: Cases of all sites.

    Raises:
        StatisticsError: The histograms do not count so many cases, or contradict earlier counts.
    """
    return tuple(
        narrow(of_quantity, histogram, ranks_of(count, wanted))
        for of_quantity, histogram, wanted in zip(branches, histograms, percentiles, strict=True)
    )


def check_total(histograms: Sequence[np.ndarray], count: int) -> None:
    """Raise StatisticsError unless the first histogram of each quantity counts every case once."""
    if any(int(histogram.sum(dtype=np.float64)) != count for histogram in histograms):
        raise StatisticsError(f"the sites' counts are not of the {count} cases of their census")


# ------------------------------------------------------------------------------------------------ as it is written
def described_cases(found: Branches, count: int) -> dict[str, Any]:
    """Return the fields of a fingerprint that describe its cases, from complete branches.

    Raises:
        StatisticsError: A spacing, a shape or the relative size is impossible.
    """

    def medians(begin: int) -> list[float]:
        return [median_of(found[begin + axis], count) for axis in range(AXES)]

    def percentiles(percentile: float) -> list[float]:
        return [percentile_of(found[axis], count, percentile) for axis in range(AXES)]

    statistics = {
        "num_cases": count,
        "spacings": {"percentile_10": percentiles(10), "percentile_50": percentiles(50), "median": medians(0)},
        "shapes_after_crop": {"median": medians(AXES)},
    }
    relative_size = median_of(found[2 * AXES], count)
    _check_lengths(percentiles(10), percentiles(50), medians(0), medians(AXES), [relative_size])
    return {"geometry_statistics": statistics, "median_relative_size_after_cropping": relative_size}


def median_resampled_shape(found: Branches, count: int) -> list[float]:
    """Return the median shape at the target spacing; an axis may have no voxel."""
    return [median_of(of_axis, count) for of_axis in found]


def _check_lengths(*lengths: Sequence[float]) -> None:
    """Raise StatisticsError unless all lengths are finite and above 0."""
    if not all(0 < length < math.inf for several in lengths for length in several):
        raise StatisticsError("the sites' counts lead to a spacing or a shape that is impossible")


def with_resampled_shape(
    fingerprint: Mapping[str, Any], spacing: Sequence[float], median: Sequence[float]
) -> dict[str, Any]:
    """Return a fingerprint with a further median shape at a spacing."""
    statistics = fingerprint["geometry_statistics"]
    others = [entry for entry in statistics.get("resampled_shapes", ()) if entry["spacing"] != list(spacing)]
    entry = {"spacing": list(spacing), "median": list(median)}
    return {**fingerprint, "geometry_statistics": {**statistics, "resampled_shapes": [*others, entry]}}
