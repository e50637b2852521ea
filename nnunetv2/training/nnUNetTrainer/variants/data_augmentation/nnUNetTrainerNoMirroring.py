"""Trainers that mirror along fewer axes, in training and in inference."""
from __future__ import annotations

from collections.abc import Sequence

import torch

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import CUDA, nnUNetTrainer

AugmentationGeometry = tuple[tuple[float, float], bool, Sequence[int], "tuple[int, ...] | None"]


class nnUNetTrainerNoMirroring(nnUNetTrainer):
    """Do not mirror: left and right differ."""

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> AugmentationGeometry:
        """As in the default trainer, without mirroring."""
        rotation, dummy_2d, initial_patch_size, _ = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size())
        self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, initial_patch_size, None


class nnUNetTrainer_onlyMirror01(nnUNetTrainer):
    """Do not mirror along the last axis."""

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> AugmentationGeometry:
        """As in the default trainer, without the last mirror axis."""
        rotation, dummy_2d, initial_patch_size, _ = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size())
        mirror_axes = tuple(range(len(self.configuration_manager.patch_size) - 1))
        self.inference_allowed_mirroring_axes = mirror_axes
        return rotation, dummy_2d, initial_patch_size, mirror_axes


class nnUNetTrainer_onlyMirror01_1500ep(nnUNetTrainer_onlyMirror01):
    """Train for 1500 epochs and do not mirror along the last axis."""

    def __init__(self, plans: dict, configuration: str, fold: int | str, dataset_json: dict,
                 device: torch.device = CUDA):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 1500
