"""Resample images, one axis after the other.

B-spline interpolation on a regular grid is separable: the 3-D result is three products with one small matrix per axis.
Output `i` of an axis with `old` input and `new` output positions lies at `(old / new) * (i + 0.5) - 0.5`, so the outer
edges of both grids coincide. Orders above 1 follow scikit-image's `resize(mode="edge")`: 12 edge voxels are repeated at
each end, then the spline is fitted (`scipy.ndimage.spline_filter1d`). Fit and evaluation together are one matrix per
axis. It is full in principle, but its entries decay by a factor of 3.7 per voxel (cubic), so that in floating point it
is a band about 34 inputs wide. We cut it into blocks of outputs and let BLAS multiply each:

            inputs
          +--------------------+
  outputs | ####               |
          |  #####             |     one Band = the rows of a block, and only the columns
          |      #####         |     that are not negligible in it
          |          #####     |
          +--------------------+
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb, factorial, prod

import numpy as np

# scikit-image (through scipy) repeats this many edge voxels before it fits a spline.
_EDGE_VOXELS = 12
# Inputs beyond this distance have no influence in float64: the slowest pole of order 5 decays to 0.43 ** 64 = 4e-24.
_REACH = 64
# Outputs per block: larger blocks multiply more zeros, smaller ones leave BLAS too little to do (measured: 16 to 64).
_BLOCK = 32
# Voxels per plane-block along the first axis; keeps the intermediate results of a slab near 16 MB.
_SLAB_VOXELS = 2**22


@dataclass(frozen=True)
class Band:
    """A block of output positions of one axis.

    They are mixtures of a range of input positions.
    """

    outputs: slice
    inputs: slice
    weights: np.ndarray | None
    """Shape (outputs, inputs), read-only. None: outputs equal inputs."""


def sample_positions(old: int, new: int) -> np.ndarray:
    """Return the positions of an axis' output voxels among its input voxels (float64)."""
    return (old / new) * (np.arange(new) + 0.5) - 0.5


def nearest_indices(old: int, new: int) -> np.ndarray:
    """Return the input voxel nearest to each output voxel of an axis.

    Halves round up, as scipy does at order 0.
    """
    return np.clip(np.floor(sample_positions(old, new) + 0.5), 0, old - 1).astype(np.intp)


def gather(array: np.ndarray, indices: Sequence[np.ndarray]) -> np.ndarray:
    """Pick rows, columns, ... of an array: `array[np.ix_(*indices)]`, five times as fast."""

    def growth(axis: int) -> float:
        return len(indices[axis]) / max(1, array.shape[axis])

    for axis in sorted(range(array.ndim), key=growth):  # axes that shrink the array go first
        array = array.take(indices[axis], axis=axis)
    return array


def resample_image(image: np.ndarray, new_shape: Sequence[int], order: int, out: np.ndarray) -> None:
    """Interpolate an image into `out`, clipped to the range of its input.

    It has any number of axes.

    Needs memory for one slab beside input and output. Float16 and float32 are computed in float32 (differs from
    scikit-image's float64 by less than 1e-6 of the range), all else in float64.

    Args:
        order: Spline order 0 (nearest) to 5.
        out: Array of `new_shape`; its dtype may be any.
    """
    if order == 0:
        out[...] = gather(image, [nearest_indices(old, new) for old, new in zip(image.shape, new_shape)])
        return
    lowest, highest = image.min(), image.max()
    if lowest == highest:
        out[...] = lowest
        return
    for rows, slab in resampled_slabs(image, new_shape, order):
        out[rows] = np.clip(slab, lowest, highest)


