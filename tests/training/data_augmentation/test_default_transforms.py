"""The default augmentation: which transforms, in which order, and what becomes of the labels."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.random import RandomTransform

from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.data_augmentation.default_transforms import (
    build_training_transforms,
    build_validation_transforms,
    rotation_and_patch_size,
)

DEGREE = np.pi / 180


@pytest.mark.parametrize(
    ("patch", "degrees", "expected"),
    [
        ((128, 128, 128), 30, (205, 205, 205)),
        ((96, 160, 160), 30, (191, 257, 219)),
        ((24, 32, 40), 30, (43, 56, 54)),
        ((512, 512), 180, (602, 602)),
        ((512, 256), 15, (659, 301)),
        ((20, 320, 256), 180, (376, 376, 376)),
    ],
)
def test_the_loaded_patch_has_room_for_rotation(patch, degrees, expected):
    angle = degrees * DEGREE
    size = get_patch_size(patch, (-angle, angle), angle, [-angle, angle], (0.85, 1.25))
    assert tuple(size) == expected and size.dtype.kind == "i"


def test_a_patch_has_two_or_three_axes():
    with pytest.raises(ValueError, match="2 or 3 axes"):
        get_patch_size((8,), 0, 0, 0, (1, 1))


@pytest.mark.parametrize(
    ("patch", "degrees", "dummy_2d", "initial", "axes"),
    [
        ((512, 256), 15, False, (659, 301), (0, 1)),
        ((384, 256), 180, False, (451, 451), (0, 1)),
        ((20, 320, 256), 180, True, (20, 376, 376), (0, 1, 2)),
        ((40, 120, 120), 30, False, (111, 192, 145), (0, 1, 2)),
    ],
)
def test_the_shape_of_a_patch_decides_how_it_is_turned(patch, degrees, dummy_2d, initial, axes):
    geometry = rotation_and_patch_size(patch)
    assert geometry.rotation == pytest.approx((-degrees * DEGREE, degrees * DEGREE))
    assert (geometry.dummy_2d, tuple(geometry.initial_patch_size), geometry.mirror_axes) == (dummy_2d, initial, axes)


def test_thin_patches_can_be_turned_in_all_directions():
    geometry = rotation_and_patch_size((20, 320, 256), allow_dummy_2d=False)
    assert not geometry.dummy_2d
    assert geometry.rotation[1] == pytest.approx(30 * DEGREE)


def names(transforms) -> list[str]:
    """Return, per transform, the name of the library's class that it is or refines."""
    plain = [t.transform if isinstance(t, RandomTransform) else t for t in transforms.transforms]
    return [next(c.__name__ for c in type(t).__mro__ if c.__module__.startswith("batchgeneratorsv2.")) for t in plain]


INTENSITY = [
    "GaussianNoiseTransform",
    "GaussianBlurTransform",
    "MultiplicativeBrightnessTransform",
    "ContrastTransform",
    "SimulateLowResolutionTransform",
    "GammaTransform",
    "GammaTransform",
]


def build(patch=(8, 10, 9), dummy_2d=False, scales=None, mirror_axes=(0, 1, 2), **options):
    return build_training_transforms(np.array(patch), (-0.5, 0.5), scales, mirror_axes, dummy_2d, **options)


def test_the_plain_pipeline_has_its_order_and_probabilities():
    transforms = build(scales=[[1, 1, 1]])
    assert names(transforms) == [
        "SpatialTransform",
        *INTENSITY,
        "MirrorTransform",
        "RemoveLabelTransform",
        "DownsampleSegForDSTransform",
    ]
    chances = [t.apply_probability for t in transforms.transforms if isinstance(t, RandomTransform)]
    assert chances == [0.1, 0.2, 0.15, 0.15, 0.25, 0.1, 0.3]
    spatial = transforms.transforms[0]
    assert (spatial.p_rotation, spatial.p_scaling, spatial.scaling) == (0.2, 0.2, (0.7, 1.4))
    assert (spatial.padding_value_seg, spatial.border_mode_seg) == (-1, "constant")
    assert tuple(spatial.patch_size) == (8, 10, 9)
    gammas = [t.transform for t in transforms.transforms if "Gamma" in repr(t) and isinstance(t, RandomTransform)][-2:]
    assert [gamma.p_invert_image for gamma in gammas] == [1, 0]


