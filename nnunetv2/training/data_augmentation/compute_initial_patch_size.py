"""Compute the size to load for a patch that is rotated and scaled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Angle = float | tuple[float, float] | list[float]


def _largest_angle(angle: Angle) -> float:
    """Return the largest turn of a range in radians, at most a right angle: beyond that a box needs no more room."""
    return min(np.pi / 2, float(np.max(np.abs(angle))))


def _extent_after_turn(size: np.ndarray, first: int, second: int, angle: float) -> np.ndarray:
    """Turn the corner `size` of a box in the plane of two axes; return where it comes to lie, as absolute values."""
    turned = size.copy()
    cosine, sine = np.cos(angle), np.sin(angle)
    turned[first] = size[first] * cosine + size[second] * sine
    turned[second] = size[second] * cosine - size[first] * sine
    return np.abs(turned)


def get_patch_size(
    final_patch_size: Sequence[int], rot_x: Angle, rot_y: Angle, rot_z: Angle, scale_range: Sequence[float]
) -> np.ndarray:
    """Return the size of the patch to load, int, per axis.

    Args:
        final_patch_size: Size of the network's input, two or three axes.
        rot_x, rot_y, rot_z: Rotation about each axis in radians, a number or a range. In 2D only `rot_x` counts.
        scale_range: Range of the zoom; its smallest value asks for the most voxels.
    """
    size = np.asarray(final_patch_size, dtype=float)
    # Each rotation is considered alone. Their combination could need more, which has always been accepted.
    if len(size) == 3:
        candidates = [
            _extent_after_turn(size, 1, 2, _largest_angle(rot_x)),
            _extent_after_turn(size, 2, 0, _largest_angle(rot_y)),
            _extent_after_turn(size, 0, 1, _largest_angle(rot_z)),
        ]
    elif len(size) == 2:
        candidates = [_extent_after_turn(size, 0, 1, _largest_angle(rot_x))]
    else:
        raise ValueError(f"a patch has 2 or 3 axes, got {tuple(final_patch_size)}")
    return (np.max([size, *candidates], axis=0) / min(scale_range)).astype(int)
