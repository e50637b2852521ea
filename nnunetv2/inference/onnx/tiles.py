"""Run a network over the tiles of an image and blend the logits, in NumPy.

`tile_accumulation` and `logit_sums` do the same for torch's devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from nnunetv2.inference.errors import NonFiniteLogitsError
from nnunetv2.inference.tile_geometry import (
    Slicer,
    compute_tile_slicers,
    extent,
    gaussian_bump,
    mirror_combinations,
    shifted,
)

Predict = Callable[[np.ndarray], np.ndarray]
"""A batch of tiles `(b, c, *tile)` -> their logits `(b, classes, *tile)`."""

# Small tiles cost more in calls than in arithmetic. Batches beyond this only take memory.
_VOXELS_AT_ONCE = 2**18


def predict_image(
    predict: Predict,
    image: np.ndarray,
    *,
    classes: int,
    tile_size: Sequence[int],
    tile_step_size: float,
    weight: np.ndarray | float,
) -> np.ndarray:
    """Return the blended logits `(classes, *spatial)` of an image `(c, *spatial)`, float16.

    Images smaller than a tile are padded with zeros on all sides. Tiles of two axes go through a volume slice by slice.

    Raises:
        NonFiniteLogitsError: The network answered with something that float16 does not hold.
    """
    padded, inside = _pad(image, tile_size)
    spatial = padded.shape[1:]
    slicers = sorted(
        compute_tile_slicers(spatial, tile_size, tile_step_size), key=lambda slicer: extent(slicer[1], spatial[0])
    )
    first, last = extent(slicers[0][1], spatial[0])
    sums = _WindowedSums(classes, spatial, last - first)
    at_once = max(1, _VOXELS_AT_ONCE // padded[slicers[0]][0].size)
    for begin in range(0, len(slicers), at_once):
        batch = slicers[begin : begin + at_once]
        for logits, slicer in zip(predict(np.stack([padded[slicer] for slicer in batch])), batch):
            sums.add(logits, slicer, weight)
    return sums.finish()[(slice(None), *inside)]


def mirrored_mean(predict: Predict, tiles: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """Return the mean of `flip(predict(flip(tiles)))` over all combinations of spatial axes, float32."""
    subsets = mirror_combinations(axes)
    total = np.zeros((), np.float32)
    for subset in subsets:
        mirrored = tuple(axis + 2 for axis in subset)
        total = total + np.flip(predict(np.ascontiguousarray(np.flip(tiles, mirrored))), mirrored)
    return total / np.float32(len(subsets))


def tile_weights(tile_size: Sequence[int]) -> np.ndarray:
    """Return the weights of a tile's voxels, float32: a Gaussian, nowhere 0."""
    weights = gaussian_bump(tile_size, largest=10).astype(np.float32)
    weights[weights == 0] = weights[weights > 0].min()
    return weights


class _WindowedSums:
    """The weighted mean of overlapping tiles, which arrive ordered along the first spatial axis.

    It is summed in float32 for the planes that tiles can still reach, and kept in float16 for those before.
    """

    def __init__(self, classes: int, spatial: Sequence[int], window: int) -> None:
        self._logits = np.zeros((classes, *spatial), np.float16)
        self._sums = np.zeros((classes, window, *spatial[1:]), np.float32)
        self._weights = np.zeros((window, *spatial[1:]), np.float32)
        self._first = 0

    def add(self, logits: np.ndarray, slicer: Slicer, weight: np.ndarray | float) -> None:
        first, _ = extent(slicer[1], self._logits.shape[1])
        self._finish_before(first)
        place = shifted(slicer[1:], self._first)
        self._sums[(slice(None), *place)] += logits * weight
        self._weights[place] += weight

    def finish(self) -> np.ndarray:
        self._finish_before(self._logits.shape[1])
        return self._logits

    def _finish_before(self, plane: int) -> None:
        window = len(self._weights)
        done = min(plane - self._first, window)
        if done > 0:
            means = self._sums[:, :done] / np.maximum(self._weights[:done], np.finfo(np.float32).tiny)
            part = self._logits[:, self._first : self._first + done]
            with np.errstate(over="ignore"):  # it is told below
                part[...] = means
            if not np.isfinite(part).all():
                raise NonFiniteLogitsError
            for planes in (self._weights, *self._sums):  # class by class, so that no copy of all sums is needed
                planes[: window - done] = planes[done:].copy()
                planes[window - done :] = 0
        self._first = max(self._first, plane)


def _pad(image: np.ndarray, tile_size: Sequence[int]) -> tuple[np.ndarray, tuple[slice, ...]]:
    """Return an image that is at least as large as a tile, and the place of the original in it."""
    spatial = image.shape[1:]
    missing = [max(0, tile - side) for side, tile in zip(spatial[-len(tile_size) :], tile_size)]
    before = [0] * (len(spatial) - len(missing)) + [n // 2 for n in missing]
    after = [0] * (len(spatial) - len(missing)) + [n - n // 2 for n in missing]
    inside = tuple(slice(start, start + side) for start, side in zip(before, spatial))
    if not any(missing):
        return image, inside
    return np.pad(image, [(0, 0), *zip(before, after)]), inside
