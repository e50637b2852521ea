"""Turn logits into labels or probabilities on the image's grid, slab by slab.

Resampling all classes of a whole volume and then taking the largest needs several times the memory of the result of
interest. Here a slab of planes is interpolated for one class after the other, and only the winner is kept:

    logits (c, z, y, x)        one class of a slab        labels of the slab        labels (z', y', x')
          |                          |                          |
          +--- some planes --------> interpolate -------------> best so far ------> written in place
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np

from nnunetv2.configuration import ANISO_THRESHOLD
from nnunetv2.plans.label_manager import LabelManager
from nnunetv2.preprocessing.resampling.default_resampling import (
    determine_do_sep_z_and_axis,
    resample_data_or_seg_to_shape,
)
from nnunetv2.preprocessing.resampling.separable import Band, axis_bands, nearest_indices, resample_axis

# Output voxels per slab and class: a few copies of it stay in the cache of a core.
_SLAB_VOXELS = 2**18


@dataclass(frozen=True)
class GridChange:
    """Linear interpolation to a shape, then nearest neighbour along one axis."""

    linear_shape: tuple[int, ...]
    nearest_axis: int = 0
    nearest: np.ndarray | None = None
    """Per position of the final grid along `nearest_axis`, the position of the linear grid; None changes nothing."""


def find_grid_change(
    resampling_fn: Callable,
    old_shape: Sequence[int],
    new_shape: Sequence[int],
    current_spacing: Sequence[float],
    new_spacing: Sequence[float],
) -> GridChange | None:
    """Express a plan's `resampling_fn_probabilities` as a grid change; None if it is anything else.

    Known are the default function of order 1 and the linear one on torch; both put voxel centres at half positions
    and repeat edge voxels.
    """
    if tuple(old_shape) == tuple(new_shape):
        return GridChange(tuple(new_shape))
    options = _anisotropy_options(resampling_fn)
    if options is None or len(old_shape) != 3:
        return None
    separate, axis = determine_do_sep_z_and_axis(
        options["force_separate_z"], current_spacing, new_spacing, options["separate_z_anisotropy_threshold"]
    )
    if not separate:
        return GridChange(tuple(new_shape))
    linear_shape = tuple(old_shape[i] if i == axis else n for i, n in enumerate(new_shape))
    return GridChange(linear_shape, axis, nearest_indices(old_shape[axis], new_shape[axis]))


def _anisotropy_options(resampling_fn: Callable) -> dict | None:
    """Return a linear resampling function's settings of separate z, None for others."""
    if not isinstance(resampling_fn, partial) or resampling_fn.args:
        return None
    given = resampling_fn.keywords
    if given.get("is_seg", False):
        return None
    threshold = {"separate_z_anisotropy_threshold": given.get("separate_z_anisotropy_threshold", ANISO_THRESHOLD)}
    if resampling_fn.func is resample_data_or_seg_to_shape:
        if given.get("order", 3) != 1 or given.get("order_z", 0) != 0:
            return None
        return {"force_separate_z": given.get("force_separate_z", False), **threshold}
    if _is_resampling_on_torch(resampling_fn.func):
        if given.get("mode", "linear") != "linear" or given.get("aniso_axis_mode", "nearest-exact") != "nearest-exact":
            return None
        return {"force_separate_z": given.get("force_separate_z"), **threshold}
    return None


def _is_resampling_on_torch(function: Callable) -> bool:
    """Recognize the function by its module, which is loaded if plans name it; importing it would load torch."""
    module = sys.modules.get("nnunetv2.preprocessing.resampling.resample_torch")
    return module is not None and function is module.resample_torch_fornnunet


def follows_default_rules(label_manager: LabelManager) -> bool:
    """Tell whether a voxel's label depends on its own logits alone.

    It does with the rules of LabelManager, which a subclass may replace.
    """
    rules = (
        "apply_inference_nonlin",
        "convert_logits_to_segmentation",
        "convert_probabilities_to_segmentation",
        "revert_cropping_on_probabilities",
    )
    return all(getattr(type(label_manager), rule) is getattr(LabelManager, rule) for rule in rules)


