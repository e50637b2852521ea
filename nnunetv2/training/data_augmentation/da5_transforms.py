"""Build the stronger of the two augmentations, DA5.

Beside the default steps it turns patches by right angles, exchanges axes, filters, blanks rectangles, sharpens, and
changes brightness and gamma locally. Samples and their order of axes are those of `default_transforms`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from batchgeneratorsv2.helpers.scalar_type import RandomScalar
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import BrightnessAdditiveTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.local.brightness_gradient import BrightnessGradientAdditiveTransform
from batchgeneratorsv2.transforms.local.local_gamma import LocalGammaTransform
from batchgeneratorsv2.transforms.noise.blank_rectangle import BlankRectangleTransform
from batchgeneratorsv2.transforms.noise.median_filter import MedianFilterTransform
from batchgeneratorsv2.transforms.noise.sharpen import SharpeningTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.rot90 import Rot90Transform
from batchgeneratorsv2.transforms.spatial.transpose import TransposeAxesTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import OneOfTransform, RandomTransform

from nnunetv2.training.data_augmentation.default_transforms import (
    DeepSupervisionScales,
    Regions,
    mask_transforms,
    previous_stage_transforms,
    target_transforms,
)
from nnunetv2.training.data_augmentation.intensity import FastGammaTransform, SeparableBlurTransform
from nnunetv2.training.data_augmentation.spatial import BoundarySpatialTransform

SCALING = (0.7, 1.43)
LOCAL_CENTRE = (-0.5, 1.5)
"""Where the bump of a local change lies, as a share of the patch: also outside of it."""


def build_da5_transforms(
    patch_size: Sequence[int],
    rotation_for_DA: RandomScalar,
    deep_supervision_scales: DeepSupervisionScales | None,
    mirror_axes: Sequence[int] | None,
    do_dummy_2d_data_aug: bool,
    use_mask_for_norm: Sequence[bool] | None = None,
    is_cascaded: bool = False,
    foreground_labels: Sequence[int] | None = None,
    regions: Regions | None = None,
    ignore_label: int | None = None,
    *,
    mode_image: str = "bilinear",
    mode_seg: str = "bilinear",
) -> ComposeTransforms:
    """Build the strong augmentation of training patches; the arguments are those of `build_training_transforms`.

    Args:
        mode_image: Interpolation of images, 'bilinear' or 'nearest'.
        mode_seg: The same for label maps.
    """
    patch_size = tuple(int(length) for length in patch_size)
    transforms = _turning(patch_size, rotation_for_DA, do_dummy_2d_data_aug, mode_image, mode_seg)
    transforms += _exchanging_axes(patch_size)
    transforms += _changing_intensities(ignore_axes=(0,) if do_dummy_2d_data_aug else None)
    if mirror_axes is not None and len(mirror_axes) > 0:
        transforms.append(MirrorTransform(allowed_axes=mirror_axes))
    transforms += _changing_places(patch_size)
    transforms += mask_transforms(use_mask_for_norm)
    transforms += previous_stage_transforms(is_cascaded, foreground_labels, augment=True, p_per_label=1)
    transforms += target_transforms(deep_supervision_scales, regions, ignore_label)
    return ComposeTransforms(transforms)


def _turning(
    patch_size: tuple[int, ...], rotation: RandomScalar, dummy_2d: bool, mode_image: str, mode_seg: str
) -> list[BasicTransform]:
    """Turn about some of the axes, scale each axis by a factor of its own, and crop."""
    spatial = BoundarySpatialTransform(
        patch_size[1:] if dummy_2d else patch_size,
        patch_center_dist_from_border=0,
        random_crop=False,
        p_elastic_deform=0,
        p_rotation=0.4,
        rotation=rotation,
        p_rot_per_axis=0.5,
        p_scaling=0.2,
        scaling=SCALING,
        p_synchronize_scaling_across_axes=0,
        bg_style_seg_sampling=False,
        border_mode_seg="constant",
        padding_value_seg=-1,
        mode_image=mode_image,
        mode_seg=mode_seg,
    )
    return [Convert3DTo2DTransform(), spatial, Convert2DTo3DTransform()] if dummy_2d else [spatial]


def _exchanging_axes(patch_size: tuple[int, ...]) -> list[BasicTransform]:
    """Turn by right angles and exchange axes, among the axes of the length that most axes have."""
    counts = Counter(patch_size)
    most = max(counts.values())
    if most == 1:
        return []
    axes = {axis for axis, length in enumerate(patch_size) if counts[length] == most}
    return [
        RandomTransform(
            Rot90Transform(num_axis_combinations=1, num_rot_per_combination=(0, 1, 2, 3), allowed_axes=axes), 0.5
        ),
        RandomTransform(TransposeAxesTransform(allowed_axes=axes), 0.5),
    ]


def _changing_intensities(ignore_axes: tuple[int, ...] | None) -> list[BasicTransform]:
    """Filter, add noise, change brightness, contrast, resolution (but along `ignore_axes`) and gamma."""
    return [
        OneOfTransform(
            [
                RandomTransform(MedianFilterTransform((2, 8), p_same_for_each_channel=0, p_per_channel=0.5), 0.2),
                RandomTransform(
                    SeparableBlurTransform(
                        (0.3, 1.5), synchronize_channels=False, synchronize_axes=True, p_per_channel=0.5
                    ),
                    0.2,
                ),
            ]
        ),
        RandomTransform(GaussianNoiseTransform((0, 0.1), p_per_channel=1, synchronize_channels=True), 0.1),
        RandomTransform(
            BrightnessAdditiveTransform(mu=0, sigma=0.5, synchronize_channels=False, p_per_channel=0.5), 0.1
        ),
        OneOfTransform([RandomTransform(_contrast(preserve_range), 0.2) for preserve_range in (True, False)]),
        RandomTransform(
            SimulateLowResolutionTransform(
                scale=(0.25, 1),
                synchronize_channels=False,
                synchronize_axes=True,
                ignore_axes=ignore_axes,
                p_per_channel=0.5,
            ),
            0.15,
        ),
        # Both of them inverted: trainings with these weights are published, so it stays.
        *[
            RandomTransform(
                FastGammaTransform(
                    BGContrast((0.7, 1.5)),
                    p_invert_image=1,
                    synchronize_channels=False,
                    p_per_channel=1,
                    p_retain_stats=1,
                ),
                0.1,
            )
            for _ in range(2)
        ],
    ]


def _contrast(preserve_range: bool) -> ContrastTransform:
    return ContrastTransform(
        BGContrast((0.5, 2)), preserve_range=preserve_range, synchronize_channels=False, p_per_channel=0.5
    )


def _changing_places(patch_size: tuple[int, ...]) -> list[BasicTransform]:
    """Blank rectangles, change brightness and gamma around some place, and sharpen."""
    return [
        RandomTransform(
            BlankRectangleTransform(
                [_lengths_of_rectangles(length) for length in patch_size],
                rectangle_value=torch.mean,
                num_rectangles=(1, 5),
                force_square=False,
                p_per_channel=0.5,
            ),
            0.4,
        ),
        RandomTransform(
            BrightnessGradientAdditiveTransform(
                scale=draw_width,
                loc=LOCAL_CENTRE,
                max_strength=draw_strength,
                mean_centered=False,
                same_for_all_channels=False,
                p_per_channel=0.5,
            ),
            0.3,
        ),
        RandomTransform(
            LocalGammaTransform(
                scale=draw_width, loc=LOCAL_CENTRE, gamma=draw_gamma, same_for_all_channels=False, p_per_channel=0.5
            ),
            0.3,
        ),
        RandomTransform(SharpeningTransform(strength=(0.1, 1), p_same_for_each_channel=0, p_per_channel=0.5), 0.2),
    ]


def _lengths_of_rectangles(length: int) -> list[int]:
    """Return the shortest side of a rectangle along an axis, and the first length that is too long (never below 2)."""
    shortest = max(1, length // 10)
    return [shortest, max(shortest + 1, length // 3)]


# Functions of the module rather than lambdas: they are pickled to worker processes.


def draw_width(shape: Sequence[int], axis: int) -> float:
    """Draw the width of a bump in voxels, even on a logarithmic scale.

    It lies between a sixth of the patch and all of it.
    """
    length = shape[axis]
    return float(np.exp(np.random.uniform(np.log(max(1, length // 6)), np.log(length))))


def draw_strength(*_: object) -> float:
    """Draw how much is added at the top of a bump."""
    strength = np.random.uniform(1, 5)
    return float(strength if np.random.uniform() < 0.5 else -strength)


def draw_gamma(*_: object) -> float:
    """Draw an exponent far from 1, on either side."""
    return float(np.random.uniform(0.01, 0.8) if np.random.uniform() < 0.5 else np.random.uniform(1.5, 4))