def resampled_slabs(
    image: np.ndarray, new_shape: Sequence[int], order: int, convert: Callable[[np.ndarray], np.ndarray] | None = None
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield the interpolated image in slabs along its first axis, not clipped.

    Each is (rows of the output, float array).

    The arrays may share memory with `image` where nothing changes; do not write to them.

    Args:
        order: Spline order 1 to 5.
        convert: Makes a float array from a slab of `image`, for instance one label's indicator. Default: a cast to
            float32 (for float16 and float32) or float64 (else).
    """
    convert = convert or _to_float
    dtype = convert(image[:0]).dtype
    rows_per_slab = max(1, min(_BLOCK, _SLAB_VOXELS // max(1, prod(new_shape[1:]))))
    for band in axis_bands(image.shape[0], new_shape[0], order, dtype, rows_per_slab):
        slab = np.ascontiguousarray(convert(image[band.inputs]))
        if band.weights is not None:
            mixed = band.weights @ slab.reshape(len(slab), -1)
            slab = mixed.reshape(-1, *image.shape[1:])
        for axis in range(1, image.ndim):
            slab = resample_axis(slab, axis, new_shape[axis], order)
        yield band.outputs, slab


def resample_axis(array: np.ndarray, axis: int, new: int, order: int) -> np.ndarray:
    """Interpolate a contiguous float array along one axis, not clipped.

    Returns `array` itself if nothing changes.
    """
    old = array.shape[axis]
    if old == new:
        return array
    before, after = prod(array.shape[:axis]), prod(array.shape[axis + 1 :])
    mixed = np.empty((before, new, after), array.dtype)
    for band in axis_bands(old, new, order, array.dtype):
        assert band.weights is not None  # only where sizes agree
        if after == 1:  # the last axis: one large product instead of many small ones
            np.matmul(array.reshape(before, old)[:, band.inputs], band.weights.T, out=mixed[:, band.outputs, 0])
        else:
            np.matmul(band.weights, array.reshape(before, old, after)[:, band.inputs], out=mixed[:, band.outputs])
    return mixed.reshape(*array.shape[:axis], new, *array.shape[axis + 1 :])


def axis_bands(old: int, new: int, order: int, dtype: np.dtype, block: int = _BLOCK) -> tuple[Band, ...]:
    """Return the interpolation matrix of one axis, (new, old), in bands.

    A band has at most `block` outputs.
    """
    if not 1 <= order <= 5:
        raise ValueError(f"the order of interpolation must be 0 (nearest), 1 (linear) or 2 to 5 (splines), got {order}")
    # Where outputs are sparse, a block of them would span many inputs that each of them ignores.
    block = max(1, min(block, max(4, 2 * _BLOCK * new // old)))
    return _cached_bands(old, new, order, np.dtype(dtype), block)


@lru_cache(maxsize=256)
def _cached_bands(old: int, new: int, order: int, dtype: np.dtype, block: int) -> tuple[Band, ...]:
    starts = range(0, new, block)
    if old == new:
        return tuple(Band(slice(i, min(i + block, new)), slice(i, min(i + block, new)), None) for i in starts)
    positions = sample_positions(old, new)
    return tuple(_build_band(positions[i : i + block], i, old, order, dtype) for i in starts)


def _build_band(positions: np.ndarray, start: int, old: int, order: int, dtype: np.dtype) -> Band:
    if order == 1:  # splines see repeated edge voxels instead
        positions = np.clip(positions, 0, old - 1)
    reach = _REACH if order > 1 else 1
    first = max(0, int(np.floor(positions[0])) - reach)
    last = min(old, int(np.ceil(positions[-1])) + reach + 1)
    weights = _interpolation_matrix(positions - first, last - first, order)
    used = np.flatnonzero((np.abs(weights) > 1e-3 * np.finfo(dtype).eps).any(axis=0))
    weights = np.ascontiguousarray(weights[:, used[0] : used[-1] + 1], dtype=dtype)
    weights.flags.writeable = False
    return Band(slice(start, start + len(positions)), slice(first + int(used[0]), first + int(used[-1]) + 1), weights)


def _interpolation_matrix(positions: np.ndarray, length: int, order: int) -> np.ndarray:
    """Return the matrix (positions, length) that evaluates the spline through `length` values at `positions`."""
    values = np.eye(length)
    if order > 1:
        from scipy.ndimage import spline_filter1d

        padded = np.pad(values, ((_EDGE_VOXELS, _EDGE_VOXELS), (0, 0)), mode="edge")
        values = spline_filter1d(padded, order, axis=0, mode="nearest")
        positions = positions + _EDGE_VOXELS
    return _bspline(order, positions[:, None] - np.arange(len(values))) @ values


def _bspline(order: int, x: np.ndarray) -> np.ndarray:
    """Evaluate the centred B-spline of an order at x (Unser 1999, equation 12: a sum of truncated powers)."""
    half = (order + 1) / 2
    x = np.minimum(np.abs(x), half)  # symmetric and 0 outside; keeps the powers small
    return sum(
        (-1) ** k * comb(order + 1, k) * np.maximum(half - x - k, 0) ** order for k in range(order + 1)
    ) / factorial(order)


def _computing_dtype(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float32 if dtype in (np.float16, np.float32) else np.float64)


def _to_float(array: np.ndarray) -> np.ndarray:
    return array.astype(_computing_dtype(array.dtype), copy=False)