def write_labels(
    logits: np.ndarray, change: GridChange, label_manager: LabelManager, labels: np.ndarray, num_threads: int = 1
) -> None:
    """Resample logits `(c, *spatial)` and write each voxel's label into `labels`.

    `labels` has the new shape.
    """

    def write(band: Band) -> None:
        if label_manager.has_regions:
            slab = label_manager.convert_logits_to_segmentation(_resample_classes(logits, band, change))
        else:
            slab = _winners(logits, band, change)
        _put(slab, band, change, labels)

    _for_all_bands(write, logits, change, num_threads)


def write_labels_and_probabilities(
    logits: np.ndarray,
    change: GridChange,
    label_manager: LabelManager,
    labels: np.ndarray,
    probabilities: np.ndarray,
    num_threads: int = 1,
) -> None:
    """Resample logits and write labels `(*new)` and float32 probabilities `(c, *new)`."""

    def write(band: Band) -> None:
        slab = np.asarray(label_manager.apply_inference_nonlin(_resample_classes(logits, band, change)))
        _put(label_manager.convert_probabilities_to_segmentation(slab), band, change, labels)
        for class_slab, class_probabilities in zip(slab, probabilities):
            _put(class_slab, band, change, class_probabilities)

    _for_all_bands(write, logits, change, num_threads)


def _for_all_bands(write: Callable[[Band], None], logits: np.ndarray, change: GridChange, num_threads: int) -> None:
    rows = max(1, _SLAB_VOXELS // max(1, prod(change.linear_shape[1:])))
    bands = axis_bands(logits.shape[1], change.linear_shape[0], 1, np.dtype(np.float32), rows)
    if num_threads < 2 or len(bands) < 2:
        for band in bands:
            write(band)
        return
    with ThreadPoolExecutor(min(num_threads, len(bands)), thread_name_prefix="resample logits") as pool:
        for _ in pool.map(write, bands):
            pass


def _resample_slab(channel: np.ndarray, band: Band, change: GridChange) -> np.ndarray:
    """Interpolate one class `(z, y, x)` at the planes of a band; a fresh float32 array."""
    planes = channel[band.inputs].astype(np.float32)
    if band.weights is not None:
        planes = np.tensordot(band.weights, planes, axes=1)
    for axis, new in enumerate(change.linear_shape[1:], start=1):
        planes = resample_axis(planes, axis, new, order=1)
    return planes


def _resample_classes(logits: np.ndarray, band: Band, change: GridChange) -> np.ndarray:
    return np.stack([_resample_slab(channel, band, change) for channel in logits])


def _winners(logits: np.ndarray, band: Band, change: GridChange) -> np.ndarray:
    """Return the index of the largest logit of each voxel in a slab, the first one of equals."""
    best = _resample_slab(logits[0], band, change)
    winners = np.zeros(best.shape, dtype=np.uint8 if len(logits) <= 256 else np.uint16)
    for index, channel in enumerate(logits[1:], start=1):
        rival = _resample_slab(channel, band, change)
        np.copyto(winners, index, where=rival > best)
        np.maximum(best, rival, out=best)
    return winners


def _put(slab: Any, band: Band, change: GridChange, target: np.ndarray) -> None:
    """Write a slab of the linear grid to its place in the final one."""
    rows = band.outputs
    if change.nearest is not None and change.nearest_axis == 0:
        rows = slice(*np.searchsorted(change.nearest, (rows.start, rows.stop)))
        slab = slab.take(change.nearest[rows] - band.outputs.start, axis=0)
    elif change.nearest is not None:
        slab = slab.take(change.nearest, axis=change.nearest_axis)
    target[rows] = slab
