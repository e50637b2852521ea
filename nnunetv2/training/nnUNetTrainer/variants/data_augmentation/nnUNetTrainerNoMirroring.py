"""Trainers that mirror along fewer axes, in training and in inference."""

from __future__ import annotations

from collections.abc import Sequence

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.settings import with_settings
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerDAOrd0 import nnUNetTrainer_DASegOrd0

AugmentationGeometry = tuple[tuple[float, float], bool, Sequence[int], "tuple[int, ...] | None"]


class nnUNetTrainerNoMirroring(nnUNetTrainer):
    """Do not mirror: left and right differ."""

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> AugmentationGeometry:
        """As in the default trainer, without mirroring."""
        rotation, dummy_2d, initial_patch_size, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, initial_patch_size, None


class nnUNetTrainer_onlyMirror01(nnUNetTrainer):
    """Do not mirror along the last axis."""

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> AugmentationGeometry:
        """As in the default trainer, without the last mirror axis."""
        rotation, dummy_2d, initial_patch_size, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        mirror_axes = tuple(range(len(self.configuration_manager.patch_size) - 1))
        self.inference_allowed_mirroring_axes = mirror_axes
        return rotation, dummy_2d, initial_patch_size, mirror_axes


@with_settings(num_epochs=1500)
class nnUNetTrainer_onlyMirror01_1500ep(nnUNetTrainer_onlyMirror01):
    """Train for 1500 epochs and do not mirror along the last axis."""


class nnUNetTrainer_onlyMirror01_DASegOrd0(nnUNetTrainer_onlyMirror01):
    """Sample labels at the nearest voxel, and do not mirror along the last axis."""

    get_training_transforms = staticmethod(nnUNetTrainer_DASegOrd0.get_training_transforms)
