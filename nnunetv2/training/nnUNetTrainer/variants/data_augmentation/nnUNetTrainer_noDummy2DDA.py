"""A trainer that turns thin patches in all directions."""

from __future__ import annotations

from nnunetv2.training.data_augmentation.default_transforms import rotation_and_patch_size
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import Geometry, nnUNetTrainer


class nnUNetTrainer_noDummy2DDA(nnUNetTrainer):
    """Turn all 3D patches by up to 30 degrees about each axis, also thin ones.

    Never augment slice by slice.
    """

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> Geometry:
        """Decide as the default trainer does for patches that are not thin."""
        geometry = rotation_and_patch_size(self.configuration_manager.patch_size, allow_dummy_2d=False)
        self.print_to_log_file(f"do_dummy_2d_data_aug: {geometry.dummy_2d}")
        self.inference_allowed_mirroring_axes = geometry.mirror_axes
        return geometry.rotation, geometry.dummy_2d, geometry.initial_patch_size, geometry.mirror_axes
