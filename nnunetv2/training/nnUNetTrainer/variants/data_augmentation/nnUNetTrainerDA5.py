"""Trainers with a stronger augmentation: nnUNetTrainerDA5 and its relatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nnunetv2.training.data_augmentation.da5_transforms import SCALING, build_da5_transforms
from nnunetv2.training.data_augmentation.default_transforms import rotation_and_patch_size
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import Geometry, nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.settings import with_settings

if TYPE_CHECKING:
    from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms


class nnUNetTrainerDA5(nnUNetTrainer):
    """Augment more, and more often: see `build_da5_transforms`."""

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> Geometry:
        """As in the default trainer, with larger patches to load, as they are scaled more."""
        geometry = rotation_and_patch_size(self.configuration_manager.patch_size, scale_range=SCALING)
        self.print_to_log_file(f"do_dummy_2d_data_aug: {geometry.dummy_2d}")
        self.inference_allowed_mirroring_axes = geometry.mirror_axes
        return geometry.rotation, geometry.dummy_2d, geometry.initial_patch_size, geometry.mirror_axes

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
        """Return the strong augmentation with linear interpolation of images and labels."""
        return build_da5_transforms(
            patch_size,
            rotation_for_DA,
            deep_supervision_scales,
            mirror_axes,
            do_dummy_2d_data_aug,
            use_mask_for_norm=use_mask_for_norm,
            is_cascaded=is_cascaded,
            foreground_labels=foreground_labels,
            regions=regions,
            ignore_label=ignore_label,
        )


class nnUNetTrainerDA5ord0(nnUNetTrainerDA5):
    """Sample images and labels at the nearest voxel."""

    @staticmethod
    def get_training_transforms(*arguments: Any, **options: Any) -> ComposeTransforms:
        """As in nnUNetTrainerDA5, without interpolation."""
        return build_da5_transforms(*arguments, **options, mode_image="nearest", mode_seg="nearest")


class nnUNetTrainerDA5Segord0(nnUNetTrainerDA5):
    """Sample labels at the nearest voxel."""

    @staticmethod
    def get_training_transforms(*arguments: Any, **options: Any) -> ComposeTransforms:
        """As in nnUNetTrainerDA5, without interpolation of labels."""
        return build_da5_transforms(*arguments, **options, mode_seg="nearest")


@with_settings(num_epochs=10)
class nnUNetTrainerDA5_10epochs(nnUNetTrainerDA5):
    """Train for 10 epochs with strong augmentation."""
