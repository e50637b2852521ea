"""Build the default augmentation of training and validation patches.

Transforms take and return a dict with `image` `(c, *spatial)` float32 and `segmentation` `(c, *spatial)`, one sample at
a time. Their order matters: -1 marks voxels outside the image until they are masked and become background.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from batchgeneratorsv2.helpers.scalar_type import RandomScalar
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.nnunet.seg_to_onehot import MoveSegAsOneHotToDataTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform

from nnunetv2.configuration import ANISO_THRESHOLD
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.data_augmentation.intensity import FastGammaTransform, SeparableBlurTransform
from nnunetv2.training.data_augmentation.spatial import BoundarySpatialTransform
from nnunetv2.training.data_augmentation.targets import (
    FastMaskImageTransform,
    FastRemoveLabelTransform,
    StridedDownsampleTransform,
)

Regions = Sequence[int | Sequence[int]]
DeepSupervisionScales = Sequence[Sequence[float] | float]

SCALE_RANGE_FOR_PATCH_SIZE = (0.85, 1.25)
ELONGATED_2D_PATCH = 1.5


class PatchGeometry(NamedTuple):
    """Sizes and rotations of patches, in the order of the trainer's hook."""

    rotation: tuple[float, float]
    """Range of rotations about each axis, in radians."""
    dummy_2d: bool
    """Turn and scale within slices only: across them the patch is too thin."""
    initial_patch_size: np.ndarray
    """The size to load, int, so that a turned patch lies within it."""
    mirror_axes: tuple[int, ...]
    """Spatial axes along which patches are mirrored."""


def rotation_and_patch_size(
    patch_size: Sequence[int],
    *,
    scale_range: tuple[float, float] = SCALE_RANGE_FOR_PATCH_SIZE,
    allow_dummy_2d: bool = True,
) -> PatchGeometry:
    """Choose rotations and the size to load from the shape of patches.

    Patches have 2 or 3 axes.

    Args:
        scale_range: Zoom that the loaded patch allows for.
        allow_dummy_2d: Treat thin patches slice by slice; otherwise all 3D patches are turned by up to 30 degrees.
    """
    dummy_2d = len(patch_size) == 3 and allow_dummy_2d and max(patch_size) / patch_size[0] > ANISO_THRESHOLD
    if len(patch_size) == 2:
        degrees = 15 if max(patch_size) / min(patch_size) > ELONGATED_2D_PATCH else 180
    else:
        degrees = 180 if dummy_2d else 30
    angle = degrees / 180 * np.pi
    rotation = (-angle, angle)
    initial_patch_size = get_patch_size(patch_size, rotation, rotation, rotation, scale_range)
    if dummy_2d:
        initial_patch_size[0] = patch_size[0]
    return PatchGeometry(rotation, dummy_2d, initial_patch_size, tuple(range(len(patch_size))))


def build_training_transforms(
    patch_size: np.ndarray | Sequence[int],
    rotation_for_DA: RandomScalar,
    deep_supervision_scales: DeepSupervisionScales | None,
    mirror_axes: Sequence[int] | None,
    do_dummy_2d_data_aug: bool,
    use_mask_for_norm: Sequence[bool] | None = None,
    is_cascaded: bool = False,
    foreground_labels: Sequence[int] | None = None,
    regions: Regions | None = None,
    ignore_label: int | None = None,
) -> ComposeTransforms:
    """Build the default augmentation of training patches.

    Args:
        patch_size: Size of the network's input.
        deep_supervision_scales: The size of each target as a share of the patch; None for a single target.
        use_mask_for_norm: Per channel, whether voxels outside the image's own content are to be set to 0.
        foreground_labels: Needed for a cascade: the labels that the previous stage predicts.
        regions: Sets of labels that are predicted instead of the labels.
    """
    transforms = _spatial_transforms(patch_size, rotation_for_DA, do_dummy_2d_data_aug)
    transforms += _intensity_transforms(ignore_axes=(0,) if do_dummy_2d_data_aug else None)
    if mirror_axes is not None and len(mirror_axes) > 0:
        transforms.append(MirrorTransform(allowed_axes=mirror_axes))
    transforms += mask_transforms(use_mask_for_norm)
    transforms += previous_stage_transforms(is_cascaded, foreground_labels, augment=True)
    transforms += target_transforms(deep_supervision_scales, regions, ignore_label)
    return ComposeTransforms(transforms)


def build_validation_transforms(
    deep_supervision_scales: DeepSupervisionScales | None,
    is_cascaded: bool = False,
    foreground_labels: Sequence[int] | None = None,
    regions: Regions | None = None,
    ignore_label: int | None = None,
) -> ComposeTransforms:
    """Build the transforms from validation patches to input and targets, without augmentation."""
    transforms = previous_stage_transforms(is_cascaded, foreground_labels, augment=False)
    return ComposeTransforms(transforms + target_transforms(deep_supervision_scales, regions, ignore_label))


