"""Resample images and label maps to a new shape: the default functions that plans name.

Where voxels are much longer along one axis than along the others ("separate z"), interpolating across slices would
invent anatomy between them. The slices are then resampled in plane, and along the long axis by `order_z`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nnunetv2.configuration import ANISO_THRESHOLD
from nnunetv2.errors import InvalidInputError
from nnunetv2.preprocessing.resampling.label_resampling import resample_labels
from nnunetv2.preprocessing.resampling.separable import nearest_indices, resample_axis, resample_image

if TYPE_CHECKING:
    import torch

Spacing = Sequence[float] | np.ndarray
Shape = Sequence[int] | np.ndarray


def get_do_separate_z(spacing: Spacing, anisotropy_threshold: float = ANISO_THRESHOLD) -> bool:
    """Return whether a voxel's longest side exceeds the threshold times the shortest."""
    return bool(np.max(spacing) / np.min(spacing) > anisotropy_threshold)


def get_lowres_axis(new_spacing: Spacing) -> np.ndarray:
    """Return all axes along which voxels are longest."""
    return np.where(np.max(new_spacing) / np.asarray(new_spacing) == 1)[0]


def compute_new_shape(old_shape: Shape, old_spacing: Spacing, new_spacing: Spacing) -> np.ndarray:
    """Return how many voxels of `new_spacing` cover the image per axis.

    Rounded half to even, at least one.
    """
    # A slab that is thinner than half a voxel is still there.
    return np.array(
        [max(length, min(old, 1)) for length, old in zip(round_lengths(old_shape, old_spacing, new_spacing), old_shape)]
    )


def round_lengths(old_shape: Shape, old_spacing: Spacing, new_spacing: Spacing) -> list[int]:
    """Return how many voxels of `new_spacing` cover the image, rounded half to even, per axis.

    That may be none.

    Raises:
        InvalidInputError: The arguments differ in length.
    """
    if not len(old_shape) == len(old_spacing) == len(new_spacing):
        raise InvalidInputError(
            f"shape {tuple(old_shape)}, spacing {tuple(old_spacing)} and new spacing "
            f"{tuple(new_spacing)} must have the same length"
        )
    # This order of operations decides on which side of .5 a quotient falls.
    return [int(round(old / new * n)) for old, new, n in zip(old_spacing, new_spacing, old_shape)]


def determine_do_sep_z_and_axis(
    force_separate_z: bool | None,
    current_spacing: Spacing,
    new_spacing: Spacing,
    separate_z_anisotropy_threshold: float = ANISO_THRESHOLD,
) -> tuple[bool, int | None]:
    """Decide whether one axis is to be resampled on its own, and which.

    Args:
        force_separate_z: True takes the longest axis of `current_spacing`, False none. None lets the anisotropy decide,
            first of the current, then of the new spacing.

    Returns:
        (decision, axis or None). Two equally long axes mean no.
    """
    if force_separate_z is False:
        return False, None
    if force_separate_z or get_do_separate_z(current_spacing, separate_z_anisotropy_threshold):
        axes = get_lowres_axis(current_spacing)
    elif get_do_separate_z(new_spacing, separate_z_anisotropy_threshold):
        axes = get_lowres_axis(new_spacing)
    else:
        return False, None
    return (True, int(axes[0])) if len(axes) == 1 else (False, None)


def resample_data_or_seg_to_spacing(
    data: np.ndarray,
    current_spacing: Spacing,
    new_spacing: Spacing,
    is_seg: bool = False,
    order: int = 3,
    order_z: int = 0,
    force_separate_z: bool | None = False,
    separate_z_anisotropy_threshold: float = ANISO_THRESHOLD,
) -> np.ndarray:
    """Resample `(c, x, y, z)` data to the shape that `new_spacing` gives it. See `resample_data_or_seg`."""
    new_shape = compute_new_shape(np.shape(data)[1:], current_spacing, new_spacing)
    return resample_data_or_seg_to_shape(
        data,
        new_shape,
        current_spacing,
        new_spacing,
        is_seg,
        order,
        order_z,
        force_separate_z,
        separate_z_anisotropy_threshold,
    )


