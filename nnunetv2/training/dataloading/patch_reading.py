"""Read a box of a case without reading the rest.

It may reach beyond the image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

OUTSIDE = -1
"""The label of voxels outside the image, until the transforms make them background."""


def read_box(
    array: np.ndarray, lower: Sequence[int], upper: Sequence[int], *, pad_value: float, dtype: type[np.generic]
) -> np.ndarray:
    """Cut a half-open box out of the last axes of an array.

    Everything outside the array is `pad_value`.

    A box that does not touch the array is 0, as `acvl_utils.crop_and_pad_nd` has it. Memory maps and
    `blosc2.NDArray` are read only where the box is.

    Returns:
        A new array of the given dtype that shares no memory with `array`.
    """
    num_leading = len(array.shape) - len(lower)
    leading, spatial = array.shape[:num_leading], array.shape[num_leading:]
    size = (*leading, *(high - low for low, high in zip(lower, upper)))
    first = [max(low, 0) for low in lower]
    last = [min(high, length) for high, length in zip(upper, spatial)]
    if not overlaps(lower, upper, spatial):
        return np.zeros(size, dtype)
    whole = (slice(None),) * num_leading
    inside = array[(*whole, *map(slice, first, last))]
    if inside.shape == size:
        # A slice of an array or a memory map is a view of it, which transforms would write into; blosc2's is fresh.
        inside = np.asarray(inside)
        return inside.astype(dtype, copy=not inside.flags.owndata)
    box = np.empty(size, dtype)
    filled = [slice(a - low, b - low) for a, b, low in zip(first, last, lower)]
    box[(*whole, *filled)] = inside
    for axis, part in enumerate(filled):
        box[(*whole, *(slice(None),) * axis, slice(0, part.start))] = pad_value
        box[(*whole, *(slice(None),) * axis, slice(part.stop, None))] = pad_value
    return box


def overlaps(lower: Sequence[int], upper: Sequence[int], shape: Sequence[int]) -> bool:
    """Tell whether a half-open box shares a voxel with an array."""
    return all(low < length and high > 0 for low, high, length in zip(lower, upper, shape))


def read_sample(
    data: np.ndarray, seg: np.ndarray, seg_prev: np.ndarray | None, lower: Sequence[int], upper: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Read a box of a case.

    Args:
        data: Image `(c, *spatial)`.
        seg: Labels `(1, *spatial)`.
        seg_prev: Labels of the previous stage of a cascade `(*spatial)`.

    Returns:
        The image, float32, with 0 outside, and the labels, int16, with -1 outside; the previous stage's are channel 1.
    """
    image = read_box(data, lower, upper, pad_value=0, dtype=np.float32)
    labels = read_box(seg, lower, upper, pad_value=OUTSIDE, dtype=np.int16)
    if seg_prev is not None:
        previous = read_box(seg_prev, lower, upper, pad_value=OUTSIDE, dtype=np.int16)
        labels = np.concatenate([labels, previous[None]])
    return torch.from_numpy(image), torch.from_numpy(labels)
