"""Resample images and label maps with torch: linear only, on any device.

Plans may name these functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from nnunetv2.configuration import ANISO_THRESHOLD
from nnunetv2.errors import InvalidInputError
from nnunetv2.preprocessing.resampling.default_resampling import determine_do_sep_z_and_axis

_CPU = torch.device("cpu")
# An interpolated indicator above this fraction decides at once; the remaining voxels go to the largest.
_CLEAR_MAJORITY = 0.7
# Half precision resolves large numbers as finely as small ones, but has few of them below 1.
_INDICATOR_SCALE = 1000


def resample_torch_simple(
    data: torch.Tensor | np.ndarray,
    new_shape: Sequence[int] | np.ndarray,
    is_seg: bool = False,
    num_threads: int = 4,
    device: torch.device = _CPU,
    memefficient_seg_resampling: bool = False,
    mode: str = "linear",
) -> torch.Tensor | np.ndarray:
    """Resample `(c, x, y, z)` or `(c, x, y)` data to a new spatial shape.

    Args:
        num_threads: Torch threads for this call.
        device: Where to compute. A tensor comes back to the device it came from.
        memefficient_seg_resampling: Hold one label's indicator at a time; a label needs more than half of a voxel,
            voxels that no label wins become 0.
        mode: Of `torch.nn.functional.interpolate`; "linear" fits the number of axes.

    Returns:
        Images as float32, labels as int8 or (from 127 on) int16; array or tensor as `data` was. `data` itself if it
        has that shape already.
    """
    new_shape = tuple(int(n) for n in new_shape)
    if tuple(data.shape[1:]) == new_shape:
        return data
    if mode == "linear":
        modes = {3: "bilinear", 4: "trilinear"}
        if data.ndim not in modes:
            raise InvalidInputError(f"expected data (c, x, y) or (c, x, y, z), got shape {tuple(data.shape)}")
        mode = modes[data.ndim]
    with torch.no_grad(), _threads(num_threads):
        tensor = torch.from_numpy(np.ascontiguousarray(data)) if isinstance(data, np.ndarray) else data
        origin = tensor.device
        tensor = tensor.to(device)
        if not is_seg:
            resampled = _interpolate(tensor.float(), new_shape, mode)
        elif memefficient_seg_resampling:
            resampled = _resample_labels_one_by_one(tensor, new_shape, mode)
        else:
            resampled = _resample_labels_together(tensor, new_shape, mode)
        return resampled.cpu().numpy() if isinstance(data, np.ndarray) else resampled.to(origin)


def resample_torch_fornnunet(
    data: torch.Tensor | np.ndarray,
    new_shape: Sequence[int] | np.ndarray,
    current_spacing: Sequence[float],
    new_spacing: Sequence[float],
    is_seg: bool = False,
    num_threads: int = 4,
    device: torch.device = _CPU,
    memefficient_seg_resampling: bool = False,
    force_separate_z: bool | None = None,
    separate_z_anisotropy_threshold: float = ANISO_THRESHOLD,
    mode: str = "linear",
    aniso_axis_mode: str = "nearest-exact",
) -> torch.Tensor | np.ndarray:
    """Resample `(c, x, y, z)` data as plans ask for it.

    Anisotropic data in plane first, then across slices.

    Args:
        force_separate_z: True, False, or None to decide by anisotropy, as in `determine_do_sep_z_and_axis`.
        mode: In plane, or in all axes at once.
        aniso_axis_mode: Across slices.

    See `resample_torch_simple` for the rest.
    """
    if data.ndim != 4:
        raise InvalidInputError(f"expected data (c, x, y, z), got shape {tuple(data.shape)}")
    new_shape = tuple(int(n) for n in new_shape)
    settings: dict[str, Any] = {
        "is_seg": is_seg,
        "num_threads": num_threads,
        "device": device,
        "memefficient_seg_resampling": memefficient_seg_resampling,
    }
    separate, axis = determine_do_sep_z_and_axis(
        force_separate_z, current_spacing, new_spacing, separate_z_anisotropy_threshold
    )
    if not separate:
        return resample_torch_simple(data, new_shape, mode=mode, **settings)
    assert axis is not None
    tensor = torch.from_numpy(np.ascontiguousarray(data)) if isinstance(data, np.ndarray) else data
    # Slices become channels, which no interpolation mixes.
    channels, slices = tensor.shape[0], tensor.shape[axis + 1]
    folded = tensor.movedim(axis + 1, 1).flatten(0, 1)
    plane_shape = [n for a, n in enumerate(new_shape) if a != axis]
    planes: Any = resample_torch_simple(folded, plane_shape, mode=mode, **settings)
    volume: Any = planes.unflatten(0, (channels, slices)).movedim(1, axis + 1)
    volume = resample_torch_simple(volume, new_shape, mode=aniso_axis_mode, **settings)
    return volume.cpu().numpy() if isinstance(data, np.ndarray) else volume


def _interpolate(tensor: torch.Tensor, new_shape: Sequence[int], mode: str) -> torch.Tensor:
    return functional.interpolate(tensor[None], new_shape, mode=mode, antialias=False)[0]


def _resample_labels_together(labels: torch.Tensor, new_shape: Sequence[int], mode: str) -> torch.Tensor:
    """Give each voxel to the last label with a clear majority there, else to the largest (on ties the smallest label).

    Holds the largest indicator so far, and not those of all labels.
    """
    present = torch.unique(labels)
    resampled = torch.zeros((labels.shape[0], *new_shape), dtype=_label_dtype(present), device=labels.device)
    decided = torch.zeros_like(resampled, dtype=torch.bool)
    largest = torch.full_like(resampled, -1, dtype=torch.float16)
    for label in present:
        indicator = _interpolate((labels == label).float() * _INDICATOR_SCALE, new_shape, mode).to(torch.float16)
        clear = indicator > _CLEAR_MAJORITY * _INDICATOR_SCALE
        larger = (indicator > largest) & ~decided
        torch.maximum(largest, indicator, out=largest)
        resampled[clear | larger] = label.to(resampled.dtype)
        decided |= clear
    return resampled


def _resample_labels_one_by_one(labels: torch.Tensor, new_shape: Sequence[int], mode: str) -> torch.Tensor:
    present = torch.unique(labels)
    resampled = torch.zeros((labels.shape[0], *new_shape), dtype=_label_dtype(present), device=labels.device)
    for label in present:
        if label != 0:  # zero is there already, and no two labels have more than half of a voxel
            resampled[_interpolate((labels == label).float(), new_shape, mode) > 0.5] = label.to(resampled.dtype)
    return resampled


def _label_dtype(present: torch.Tensor) -> torch.dtype:
    return torch.int8 if present.max() < 127 else torch.int16


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
