"""Resample label maps without a volume per label.

The rule, which batchgenerators >= 0.25.4 defines: interpolate each label's 0/1 indicator; the largest value wins; on an
exact tie the label of the nearest input voxel wins if it takes part, else the smallest label.

At order 1 an output voxel is a mixture of the 2 ** axes input voxels around it. Where these agree, nothing needs to be
computed, so the whole map is first filled with nearest labels, and only voxels in a mixed neighbourhood are voted on:

    1 1 1 1 1 2 2 2        cells between input voxels:   . . . . x . .
    1 1 1 1 2 2 2 2                                      only outputs that fall into an x vote
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np

from nnunetv2.preprocessing.resampling.separable import gather, nearest_indices, resampled_slabs, sample_positions

# Voxels gathered or voted on at a time. Small enough for the caches, and it bounds the memory on noisy maps.
_SLAB_VOXELS = 2**21
_VOTERS = 2**16


@dataclass(frozen=True)
class _LinearAxis:
    """How each output position of an axis mixes two neighbouring inputs."""

    lower: np.ndarray
    weights: tuple[np.ndarray, np.ndarray]
    """Of input `lower` and of input `lower + step`."""
    step: int
    """1, or 0 for an axis with a single input position."""


def resample_labels(labels: np.ndarray, new_shape: Sequence[int], order: int) -> np.ndarray:
    """Resample a label map of any number of axes and any dtype.

    The result is a new array of the same dtype.

    Args:
        order: 0 nearest neighbour, 1 linear, 2 to 5 splines. See the module for the decision.
    """
    new_shape = tuple(int(n) for n in new_shape)
    if labels.size == 0:
        return np.zeros(new_shape, labels.dtype)
    nearest = [nearest_indices(old, new) for old, new in zip(labels.shape, new_shape)]
    if order == 0:
        return gather(labels, nearest)
    first = labels.flat[0]
    if (labels == first).all():
        return np.full(new_shape, first, labels.dtype)
    if order == 1:
        return _vote_where_mixed(np.ascontiguousarray(labels), new_shape, nearest)
    return _compare_indicators(labels, new_shape, order, gather(labels, nearest))


def _vote_where_mixed(labels: np.ndarray, new_shape: tuple[int, ...], nearest: Sequence[np.ndarray]) -> np.ndarray:
    axes = [_linear_axis(old, new) for old, new in zip(labels.shape, new_shape)]
    mixed = find_mixed_cells(labels)
    resampled = np.empty(new_shape, labels.dtype)
    rows_per_slab = max(1, _SLAB_VOXELS // max(1, prod(new_shape[1:])))
    for start in range(0, new_shape[0], rows_per_slab):
        rows = slice(start, start + rows_per_slab)
        slab = resampled[rows]
        slab[...] = gather(labels, [nearest[0][rows], *nearest[1:]])
        flat_slab = slab.reshape(-1)
        voters = np.flatnonzero(gather(mixed, [axes[0].lower[rows], *(axis.lower for axis in axes[1:])]))
        for i in range(0, len(voters), _VOTERS):
            chosen = voters[i : i + _VOTERS]
            first, *others = np.unravel_index(chosen, slab.shape)
            flat_slab[chosen] = _vote(labels, axes, (first + start, *others), flat_slab[chosen])
    return resampled


def find_mixed_cells(labels: np.ndarray) -> np.ndarray:
    """Mark the cells between voxels whose corners hold different labels.

    A cell has 2 ** axes corners, which are voxels of the input.

    Returns:
        Boolean array, one shorter than `labels` on each axis that has more than one voxel.
    """
    uniform = np.ones(labels.shape, bool)
    for axis in range(labels.ndim):
        if labels.shape[axis] == 1:
            continue
        lower = tuple(slice(None, -1) if a == axis else slice(None) for a in range(labels.ndim))
        upper = tuple(slice(1, None) if a == axis else slice(None) for a in range(labels.ndim))
        uniform = uniform[lower] & uniform[upper]
        # The first corner of a cell stands for all of them along the axes already seen.
        first = tuple(map(slice, uniform.shape))
        uniform &= labels[lower][first] == labels[upper][first]
    return ~uniform


def _linear_axis(old: int, new: int) -> _LinearAxis:
    positions = np.clip(sample_positions(old, new), 0, old - 1)
    lower = np.minimum(np.floor(positions), max(old - 2, 0))
    upper_weight = positions - lower
    return _LinearAxis(lower.astype(np.intp), (1 - upper_weight, upper_weight), step=int(old > 1))


def _vote(
    labels: np.ndarray, axes: Sequence[_LinearAxis], where: tuple[np.ndarray, ...], nearest: np.ndarray
) -> np.ndarray:
    """Decide the labels of the output voxels at `where`, whose nearest input voxels hold `nearest`."""
    corner_labels, corner_weights = _corners(labels, axes, where)
    for_nearest = _add_votes(corner_labels, corner_weights, nearest)
    # More than half cannot be beaten, and this settles nearly every voxel.
    open_votes = np.flatnonzero(for_nearest < 0.5 + 1e-9)
    winners = nearest.copy()
    if open_votes.size:
        winners[open_votes] = _count(
            [label[open_votes] for label in corner_labels],
            [weight[open_votes] for weight in corner_weights],
            nearest[open_votes],
            for_nearest[open_votes],
        )
    return winners


def _corners(
    labels: np.ndarray, axes: Sequence[_LinearAxis], where: tuple[np.ndarray, ...]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return labels and weights of the input voxels around output voxels: lists over corners."""
    strides = [prod(labels.shape[a + 1 :]) for a in range(labels.ndim)]
    flat = labels.reshape(-1)
    base = sum(axis.lower[i] * stride for axis, i, stride in zip(axes, where, strides))
    axis_weights = [[side[i] for side in axis.weights] for axis, i in zip(axes, where)]
    corner_labels, corner_weights = [], []
    for sides in product((0, 1), repeat=len(axes)):
        offset = sum(side * axis.step * stride for side, axis, stride in zip(sides, axes, strides))
        corner_labels.append(flat[base + offset])
        corner_weights.append(prod(weights[side] for weights, side in zip(axis_weights, sides)))
    return corner_labels, corner_weights


