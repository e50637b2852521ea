"""Cut an image down to the box that holds anything but zeros."""

from __future__ import annotations

import numpy as np

from nnunetv2.errors import InvalidInputError

BoundingBox = list[list[int]]
"""`[start, end)` for each spatial axis."""


def create_nonzero_mask(data: np.ndarray) -> np.ndarray:
    """Mark voxels where any channel differs from 0, and the holes that these enclose.

    Args:
        data: `(c, y, x)` or `(c, x, y, z)`.

    Returns:
        Boolean array of the spatial shape.
    """
    mask = _any_channel_nonzero(data)
    box = _as_slices(_find_box(mask))
    mask[box] = _fill_holes(mask[box])
    return mask


def crop_to_nonzero(
    data: np.ndarray, seg: np.ndarray | None = None, nonzero_label: int = -1
) -> tuple[np.ndarray, np.ndarray, BoundingBox]:
    """Crop to the smallest box around all voxels that are not zero.

    Voxels of the box outside of the nonzero mask are marked in `seg`.

    Args:
        data: Images `(c, x, y, z)`. An image of zeros only keeps its extent.
        seg: Labels `(1, x, y, z)`; not changed.
        nonzero_label: Given to voxels of `seg` that are 0 and outside the non-zero mask (holes filled).

    Returns:
        (view of `data`, new array `seg`, box). Without a segmentation, `seg` is an int8 map, 0 inside and
        `nonzero_label` outside.
    """
    mask = _any_channel_nonzero(data)
    bbox = _find_box(mask)
    box = _as_slices(bbox)
    outside = ~_fill_holes(mask[box])
    if seg is None:
        seg = np.zeros((1, *outside.shape), np.int8)
        seg[0, outside] = nonzero_label
    else:
        if seg.shape[1:] != data.shape[1:]:
            raise InvalidInputError(f"image and segmentation differ in shape: {data.shape[1:]} and {seg.shape[1:]}")
        seg = seg[(slice(None), *box)].copy()
        seg[(seg == 0) & outside] = nonzero_label
    return data[(slice(None), *box)], seg, bbox


def _any_channel_nonzero(data: np.ndarray) -> np.ndarray:
    if data.ndim not in (3, 4):
        raise InvalidInputError(f"expected an image (c, x, y, z) or (c, y, x), got shape {data.shape}")
    mask = data[0] != 0
    for channel in data[1:]:
        mask |= channel != 0
    return mask


def _find_box(mask: np.ndarray) -> BoundingBox:
    """Return the tight box around all True voxels, or the full extent if there is none."""
    bbox = []
    for axis in range(mask.ndim):
        used = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        bbox.append([int(used[0]), int(used[-1]) + 1] if used.size else [0, mask.shape[axis]])
    return bbox


def _fill_holes(mask: np.ndarray) -> np.ndarray:
    """Fill holes of a mask that was cropped tightly: cropping opens no hole, for a hole never touches its box."""
    if mask.all():
        return mask
    from scipy.ndimage import binary_fill_holes

    return binary_fill_holes(mask)


def _as_slices(bbox: BoundingBox) -> tuple[slice, ...]:
    return tuple(slice(start, end) for start, end in bbox)