def test_a_full_pipeline_masks_before_it_forgets_the_outside_and_converts_at_the_end():
    transforms = build(
        dummy_2d=True,
        mirror_axes=None,
        use_mask_for_norm=[False, True],
        is_cascaded=True,
        foreground_labels=[1, 2],
        regions=[(1, 2), 2],
        ignore_label=3,
        scales=[[1, 1, 1]],
    )
    assert names(transforms) == [
        "Convert3DTo2DTransform",
        "SpatialTransform",
        "Convert2DTo3DTransform",
        *INTENSITY,
        "MaskImageTransform",
        "RemoveLabelTransform",
        "MoveSegAsOneHotToDataTransform",
        "ApplyRandomBinaryOperatorTransform",
        "RemoveRandomConnectedComponentFromOneHotEncodingTransform",
        "ConvertSegmentationToRegionsTransform",
        "DownsampleSegForDSTransform",
    ]
    assert tuple(transforms.transforms[1].patch_size) == (10, 9)
    assert transforms.transforms[10].apply_to_channels == [1]


def test_a_cascade_needs_labels():
    with pytest.raises(ValueError, match="foreground_labels"):
        build(is_cascaded=True)


def sample(channels=1, seg_channels=1, shape=(16, 18, 17), highest=3) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.rand((channels, *shape), generator=generator),
        "segmentation": torch.randint(-1, highest, (seg_channels, *shape), generator=generator).to(torch.int16),
    }


@pytest.mark.parametrize("dummy_2d", [False, True])
def test_augmented_samples_have_the_wanted_shapes(dummy_2d):
    patch = (16, 10, 9) if dummy_2d else (8, 10, 9)
    result = build(patch, dummy_2d=dummy_2d, scales=[[1, 1, 1], [0.5, 0.5, 0.5]])(**sample(channels=2))
    assert result["image"].shape == (2, *patch)
    assert [tuple(target.shape) for target in result["segmentation"]] == [(1, *patch), (1, patch[0] // 2, 5, 4)]
    assert result["segmentation"][0].min() >= 0


def test_regions_and_the_ignore_label_are_channels():
    given = sample(highest=4)
    result = build_validation_transforms(None, regions=[(np.int64(1), np.int64(2)), np.int64(2)], ignore_label=3)(
        image=given["image"], segmentation=given["segmentation"].clone()
    )
    target, labels = result["segmentation"], given["segmentation"][0]
    assert target.dtype == torch.bool
    expected = torch.stack([(labels == 1) | (labels == 2), labels == 2, labels == 3])
    assert torch.equal(target, expected)


def test_validation_samples_are_converted_and_otherwise_left_alone():
    given = sample(seg_channels=2)
    transforms = build_validation_transforms([[1, 1, 1]], is_cascaded=True, foreground_labels=[1, 2])
    result = transforms(image=given["image"], segmentation=given["segmentation"].clone())
    assert torch.equal(result["image"][:1], given["image"])
    assert torch.equal(result["image"][2] == 1, given["segmentation"][1] == 2)
    assert torch.equal(result["segmentation"][0], given["segmentation"][:1].clamp(min=0))


@pytest.mark.parametrize("flags", [[True, False], np.array([True, False])])
def test_a_masked_channel_is_zero_outside(flags):
    transforms = build((16, 18, 17), mirror_axes=(), use_mask_for_norm=flags)
    del transforms.transforms[:8]
    given = sample(channels=2)
    outside = given["segmentation"][0] < 0
    result = transforms(**given)
    assert (result["image"][0][outside] == 0).all()
    assert (result["image"][1][outside] != 0).any()


def test_pipelines_can_be_pickled():
    transforms = build(use_mask_for_norm=[True], is_cascaded=True, foreground_labels=[1], scales=[[1, 1, 1]])
    assert names(pickle.loads(pickle.dumps(transforms))) == names(transforms)
