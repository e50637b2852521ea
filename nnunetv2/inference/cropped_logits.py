"""Resample each class's logits only near where it was predicted.

For models with very many classes.

Background is resampled as the plans say. A foreground class is interpolated linearly inside the box around its own
low-resolution prediction, a few voxels wider, and wins where its logit exceeds all before it. A class can therefore not
appear at full resolution far from where it was predicted at low resolution, which is the price of the speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import ceil, floor

import numpy as np

from nnunetv2.plans.label_manager import LabelManager
from nnunetv2.preprocessing.resampling.separable import sample_positions

_MARGIN_VOXELS = 3

Box = tuple[slice, ...]


def write_labels_near_predictions(
    logits: np.ndarray,
    new_shape: Sequence[int],
    current_spacing: Sequence[float],
    new_spacing: Sequence[float],
    resampling_fn: Callable,
    label_manager: LabelManager,
    labels: np.ndarray,
) -> None:
    """Write the label of each voxel into `labels`, an array of zeros of `new_shape`.

    Args:
        logits: `(c, z, y, x)`.
        resampling_fn: The function that the plans name for probabilities; used for background.
    """
    if label_manager.has_regions:
        for channel, label in zip(logits, label_manager.regions_class_order):
            for box, values in _near(channel, channel > 0, new_shape):
                np.copyto(labels[box], label, where=values > 0)
        return
    best = np.array(resampling_fn(logits[:1], new_shape, current_spacing, new_spacing)[0], dtype=np.float32)
    winners = logits.argmax(0)
    for label in np.unique(winners[winners > 0]).tolist():
        for box, values in _near(logits[label], winners == label, new_shape):
            wins = values > best[box]
            np.copyto(labels[box], label, where=wins)
            np.copyto(best[box], values, where=wins)


def _near(channel: np.ndarray, predicted: np.ndarray, new_shape: Sequence[int]) -> Iterator[tuple[Box, np.ndarray]]:
    """Yield the box of the new grid around a prediction, with the channel interpolated in it; nothing if empty."""
    if not predicted.any():
        return
    box = tuple(
        _scaled_range(predicted.any(axis=tuple(other for other in range(3) if other != axis)), new)
        for axis, new in enumerate(new_shape)
    )
    yield box, _interpolate(channel, box, new_shape)


def _scaled_range(occupied: np.ndarray, new: int) -> slice:
    """Return the range of the new axis that covers the occupied positions of the old one and a margin."""
    positions, old = np.flatnonzero(occupied), len(occupied)
    low, high = max(0, positions[0] - _MARGIN_VOXELS), min(old, positions[-1] + 1 + _MARGIN_VOXELS)
    return slice(floor(low * (new / old)), min(new, ceil(high * (new / old))))


def _interpolate(channel: np.ndarray, box: Box, new_shape: Sequence[int]) -> np.ndarray:
    """Interpolate linearly at the voxels of a box of the new grid, repeating edge voxels; float32."""
    values = channel
    for axis, (part, new) in enumerate(zip(box, new_shape)):
        old = values.shape[axis]
        positions = np.clip(sample_positions(old, new)[part], 0, old - 1)
        lower = positions.astype(np.intp)
        shape = [-1 if i == axis else 1 for i in range(3)]
        share = (positions - lower).astype(np.float32).reshape(shape)
        below = values.take(lower, axis=axis).astype(np.float32)
        above = values.take(np.minimum(lower + 1, old - 1), axis=axis).astype(np.float32)
        values = below + share * (above - below)
    return values