def _count(
    labels: Sequence[np.ndarray], weights: Sequence[np.ndarray], nearest: np.ndarray, for_nearest: np.ndarray
) -> np.ndarray:
    winners, most = nearest.copy(), for_nearest.copy()
    for candidate in labels:
        votes = _add_votes(labels, weights, candidate)
        # Smaller labels win ties among each other, but never against the nearest, which keeps `for_nearest`.
        better = (votes > most) | ((votes == most) & (votes > for_nearest) & (candidate < winners))
        winners[better], most[better] = candidate[better], votes[better]
    return winners


def _add_votes(labels: Sequence[np.ndarray], weights: Sequence[np.ndarray], candidate: np.ndarray) -> np.ndarray:
    # Whether labels tie is up to the last bit at most ratios of voxel sizes. So that the same ones win as in scipy,
    # products and sums are taken in its order: axes from the first to the last, corners likewise, then clipping.
    return np.minimum(sum(weight * (label == candidate) for label, weight in zip(labels, weights)), 1)


def _compare_indicators(labels: np.ndarray, new_shape: tuple[int, ...], order: int, nearest: np.ndarray) -> np.ndarray:
    """Resample each label's indicator slab by slab; memory holds one slab per label."""
    present = np.unique(labels)
    indicators = [
        resampled_slabs(labels, new_shape, order, lambda part, label=label: (part == label).astype(float))
        for label in present
    ]
    resampled = np.empty(new_shape, labels.dtype)
    for parts in zip(*indicators):
        rows = parts[0][0]
        values = np.clip(np.stack([value for _, value in parts]), 0, 1)
        winner = values.argmax(axis=0)  # the first, so the smallest label
        nearest_rank = np.searchsorted(present, nearest[rows])
        for_nearest = np.take_along_axis(values, nearest_rank[None], axis=0)[0]
        resampled[rows] = np.where(for_nearest == values.max(axis=0), nearest[rows], present[winner])
    return resampled