def _spatial_transforms(
    patch_size: Sequence[int] | np.ndarray, rotation: RandomScalar, do_dummy_2d_data_aug: bool
) -> list[BasicTransform]:
    """Turn, scale and crop. For dummy 2D the slices pass as channels, so that they are all treated alike."""
    spatial = BoundarySpatialTransform(
        patch_size=tuple(int(length) for length in patch_size)[1 if do_dummy_2d_data_aug else 0 :],
        patch_center_dist_from_border=0,
        random_crop=False,
        p_elastic_deform=0,
        p_rotation=0.2,
        rotation=rotation,
        p_scaling=0.2,
        scaling=(0.7, 1.4),
        p_synchronize_scaling_across_axes=1,
        bg_style_seg_sampling=False,
        border_mode_seg="constant",
        padding_value_seg=-1,
    )
    if not do_dummy_2d_data_aug:
        return [spatial]
    return [Convert3DTo2DTransform(), spatial, Convert2DTo3DTransform()]


def _intensity_transforms(ignore_axes: tuple[int, ...] | None) -> list[BasicTransform]:
    """Add noise, blur, and change brightness, contrast, resolution (but along `ignore_axes`) and gamma."""
    return [
        RandomTransform(
            GaussianNoiseTransform(noise_variance=(0, 0.1), p_per_channel=1, synchronize_channels=True), 0.1
        ),
        RandomTransform(
            SeparableBlurTransform(
                blur_sigma=(0.5, 1.0),
                synchronize_channels=False,
                synchronize_axes=False,
                p_per_channel=0.5,
                benchmark=True,
            ),
            0.2,
        ),
        RandomTransform(
            MultiplicativeBrightnessTransform(BGContrast((0.75, 1.25)), synchronize_channels=False, p_per_channel=1),
            0.15,
        ),
        RandomTransform(
            ContrastTransform(
                BGContrast((0.75, 1.25)), preserve_range=True, synchronize_channels=False, p_per_channel=1
            ),
            0.15,
        ),
        RandomTransform(
            SimulateLowResolutionTransform(
                scale=(0.5, 1),
                synchronize_channels=False,
                synchronize_axes=True,
                ignore_axes=ignore_axes,
                allowed_channels=None,
                p_per_channel=0.5,
            ),
            0.25,
        ),
        RandomTransform(_gamma(p_invert_image=1), 0.1),
        RandomTransform(_gamma(p_invert_image=0), 0.3),
    ]


def _gamma(p_invert_image: float) -> FastGammaTransform:
    return FastGammaTransform(
        gamma=BGContrast((0.7, 1.5)),
        p_invert_image=p_invert_image,
        synchronize_channels=False,
        p_per_channel=1,
        p_retain_stats=1,
    )


def mask_transforms(use_mask_for_norm: Sequence[bool] | None) -> list[BasicTransform]:
    """Set voxels outside the image's own content to 0.

    Only in channels that are normalised within it alone.
    """
    flags = () if use_mask_for_norm is None else use_mask_for_norm  # maybe an array
    channels = [channel for channel, is_masked in enumerate(flags) if is_masked]
    return [FastMaskImageTransform(channels, channel_idx_in_seg=0, set_outside_to=0)] if channels else []


def previous_stage_transforms(
    is_cascaded: bool, foreground_labels: Sequence[int] | None, *, augment: bool, p_per_label: float = 0.5
) -> list[BasicTransform]:
    """Turn -1 into background, and a previous stage's labels into channels.

    Args:
        augment: Imitate the mistakes of a previous stage.
        p_per_label: How often a label is concerned by a mistake that is made at all.
    """
    transforms: list[BasicTransform] = [FastRemoveLabelTransform(-1, 0)]
    if not is_cascaded:
        return transforms
    if foreground_labels is None:
        raise ValueError("a cascaded configuration needs foreground_labels, the labels of the previous stage")
    transforms.append(
        MoveSegAsOneHotToDataTransform(
            source_channel_idx=1, all_labels=foreground_labels, remove_channel_from_source=True
        )
    )
    if not augment:
        return transforms
    # Here, since they import scikit-image, which takes as long as everything else of this module together.
    from batchgeneratorsv2.transforms.nnunet.random_binary_operator import ApplyRandomBinaryOperatorTransform
    from batchgeneratorsv2.transforms.nnunet.remove_connected_components import (
        RemoveRandomConnectedComponentFromOneHotEncodingTransform,
    )

    label_channels = list(range(-len(foreground_labels), 0))
    return [
        *transforms,
        RandomTransform(
            ApplyRandomBinaryOperatorTransform(
                channel_idx=list(label_channels), strel_size=(1, 8), p_per_label=p_per_label
            ),
            0.4,
        ),
        RandomTransform(
            RemoveRandomConnectedComponentFromOneHotEncodingTransform(
                channel_idx=list(label_channels),
                fill_with_other_class_p=0,
                dont_do_if_covers_more_than_x_percent=0.15,
                p_per_label=p_per_label,
            ),
            0.2,
        ),
    ]


def target_transforms(
    deep_supervision_scales: DeepSupervisionScales | None, regions: Regions | None, ignore_label: int | None
) -> list[BasicTransform]:
    """Turn labels into regions, and into one target per resolution.

    The ignore label becomes the last region.
    """
    transforms: list[BasicTransform] = []
    if regions is not None:
        # plain ints, as the library tests for them
        plain = [tuple(map(int, region)) if isinstance(region, Iterable) else int(region) for region in regions]
        all_regions = plain if ignore_label is None else [*plain, ignore_label]
        transforms.append(ConvertSegmentationToRegionsTransform(regions=all_regions, channel_in_seg=0))
    if deep_supervision_scales is not None:
        transforms.append(StridedDownsampleTransform(ds_scales=deep_supervision_scales))
    return transforms
