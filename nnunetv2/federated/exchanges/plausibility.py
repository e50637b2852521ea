"""Check the statistics of a site before anything is made of them.

Moments, geometry, cases, validated voxels.

A site that is broken, or whose scans have other units, would otherwise spoil the plans of all. Impossible values are
refused, odd ones reported. Refusals name no figures of the data: observers read them too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunetv2.federated.aggregation import fingerprint_statistics, outermost
from nnunetv2.federated.errors import StatisticsError

SAMPLED_VOXELS = 10**8
"""Which nnU-Net draws from each channel of all cases together,"""
SAMPLING_SLACK = 10
"""and by how much an extractor of one's own may draw more."""
ROUNDING = 1e-6
"""Relative error that sums of float64 may have."""
SMALLEST_MM, LARGEST_MM = 1e-5, 1e5
"""Of a voxel's edge. Ten nanometres and a hundred metres: values beyond are no lengths in millimetres."""
ODD_FACTOR = 3.0
"""Scans that are so many times larger or smaller than those of any other site are worth a line."""
IMPOSSIBLE_FACTOR = 30.0
"""Scans that are so many times larger or smaller have other units."""
USUAL_VALIDATION_ITERATIONS = 50
"""nnU-Net's number of validation batches per epoch, where the federation says nothing else."""
VALIDATION_SLACK = 10
"""By how much a trainer may validate more than its plans say."""


# ---------------------------------------------------------------------------------------------------------- moments
def check_moments(
    moments: fingerprint_statistics.ChannelMoments, coarse: np.ndarray, *, is_whole: bool = False
) -> None:
    """Raise StatisticsError unless the moments can be those of a histogram's values.

    Args:
        coarse: int64 (65536,), of the same channel and site.
        is_whole: Whether all values are counted where they are, and the outermost not farther out; see `outermost`.
    """
    count = int(coarse.sum())
    if count != moments.count:
        raise StatisticsError("moments and histogram count different numbers of voxels")
    if count == 0:
        return
    used = np.flatnonzero(coarse).astype(np.uint32)
    lower, upper = (
        fingerprint_statistics.key_values(keys).astype(np.float64) for keys in (used << 16, used << 16 | 0xFFFF)
    )
    share = coarse[used] / count
    width = float(upper[-1] - lower[0])
    hidden = 0.0 if is_whole else outermost.hidden_of(count) / count  # share at each end that may lie farther inside
    rounding = ROUNDING * max(abs(lower[0]), abs(upper[-1]), width)
    room = hidden * width + rounding
    if not share @ lower - room <= moments.mean <= share @ upper + room:
        raise StatisticsError("the mean does not lie where the site's own histogram says")
    farther = np.maximum(np.square(lower - moments.mean), np.square(upper - moments.mean))
    nearer = np.where(
        (lower <= moments.mean) & (moments.mean <= upper),
        0.0,
        np.minimum(np.square(lower - moments.mean), np.square(upper - moments.mean)),
    )
    variance, room = moments.m2 / count, 2 * hidden * width**2 + rounding**2
    if not share @ nearer * (1 - ROUNDING) - room <= variance <= share @ farther * (1 + ROUNDING) + room:
        raise StatisticsError("the standard deviation is not what the site's own histogram says")


def check_count(count: int, num_cases: int, num_all_cases: int) -> None:
    """Raise StatisticsError if a site counts more voxels than its cases are sampled for.

    Args:
        num_cases: Of the site.
        num_all_cases: Of all sites, which share out the voxels that nnU-Net samples.
    """
    if count > SAMPLING_SLACK * SAMPLED_VOXELS * num_cases / num_all_cases:
        raise StatisticsError("there are more voxels than are sampled from so many cases")


def check_corrected(first: np.ndarray, before: np.ndarray, now: np.ndarray) -> None:
    """Raise StatisticsError unless a corrected histogram only shows more values.

    Only hidden values, which were counted farther out, may move. A site that could send any histogram would find, look
    by look, the others' values at any rank.

    Args:
        first: int64 (65536,), the histogram as it was at first.
        before: The same as it was sent last.
        now: As it comes again.
    """
    used, hidden = np.flatnonzero(first), outermost.hidden_of(int(first.sum()))
    ends = np.zeros(first.shape, bool)
    ends[used[:1]] = ends[used[-1:]] = True
    fewer = now < before
    if now.sum() != first.sum() or (fewer & ~ends).any() or (first - now)[ends].max(initial=0) > hidden:
        raise StatisticsError("a histogram that comes again has other values, not only fewer hidden ones")


