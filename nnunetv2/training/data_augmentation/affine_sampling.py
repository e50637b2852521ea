"""Sample images and label maps at the points of a rotated and scaled grid.

`torch.nn.functional.grid_sample` takes any set of points: for 128x128x128 of them that is a list of 24 MiB to build and
to work through one by one. The points of an affine grid are sums of one number per axis, and tiles of them stay in the
processor's cache. Images are interpolated linearly and are 0 outside, as with its padding mode 'zeros'.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

TILE_POINTS = 32_768
"""Points that are worked on at once: their corner values fill about 1 MiB."""
SLACK = 1e-3
"""Voxels by which positions in float32 may miss their true value."""


Cells = tuple[np.ndarray, np.ndarray]
"""Along an axis: the lower corners of the cells that points lie in, and the shares (float32) of the upper corners."""


class AffineGrid(NamedTuple):
    """Points `matrix @ index + offset` for all indices of a patch.

    They are in voxels of the source.
    """

    matrix: np.ndarray
    """`(dim, dim)`, float64."""
    offset: np.ndarray
    """`(dim,)`, float64: where index 0 lies."""
    patch: tuple[int, ...]

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the smallest and the largest coordinate of the points, per axis."""
        reach = self.matrix * (np.array(self.patch) - 1)
        return self.offset + np.minimum(reach, 0).sum(1), self.offset + np.maximum(reach, 0).sum(1)

    def cells(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the half-open box of voxels that linear interpolation needs."""
        smallest, largest = self.bounds()
        return np.floor(smallest - SLACK).astype(int), np.floor(largest + SLACK).astype(int) + 2

    def seen_from(self, corner: Sequence[int]) -> AffineGrid:
        """Return the same points in an array that begins at this voxel of the source."""
        return self._replace(offset=self.offset - np.asarray(corner))

    @property
    def is_scaling(self) -> bool:
        """Whether every axis is only stretched."""
        return np.count_nonzero(self.matrix) == np.count_nonzero(np.diag(self.matrix))


def centred_grid(affine: np.ndarray, centre: Sequence[float], patch: Sequence[int]) -> AffineGrid:
    """Return the grid of a patch, turned about its centre and moved to `centre`.

    Args:
        affine: Rotation and scaling of column vectors.
        centre: In voxels of the source, counted from the outer edge of the first one.
    """
    matrix = np.asarray(affine, dtype=np.float64)
    middle = (np.array(patch) - 1) / 2
    return AffineGrid(matrix, np.asarray(centre, dtype=np.float64) - 0.5 - matrix @ middle, tuple(map(int, patch)))


class Source(NamedTuple):
    """The part of an array that a grid needs.

    It includes values beyond the edges of the array.
    """

    values: np.ndarray
    """`(c, *box)`, contiguous."""
    grid: AffineGrid
    """In voxels of `values`."""
    limits: tuple[np.ndarray, np.ndarray] | None
    """Where to clamp positions that lie further outside than the box reaches; None if there are none."""


def cut_source(values: np.ndarray, grid: AffineGrid, fill: float) -> Source:
    """Cut the part of an array `(c, *spatial)` that a grid needs.

    It is surrounded by `fill` where it reaches beyond the array.
    """
    length = np.array(values.shape[1:])
    lower, upper = grid.cells()
    # One voxel of padding suffices: further out, everything is the same. A position at `length` needs two.
    first, last = np.clip(lower, -1, length), np.clip(upper, 1, length + 2)
    begin, end = np.maximum(first, 0), np.minimum(last, length)
    end = np.maximum(begin, end)
    part = values[(slice(None), *map(slice, begin, end))]
    padding = [(int(b - f), int(s - e)) for f, b, e, s in zip(first, begin, end, last)]
    if any(itertools.chain(*padding)):
        part = _pad(part, padding, fill)
    is_far = bool((lower < -1).any() or (upper > length + 2).any())
    limits = (-1.0 - first, length - first) if is_far else None
    return Source(np.ascontiguousarray(part), grid.seen_from(first), limits)


def _pad(values: np.ndarray, padding: Sequence[tuple[int, int]], fill: float) -> np.ndarray:
    shape = [length + before + after for length, (before, after) in zip(values.shape[1:], padding)]
    padded = np.full((len(values), *shape), fill, values.dtype)
    inside = [slice(before, before + length) for length, (before, _) in zip(values.shape[1:], padding)]
    padded[(slice(None), *inside)] = values
    return padded


def sample_images(images: np.ndarray, grid: AffineGrid) -> np.ndarray:
    """Interpolate images `(c, *spatial)` linearly, with 0 outside; return `(c, *patch)` float32."""
    source = cut_source(np.asarray(images, dtype=np.float32), grid, 0)
    return _scale_images(source) if grid.is_scaling else _turn_images(source)


def sample_lower_corners(values: np.ndarray, source: Source) -> np.ndarray:
    """Return the voxel at the lower corner of each point's cell: `(c, *patch)`.

    Args:
        values: `(c, *box)`, of the same box as the source.
    """
    if source.grid.is_scaling:
        corners = values
        for axis, (cells, _) in enumerate(_cells_per_axis(source)):
            corners = np.take(corners, cells, axis=axis + 1)
        return corners
    result = np.empty((len(values), *source.grid.patch), values.dtype)
    flat = values.reshape(len(values), -1)
    for rows, _, cells in _tiles(source):
        for channel, out in zip(flat, result):
            np.take(channel, cells, out=out[rows], mode="clip")
    return result


def _turn_images(source: Source) -> np.ndarray:
    """Interpolate at the points of any grid."""
    num_axes = len(source.grid.patch)
    strides = _flat_strides(source.values.shape[1:])
    steps = [sum(itertools.compress(strides, corner)) for corner in itertools.product((0, 1), repeat=num_axes)]
    channels = source.values.reshape(len(source.values), -1)
    result = np.empty((len(channels), *source.grid.patch), np.float32)
    for rows, weights, cells in _tiles(source):
        corners = np.empty((len(steps), *cells.shape), np.float32)
        for channel, out in zip(channels, result):
            for step, values in zip(steps, corners):
                np.take(channel[step:], cells, out=values, mode="clip")
            _reduce_corners(corners, weights, out[rows])
    return result


def _reduce_corners(corners: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    """Interpolate along one axis after the other, from the last one; overwrites `corners`."""
    for weight in weights[:0:-1]:
        lower, upper = corners[0::2], corners[1::2]
        upper -= lower
        upper *= weight
        upper += lower
        corners = upper
    np.subtract(corners[1], corners[0], out=out)
    out *= weights[0]
    out += corners[0]


def _scale_images(source: Source) -> np.ndarray:
    """Interpolate along one axis after the other; in 3D a slice of the result at a time."""
    *first, rows, columns = _cells_per_axis(source)
    result = np.empty((len(source.values), *source.grid.patch), np.float32)
    for channel, out in zip(source.values, result):
        if not first:
            out[...] = _scale_plane(channel, rows, columns)
            continue
        for cell, weight, plane in zip(*first[0], out):
            plane[...] = _scale_plane(_blend(channel[cell], channel[cell + 1], weight), rows, columns)
    return result


def _scale_plane(values: np.ndarray, rows: Cells, columns: Cells) -> np.ndarray:
    cells, weights = rows
    values = _blend(values[cells], values[cells + 1], weights[:, None])
    cells, weights = columns
    return _blend(np.take(values, cells, 1), np.take(values, cells + 1, 1), weights)


def _blend(lower: np.ndarray, upper: np.ndarray, weight: np.ndarray | np.float32) -> np.ndarray:
    blended = upper - lower
    blended *= weight
    blended += lower
    return blended


def _cells_per_axis(source: Source) -> list[Cells]:
    """Return the cells along each axis of a grid that only scales."""
    per_axis = []
    for axis, length in enumerate(source.grid.patch):
        positions = source.grid.matrix[axis, axis] * np.arange(length) + source.grid.offset[axis]
        if source.limits is not None:
            positions = positions.clip(source.limits[0][axis], source.limits[1][axis])
        cells = np.floor(positions)
        per_axis.append((cells.astype(np.intp), (positions - cells).astype(np.float32)))
    return per_axis


def _tiles(source: Source) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yield for some rows of the patch at a time: the rows, the shares `(dim, rows, ...)` of the upper corners, and the
    flat index `(rows, ...)` of the lower corner. The arrays are used again for the next rows."""
    patch = source.grid.patch
    height = min(patch[0], max(1, TILE_POINTS * patch[0] // int(np.prod(patch))))
    shape = (height, *patch[1:])
    weights, lower = np.empty((2, len(shape), *shape), np.float32)
    # float32 counts exactly only up to 2^24 voxels
    flat = np.empty(shape, np.float32 if source.values[0].size < 2**24 else np.float64)
    cells = np.empty(shape, np.intp)
    strides, terms = _flat_strides(source.values.shape[1:]), _position_terms(source.grid)
    for begin in range(0, patch[0], height):
        rows = slice(begin, min(begin + height, patch[0]))
        used = slice(0, rows.stop - begin)
        for axis, stride in enumerate(strides):
            weight, low = weights[axis, used], lower[axis, used]
            rows_term, last_term = terms[axis]
            np.add(rows_term[rows], last_term, out=weight)
            if source.limits is not None:
                np.maximum(weight, np.float32(source.limits[0][axis]), out=weight)
                np.minimum(weight, np.float32(source.limits[1][axis]), out=weight)
            np.floor(weight, out=low)
            weight -= low
            if axis == 0:
                np.multiply(low, stride, out=flat[used])
            else:
                low *= stride
                flat[used] += low
        np.copyto(cells[used], flat[used], casting="unsafe")
        yield rows, weights[:, used], cells[used]


def _position_terms(grid: AffineGrid) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return for each axis two arrays, float32, that broadcast to the points' coordinates: all index axes but the last,
    and the last."""
    terms = []
    for factors, offset in zip(grid.matrix, grid.offset):
        *leading, last = (factor * np.arange(length) for factor, length in zip(factors, grid.patch))
        start = offset + leading[0]
        for term in leading[1:]:
            start = start[..., None] + term
        terms.append((start[..., None].astype(np.float32), last.astype(np.float32)))
    return terms


def _flat_strides(shape: Sequence[int]) -> list[int]:
    return [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