def resample_data_or_seg_to_shape(
    data: np.ndarray | torch.Tensor,
    new_shape: Shape,
    current_spacing: Spacing,
    new_spacing: Spacing,
    is_seg: bool = False,
    order: int = 3,
    order_z: int = 0,
    force_separate_z: bool | None = False,
    separate_z_anisotropy_threshold: float = ANISO_THRESHOLD,
) -> np.ndarray:
    """Resample `(c, x, y, z)` data to a shape.

    The spacings only decide whether one axis is resampled on its own.

    A tensor becomes an array. See `resample_data_or_seg` for the rest.
    """
    data = _to_numpy(data)
    do_separate_z, axis = determine_do_sep_z_and_axis(
        force_separate_z, current_spacing, new_spacing, separate_z_anisotropy_threshold
    )
    return resample_data_or_seg(data, new_shape, is_seg, axis, order, do_separate_z, order_z)


def resample_data_or_seg(
    data: np.ndarray,
    new_shape: Shape,
    is_seg: bool = False,
    axis: int | None = None,
    order: int = 3,
    do_separate_z: bool = False,
    order_z: int = 0,
    dtype_out: np.dtype | type | None = None,
) -> np.ndarray:
    """Resample `(c, x, y, z)` data to a new spatial shape, channel by channel.

    Images are interpolated by splines and clipped to the range of their channel (of their slice, with separate z).
    Labels follow the rule of `label_resampling`.

    Args:
        axis: The axis resampled on its own if `do_separate_z`, counted without the channel axis.
        order: Spline order 0 to 5, in plane with separate z.
        order_z: Spline order along `axis`; 0 repeats or drops slices.
        dtype_out: Default: the dtype of `data`.

    Returns:
        A new array, or `data` itself if it has that shape already.
    """
    new_shape = tuple(int(n) for n in new_shape)
    if data.ndim != 4 or len(new_shape) != 3:
        raise InvalidInputError(f"expected data (c, x, y, z) and three new sizes, got {data.shape} and {new_shape}")
    if do_separate_z and axis is None:
        raise InvalidInputError("separate z needs to know the axis")
    if data.shape[1:] == new_shape:
        return data
    resampled = np.empty((len(data), *new_shape), dtype_out or data.dtype)
    for channel, out in zip(data, resampled):
        if do_separate_z:
            # Views with the long axis in front: slices come one after the other.
            to_front, out_to_front = np.moveaxis(channel, axis, 0), np.moveaxis(out, axis, 0)
            _resample_slices(to_front, is_seg, order, order_z, out_to_front)
        elif is_seg:
            out[...] = resample_labels(channel, new_shape, order)
        else:
            resample_image(channel, new_shape, order, out)
    return resampled


def _resample_slices(slices: np.ndarray, is_seg: bool, order: int, order_z: int, out: np.ndarray) -> None:
    """Resample slices `(n, y, x)` in plane, then across, into `out`."""
    old, new = len(slices), len(out)
    if order_z == 0 or old == new:
        sources = nearest_indices(old, new)
        for source in np.unique(sources):  # slices that are dropped cost nothing
            copies = np.flatnonzero(sources == source)
            _resample_plane(slices[source], is_seg, order, out[copies[0]])
            out[copies[1:]] = out[copies[0]]
        return
    planes = np.empty((old, *out.shape[1:]), slices.dtype if is_seg else np.result_type(slices.dtype, np.float32))
    for plane, source in zip(planes, slices):
        _resample_plane(source, is_seg, order, plane)
    if is_seg:
        _stretch_labels(planes, order_z, out)
    else:
        out[...] = resample_axis(planes, 0, new, order_z)


def _resample_plane(plane: np.ndarray, is_seg: bool, order: int, out: np.ndarray) -> None:
    plane = np.ascontiguousarray(plane)
    if is_seg:
        out[...] = resample_labels(plane, out.shape, order)
    else:
        resample_image(plane, out.shape, order, out)


def _stretch_labels(planes: np.ndarray, order: int, out: np.ndarray) -> None:
    """Resample labels across slices: ascending, each takes the voxels where its indicator exceeds one half."""
    out[...] = 0
    for label in np.unique(planes):
        indicator = resample_axis((planes == label).astype(np.float64), 0, len(out), order)
        out[indicator > 0.5] = label


def _to_numpy(data: np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(data, np.ndarray):
        return data
    data = data.detach().cpu()
    # NumPy has no bfloat16
    return (data.float() if str(data.dtype) == "torch.bfloat16" else data).numpy()
