"""Rotate and scale image and label patches, several times faster.

The library's transform serves where it is not affine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nnunetv2.training.data_augmentation.affine_sampling import AffineGrid, centred_grid, sample_images
from nnunetv2.training.data_augmentation.label_sampling import sample_labels
from nnunetv2.training.data_augmentation.late_imports import importing_late

with importing_late("pandas", "scipy.ndimage"):
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

SIGNED_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


class BoundarySpatialTransform(SpatialTransform):
    """Transform patches as `SpatialTransform` does, in a fraction of the time.

    The same random numbers give the same patches.

    The time does not grow with the number of labels, as only the boundaries between them are interpolated. Elastic
    deformation, and other settings than linear interpolation with constant padding, are left to the library.

    `apply` takes the result of `get_parameters`. Two more parameters, `source_shape` and `source_start`, tell that the
    image and the labels are but a box of a larger patch, the part that `needed_box` asks for.
    """

    def get_parameters(self, **data_dict) -> dict:
        """Draw the transform from NumPy's global generator.

        `grid` stays None where the affine matrix says it all.
        """
        parameters = super().get_parameters(**data_dict)
        return {**parameters, "grid": None} if self._is_affine() else parameters

    def _get_base_grid_clone(self) -> Tensor:
        """Return the points that the library turns and scales: a single one where nobody looks at them."""
        if not self._is_affine():
            return super()._get_base_grid_clone()
        num_axes = len(self.patch_size)
        return torch.zeros((1,) * num_axes + (num_axes,))

    def _is_affine(self) -> bool:
        return (
            self.p_elastic_deform == 0
            and self.mode_image == "bilinear"
            and (
                self.padding_mode_image == "zeros"
                or (self.padding_mode_image == "constant" and self.padding_value_image == 0)
            )
            and self.mode_seg == "bilinear"
            and self.border_mode_seg in ("zeros", "constant")
            and getattr(self, "seg_tiebreak", "nearest") == "nearest"
            and not self.align_corners
        )

    def affine_grid(self, parameters: dict) -> AffineGrid | None:
        """Return the sampling grid of a patch.

        None if it is cropped, or transformed by the library.
        """
        if parameters["affine"] is None or parameters["grid"] is not None:
            return None
        return centred_grid(parameters["affine"], parameters["center_location_in_pixels"], self.patch_size)

    def _apply_to_image(self, img: Tensor, **params) -> Tensor:
        grid = self.affine_grid(params)
        if grid is None:
            return super()._apply_to_image(img, **params)
        start = params.get("source_start", (0,) * len(grid.patch))
        return torch.from_numpy(sample_images(img.numpy(), grid.seen_from(start)))

    def _apply_to_segmentation(self, segmentation: Tensor, **params) -> Tensor:
        grid = self.affine_grid(params)
        if grid is None:
            return super()._apply_to_segmentation(segmentation, **params)
        if segmentation.dtype not in SIGNED_INTEGERS:
            return self._apply_to_segmentation(segmentation.long(), **params).to(segmentation.dtype)
        padding_label = int(self.padding_value_seg) if self.border_mode_seg == "constant" else 0
        shape = params.get("source_shape", segmentation.shape[1:])
        start = params.get("source_start", (0,) * len(shape))
        return torch.from_numpy(sample_labels(segmentation.numpy(), grid, padding_label, start=start, shape=shape))


def needed_box(grid: AffineGrid, shape: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the box of a patch that sampling at the grid needs.

    It is half-open and not empty.
    """
    lower, upper = grid.cells()
    lower = np.clip(lower, 0, np.array(shape) - 1)
    upper = np.clip(upper, lower + 1, shape)
    return lower.tolist(), upper.tolist()
