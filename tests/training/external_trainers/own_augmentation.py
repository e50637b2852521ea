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
    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device("cuda")):  # noqa: B008
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 2
        self.num_iterations_per_epoch = self.num_val_iterations_per_epoch = 2

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        rotation_for_DA, do_dummy_2d_data_aug, initial_patch_size, mirror_axes = \
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        mirror_axes = (0,)
        self.inference_allowed_mirroring_axes = (0,)
        return rotation_for_DA, do_dummy_2d_data_aug, initial_patch_size, mirror_axes

    @staticmethod
    def get_training_transforms(patch_size: Union[np.ndarray, Tuple[int]],  # noqa: UP006, UP007
                                rotation_for_DA, deep_supervision_scales: Union[List, Tuple, None],  # noqa: UP006, UP007
                                mirror_axes, do_dummy_2d_data_aug: bool, use_mask_for_norm=None,
                                is_cascaded: bool = False, foreground_labels=None, regions=None,
                                ignore_label: int = None) -> BasicTransform:
        transforms = []
        if do_dummy_2d_data_aug:
            ignore_axes = (0,)
            transforms.append(Convert3DTo2DTransform())
            patch_size_spatial = patch_size[1:]
        else:
            patch_size_spatial = patch_size
            ignore_axes = None
        transforms.append(SpatialTransform(
            patch_size_spatial, patch_center_dist_from_border=0, random_crop=False, p_elastic_deform=0.5,
            p_rotation=0.2, rotation=rotation_for_DA, p_scaling=0.2, scaling=(0.7, 1.4),
            p_synchronize_scaling_across_axes=1, bg_style_seg_sampling=False))
        if do_dummy_2d_data_aug:
            transforms.append(Convert2DTo3DTransform())
        transforms.append(RandomTransform(GaussianNoiseTransform(
            noise_variance=(0, 0.1), p_per_channel=1, synchronize_channels=True), apply_probability=0.1))
        transforms.append(RandomTransform(ContrastTransform(
            contrast_range=BGContrast((0.75, 1.25)), preserve_range=True, synchronize_channels=False,
            p_per_channel=1), apply_probability=0.15))
        if mirror_axes is not None and len(mirror_axes) > 0:
            transforms.append(MirrorTransform(allowed_axes=mirror_axes))
        if use_mask_for_norm is not None and any(use_mask_for_norm):
            transforms.append(MaskImageTransform(
                apply_to_channels=[i for i in range(len(use_mask_for_norm)) if use_mask_for_norm[i]],
                channel_idx_in_seg=0, set_outside_to=0))
        transforms.append(RemoveLabelTansform(-1, 0))
        if deep_supervision_scales is not None:
            transforms.append(DownsampleSegForDSTransform(ds_scales=deep_supervision_scales))
        assert ignore_axes is None or ignore_axes == (0,)
        return ComposeTransforms(transforms)


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