# --------------------------------------------------------------------------------------------------------- geometry
def check_geometry(spacings: Sequence[Sequence[float]], relative_sizes: Sequence[float]) -> None:
    """Raise StatisticsError for impossible lengths.

    Lengths that are none in millimetres, scans that grew by being cropped.
    """
    if not all(SMALLEST_MM <= edge <= LARGEST_MM for spacing in spacings for edge in spacing):
        raise StatisticsError(
            f"a spacing is below {SMALLEST_MM:g} or above {LARGEST_MM:g} mm: look at the headers of the images"
        )
    if max(relative_sizes) > 1 + ROUNDING:
        raise StatisticsError("a case has more voxels after cropping than before")


@dataclass(frozen=True)
class Geometry:
    """The medians of a site's scans, per axis in mm."""

    spacing: tuple[float, ...]
    extent: tuple[float, ...]

    @classmethod
    def of(cls, spacings: Sequence[Sequence[float]], shapes: Sequence[Sequence[int]]) -> Geometry:
        """Compute the medians of all cases of a site."""
        edges = np.asarray(spacings, np.float64)
        extents = edges * np.asarray(shapes, np.float64)
        return cls(tuple(np.median(edges, axis=0).tolist()), tuple(np.median(extents, axis=0).tolist()))

    def factor_to(self, other: Geometry) -> float:
        """Return the ratio of these scans' size to that of others.

        Other resolutions leave the extent as it is, other parts of the body the spacing. Other units change both alike:
        the result is the smaller change of the two, of the axis where it is largest.
        """
        found = 0.0
        pairs = zip(self.spacing, other.spacing, self.extent, other.extent, strict=True)
        for own, its, own_extent, its_extent in pairs:
            changes = math.log(own / its), math.log(own_extent / its_extent)
            if changes[0] * changes[1] > 0:
                found = max(found, min(changes, key=abs), key=abs)
        return math.exp(found)


def factors_to_nearest(geometries: Mapping[str, Geometry]) -> dict[str, float]:
    """Return the ratio of each site's scan size to the nearest other site's."""
    return {
        site: min(
            (own.factor_to(other) for name, other in geometries.items() if name != site),
            key=lambda factor: abs(math.log(factor)),
            default=1.0,
        )
        for site, own in geometries.items()
    }


def is_at_least(factor: float, limit: float) -> bool:
    """Tell whether something is so many times larger, or so many times smaller."""
    return abs(math.log(factor)) >= math.log(limit) * (1 - ROUNDING)


def describe_factor(factor: float) -> str:
    """Describe a ratio of sizes.

    No more precisely than it takes to find wrong units.
    """
    times, word = (factor, "larger") if factor >= 1 else (1 / factor, "smaller")
    return f"about {float(f'{times:.1g}'):g} times {word}"


def in_mm(lengths: Sequence[float]) -> str:
    """Return lengths as people read them: 1 x 0.8 x 0.8 mm."""
    return " x ".join(f"{length:.3g}" for length in lengths) + " mm"


# ------------------------------------------------------------------------------------------------------- validation
def largest_validation(plans: Mapping[str, Any], configuration: str, num_iterations: int | None) -> float:
    """Return how many voxels a site can have validated.

    Batches of patches, with room for trainers of their own.

    Args:
        num_iterations: Validation batches per epoch, if the federation says.

    Returns:
        Infinity where the plans do not tell.
    """
    try:
        described = _resolved(plans["configurations"], configuration)
        voxels = int(described["batch_size"]) * math.prod(int(edge) for edge in described["patch_size"])
        return float(VALIDATION_SLACK * voxels * (num_iterations or USUAL_VALIDATION_ITERATIONS))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
        return math.inf


def _resolved(configurations: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a configuration with its inherited fields."""
    described = configurations[name]
    parent = described.get("inherits_from")
    return {**_resolved(configurations, parent), **described} if parent else described
