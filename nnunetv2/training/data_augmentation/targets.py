"""Turn augmented labels into targets: the library's transforms, with fewer passes over the labels.

They are subclasses, so code that looks for the library's classes in a pipeline finds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform
from torch import Tensor


class FastRemoveLabelTransform(RemoveLabelTansform):
    """Give the voxels of one label another one.

    The labels are changed in place, as in the library.
    """

    def _apply_to_segmentation(self, segmentation: Tensor, **params) -> Tensor:
        channels = range(len(segmentation)) if self.segmentation_channels is None else self.segmentation_channels
        for channel in channels:
            labels = segmentation[channel].numpy()
            # Adding a difference passes over memory once, without branches; assigning where a mask is set does not.
            labels += (labels == self.label_value) * labels.dtype.type(self.set_to - self.label_value)
        return segmentation


class FastMaskImageTransform(MaskImageTransform):
    """Set voxels outside the image's own content to a fixed value."""

    def apply(self, data_dict: dict, **params) -> dict:
        """Change the image in place where a channel of the labels is negative."""
        if len(self.apply_to_channels) == 0:
            return data_dict
        labels = data_dict["segmentation"][self.channel_idx_in_seg]
        if labels.amin() >= 0:
            return data_dict
        is_outside = labels.numpy() < 0
        for channel in self.apply_to_channels:
            np.copyto(data_dict["image"][channel].numpy(), self.set_outside_to, where=is_outside)
        return data_dict


class StridedDownsampleTransform(DownsampleSegForDSTransform):
    """Make a target per resolution by picking voxels, those that nearest-neighbour interpolation picks."""

    def _apply_to_segmentation(self, segmentation: Tensor, **params) -> list[Tensor]:
        return [self._pick(segmentation, scale) for scale in self.ds_scales]

    @staticmethod
    def _pick(segmentation: Tensor, scale: float | Sequence[float]) -> Tensor:
        num_axes = segmentation.ndim - 1
        factors = list(scale) if isinstance(scale, (tuple, list, np.ndarray)) else [scale] * num_axes
        if len(factors) != num_axes:
            raise ValueError(f"scale {scale} has {len(factors)} entries for {num_axes} axes")
        picked = segmentation
        for axis, factor in enumerate(factors, 1):
            length = segmentation.shape[axis]
            if factor != 1:
                picked = _take(picked, axis, _choose_voxels(length, round(length * factor)))
        return picked if picked is segmentation else picked.contiguous()


def nearest_voxels(length: int, new_length: int) -> np.ndarray:
    """Return which of `length` voxels are nearest to the centres of `new_length` larger ones.

    Rounded in float32, as torch rounds for the mode nearest-exact.
    """
    step = np.float32(length / new_length)
    indices = np.floor((np.arange(new_length, dtype=np.float32) + np.float32(0.5)) * step).astype(int)
    return np.minimum(indices, length - 1)


@lru_cache(maxsize=1024)
def _choose_voxels(length: int, new_length: int) -> slice | Tensor:
    """Return the nearest voxels as a slice where they are equally far apart, else as a list of indices."""
    indices = nearest_voxels(length, new_length)
    steps = np.diff(indices)
    if len(steps) > 0 and (steps == steps[0]).all() and steps[0] > 0:
        return slice(int(indices[0]), int(indices[-1]) + 1, int(steps[0]))
    return torch.from_numpy(indices)


def _take(labels: Tensor, axis: int, voxels: slice | Tensor) -> Tensor:
    """Return some voxels along an axis; a view if they are a slice."""
    if isinstance(voxels, slice):
        return labels[(slice(None),) * axis + (voxels,)]
    return labels.index_select(axis, voxels)
