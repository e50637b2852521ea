"""An augmentation written as a copy of the default one, with names imported from the module of the trainer."""

from typing import List, Tuple, Union  # noqa: UP035

import numpy as np
import torch

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import (
    BasicTransform,
    BGContrast,
    ComposeTransforms,
    ContrastTransform,
    Convert2DTo3DTransform,
    Convert3DTo2DTransform,
    DownsampleSegForDSTransform,
    GaussianNoiseTransform,
    MaskImageTransform,
    MirrorTransform,
    RandomTransform,
    RemoveLabelTansform,
    SpatialTransform,
    nnUNetTrainer,
)


class nnUNetTrainerElastic(nnUNetTrainer):
    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 2
        self.num_iterations_per_epoch = self.num_val_iterations_per_epoch = 2

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        rotation_for_DA, do_dummy_2d_data_aug, initial_patch_size, mirror_axes = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        mirror_axes = (0,)
        self.inference_allowed_mirroring_axes = (0,)
        return rotation_for_DA, do_dummy_2d_data_aug, initial_patch_size, mirror_axes

    @staticmethod
    def get_training_transforms(
        patch_size: Union[np.ndarray, Tuple[int]],  # noqa: UP006, UP007
        rotation_for_DA,
        deep_supervision_scales: Union[List, Tuple, None],  # noqa: UP006, UP007
        mirror_axes,
        do_dummy_2d_data_aug: bool,
        use_mask_for_norm=None,
        is_cascaded: bool = False,
        foreground_labels=None,
        regions=None,
        ignore_label: int | None = None,
    ) -> BasicTransform:
        spatial = SpatialTransform(
            patch_size[1:] if do_dummy_2d_data_aug else patch_size,
            0,
            False,
            p_elastic_deform=0.5,
            p_rotation=0.2,
            rotation=rotation_for_DA,
            p_scaling=0.2,
            scaling=(0.7, 1.4),
            p_synchronize_scaling_across_axes=1,
        )
        steps = [Convert3DTo2DTransform(), spatial, Convert2DTo3DTransform()] if do_dummy_2d_data_aug else [spatial]
        steps.append(RandomTransform(GaussianNoiseTransform((0, 0.1), 1, True), 0.1))
        steps.append(RandomTransform(ContrastTransform(BGContrast((0.75, 1.25)), True, False, 1), 0.15))
        if mirror_axes:
            steps.append(MirrorTransform(mirror_axes))
        if use_mask_for_norm is not None and any(use_mask_for_norm):
            steps.append(MaskImageTransform([c for c, masked in enumerate(use_mask_for_norm) if masked], 0, 0))
        steps.append(RemoveLabelTansform(-1, 0))
        if deep_supervision_scales is not None:
            steps.append(DownsampleSegForDSTransform(deep_supervision_scales))
        return ComposeTransforms(steps)


class nnUNetTrainerEditedList(nnUNetTrainerElastic):
    """Edits the list of the default augmentation instead."""

    @staticmethod
    def get_training_transforms(*args, **kwargs):
        tr_transforms = nnUNetTrainer.get_training_transforms(*args, **kwargs)
        for i, t in enumerate(tr_transforms.transforms):
            if isinstance(t, RandomTransform) and isinstance(t.transform, GaussianNoiseTransform):
                t.apply_probability = 1.0
            if isinstance(t, SpatialTransform):
                tr_transforms.transforms[i].p_rotation = 1.0
        return tr_transforms
