"""Make a target for each resolution of a network with deep supervision."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from batchgenerators.augmentations.utils import resize_segmentation
from batchgenerators.transforms.abstract_transforms import AbstractTransform


class DownsampleSegForDSTransform2(AbstractTransform):
    """Replace labels `(b, c, *spatial)` by a list of them, one per scale.

    Args:
        ds_scales: Size of each as a share of the original, a number or one per axis.
        order: Order of the spline that each label's indicator is interpolated with; 0 is nearest neighbour.
        axes: Axes that are scaled; all spatial ones if None.
    """

    def __init__(
        self,
        ds_scales: Sequence[float | Sequence[float]],
        order: int = 0,
        input_key: str = "seg",
        output_key: str = "seg",
        axes: Sequence[int] | None = None,
    ) -> None:
        self.ds_scales = ds_scales
        self.order = order
        self.input_key = input_key
        self.output_key = output_key
        self.axes = axes

    def __call__(self, **data_dict) -> dict:
        labels = data_dict[self.input_key]
        data_dict[self.output_key] = [self._resize(labels, scale) for scale in self.ds_scales]
        return data_dict

    def _resize(self, labels: np.ndarray, scale: float | Sequence[float]) -> np.ndarray:
        axes = list(range(2, labels.ndim)) if self.axes is None else list(self.axes)
        factors = list(scale) if isinstance(scale, Iterable) else [scale] * len(axes)
        if len(factors) != len(axes):
            raise ValueError(f"scale {scale} has {len(factors)} entries for {len(axes)} axes")
        if all(factor == 1 for factor in factors):
            return labels
        shape = list(labels.shape)
        for axis, factor in zip(axes, factors):
            shape[axis] = round(shape[axis] * factor)
        resized = np.empty(shape, labels.dtype)
        for sample, channel in np.ndindex(*labels.shape[:2]):
            resized[sample, channel] = resize_segmentation(labels[sample, channel], shape[2:], self.order)
        return resized
