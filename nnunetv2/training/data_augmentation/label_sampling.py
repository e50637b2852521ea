"""Sample label maps between voxels.

A point gets the label that has the largest share in a linear interpolation.

Where all voxels around a point have one label, that is it. Only at the boundaries, a few percent of a patch, are shares
computed. They are compared as float16 in thousandths, and among equal ones the label of the nearest voxel wins, then
the lowest: so does batchgeneratorsv2, and labels agree with its labels voxel for voxel.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from nnunetv2.training.data_augmentation.affine_sampling import AffineGrid, Source, cut_source, sample_lower_corners

SHARE_SCALE = 1000


def sample_labels(
    labels: np.ndarray, grid: AffineGrid, padding_label: int, *, start: Sequence[int], shape: Sequence[int]
) -> np.ndarray:
    """Sample label maps at the points of a grid.

    Args:
        labels: `(c, *box)`, of a signed integer type. Outside of it lies `padding_label`.
        grid: In voxels of the whole source, of which `labels` is the box that begins at `start`.
        shape: Of the whole source: positions are rounded as those of a grid over it.

    Returns:
        `(c, *patch)` in the dtype of `labels`.
    """
    source = cut_source(_as_small_integers(labels, padding_label), grid.seen_from(start), padding_label)
    box = source.values
    lowest = box.min()
    if lowest == box.max():
        return np.full((len(labels), *grid.patch), lowest, labels.dtype)
    is_mixed = np.iinfo(box.dtype).min  # no label: it stands for cells whose voxels differ
    codes = box.copy()
    np.copyto(codes, is_mixed, where=find_mixed_cells(box))
    result = sample_lower_corners(codes, source)
    points = np.flatnonzero(result == is_mixed)
    result.reshape(-1)[points] = _label_of_points(points, grid, shape, source)
    return result.astype(labels.dtype)


def _as_small_integers(labels: np.ndarray, padding_label: int) -> np.ndarray:
    """Return the labels as int8 if they fit, so that less memory is moved."""
    fits = min(labels.min(initial=0), padding_label) > -128 and max(labels.max(initial=0), padding_label) < 128
    return labels.astype(np.int8) if fits else labels


def find_mixed_cells(labels: np.ndarray) -> np.ndarray:
    """Mark the cells of label maps `(c, *spatial)` whose voxels differ.

    Cells are named by their lower corner.

    At the upper edges, where there is no cell, the marks mean nothing.
    """
    flat = np.ascontiguousarray(labels).reshape(-1)
    mixed = np.zeros(flat.size, bool)
    stride = 1
    for length in labels.shape[:0:-1]:
        # Two cells of the axes before, side by side on this axis: each of one label, and of the same one?
        # Neighbours are looked up in the flat array, which is fast, and wrong only across the edges.
        if stride < flat.size:
            change = flat[stride:] != flat[:-stride]
            change |= mixed[stride:]
            mixed[:-stride] |= change
        stride *= length
    return mixed.reshape(labels.shape)


def _label_of_points(points: np.ndarray, grid: AffineGrid, shape: Sequence[int], source: Source) -> np.ndarray:
    """Return the label with the largest share at some points, given by their flat index in `(c, *patch)`."""
    channels, points = np.divmod(points, int(np.prod(grid.patch)))
    box_shape = source.values.shape[1:]
    first = np.rint(grid.offset - source.grid.offset).astype(int)  # where the box begins in the whole source
    positions = _rounded_positions(points, grid, shape)
    if source.limits is not None:
        positions = [p.clip(low + f, high + f) for p, low, high, f in zip(positions, *source.limits, first)]
    lower = [np.floor(position) for position in positions]
    strides = [int(np.prod(box_shape[axis + 1 :])) for axis in range(len(box_shape))]
    cells = sum(
        ((low.astype(np.intp) - begin) * stride for low, begin, stride in zip(lower, first, strides)),
        channels * int(np.prod(box_shape)),
    )
    corners = np.empty((2 ** len(box_shape), len(points)), source.values.dtype)
    weights = np.ones(corners.shape, np.float32)
    flat = source.values.reshape(-1)
    for number, is_upper in enumerate(itertools.product((False, True), repeat=len(box_shape))):
        np.take(flat, cells + sum(itertools.compress(strides, is_upper)), out=corners[number], mode="clip")
        for position, low, upper in zip(positions, lower, is_upper):
            weights[number] *= position - low if upper else low + np.float32(1) - position
    nearest = np.zeros(len(points), np.intp)
    for position, low in zip(positions, lower):
        nearest = 2 * nearest + (np.rint(position) - low).astype(np.intp)
    return choose_labels(corners, weights, np.take_along_axis(corners, nearest[None], 0)[0])


def _rounded_positions(points: np.ndarray, grid: AffineGrid, shape: Sequence[int]) -> list[np.ndarray]:
    """Return the points' coordinates per axis, float32, rounded where torch rounds those of a grid for `grid_sample`.

    Shares that are equal in exact arithmetic may differ in the last digit; so the same points are on the same side.
    """
    indices = np.unravel_index(points, grid.patch)
    middle = [np.float32((length - 1) / 2) for length in grid.patch]
    centred = np.stack([index.astype(np.float32) - m for index, m in zip(indices, middle)], -1)
    turned = centred @ grid.matrix.T.astype(np.float32)
    centre = grid.offset + 0.5 + grid.matrix @ ((np.array(grid.patch) - 1) / 2)
    positions = []
    for axis, length in enumerate(shape):
        shifted = turned[:, axis] + np.float32(centre[axis] - length / 2)
        normalised = shifted / np.float32(length / 2)
        positions.append(((normalised + np.float32(1)) * np.float32(length) - np.float32(1)) / np.float32(2))
    return positions


def choose_labels(corners: np.ndarray, weights: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    """Return the label with the largest share in each of `n` cells.

    Args:
        corners: Labels `(corners, n)`.
        weights: Of the corners, float32.
        nearest: Label of the nearest corner `(n,)`; it wins if no other label has a larger share.
    """
    lowest, highest = corners.min(0), corners.max(0)
    is_low, is_high = corners == lowest, corners == highest
    low_share, high_share = _share(is_low, weights), _share(is_high, weights)
    chosen = np.where(low_share > high_share, lowest, np.where(low_share < high_share, highest, nearest))
    several = np.flatnonzero(~(is_low | is_high).all(0))  # cells of more than two labels
    if len(several):
        chosen[several] = _choose_among_many(corners[:, several], weights[:, several], nearest[several])
    return chosen


def _share(is_label: np.ndarray, weights: np.ndarray) -> np.ndarray:
    share = np.zeros(weights.shape[1], np.float32)
    for mask, weight in zip(is_label, weights):
        share += mask * weight
    return (share * np.float32(SHARE_SCALE)).astype(np.float16)


def _choose_among_many(corners: np.ndarray, weights: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    shares = np.stack([_share(corners == label, weights) for label in corners])
    is_largest = shares == shares.max(0)
    lowest_winner = np.where(is_largest, corners, np.iinfo(corners.dtype).max).min(0)
    return np.where((is_largest & (corners == nearest)).any(0), nearest, lowest_winner)
