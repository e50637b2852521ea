"""Trainers that turn and scale label maps by taking the nearest voxel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

from nnunetv2.training.data_augmentation.spatial import SpatialTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainer_DASegOrd0(nnUNetTrainer):
    """Sample labels at the nearest voxel.

    Imitate mistakes of a previous stage in all labels, not in every other.
    """

    @staticmethod
    def get_training_transforms(
        patch_size: Sequence[int],
        rotation_for_DA: Any,
        deep_supervision_scales: Sequence | None,
        mirror_axes: tuple[int, ...] | None,
        do_dummy_2d_data_aug: bool,
        use_mask_for_norm: Sequence[bool] | None = None,
        is_cascaded: bool = False,
        foreground_labels: Sequence[int] | None = None,
        regions: Sequence | None = None,
        ignore_label: int | None = None,
    ) -> ComposeTransforms:
        """Return the default augmentation with these changes."""
        pipeline = nnUNetTrainer.get_training_transforms(
            patch_size,
            rotation_for_DA,
            deep_supervision_scales,
            mirror_axes,
            do_dummy_2d_data_aug,
            use_mask_for_norm,
            is_cascaded,
            foreground_labels,
            regions,
            ignore_label,
        )
        for transform in pipeline.transforms:
            transform = getattr(transform, "transform", transform)
            if isinstance(transform, SpatialTransform):
                transform.mode_seg = "nearest"
            elif hasattr(transform, "p_per_label"):  # imitates mistakes of the previous stage
                transform.p_per_label = 1
        return pipeline


class nnUNetTrainer_DASegOrd0_NoMirroring(nnUNetTrainer_DASegOrd0):
    """Sample labels at the nearest voxel, and do not mirror."""

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(
        self,
    ) -> tuple[tuple[float, float], bool, Sequence[int], None]:
        """As in the default trainer, without mirroring."""
        rotation, dummy_2d, initial_patch_size, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, initial_patch_size, None
