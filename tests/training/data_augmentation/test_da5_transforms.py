"""The strong augmentation: its parts, its draws, and what comes out."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.noise.blank_rectangle import BlankRectangleTransform
from batchgeneratorsv2.transforms.spatial.rot90 import Rot90Transform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.spatial.transpose import TransposeAxesTransform

from nnunetv2.training.data_augmentation.da5_transforms import (
    build_da5_transforms,
    draw_gamma,
    draw_strength,
    draw_width,
)

ANGLE = (-0.5, 0.5)


def build(patch, *, dummy=False, scales=None, **options):
    return build_da5_transforms(patch, ANGLE, scales, tuple(range(len(patch))), dummy, **options)


def parts(pipeline, kind):
    inner = [getattr(transform, "transform", transform) for transform in pipeline.transforms]
    return [transform for transform in inner if isinstance(transform, kind)]


@pytest.mark.parametrize(
    ("patch", "axes"),
    [
        ((12, 12, 12), {0, 1, 2}),
        ((6, 12, 12), {1, 2}),
        ((12, 10, 12), {0, 2}),
        ((8, 10, 12), None),
        ((12, 12), {0, 1}),
        ((12, 10), None),
    ],
)
def test_only_axes_of_the_commonest_length_are_exchanged(patch, axes):
    pipeline = build(patch)
    found = [
        transform.allowed_axes
        for kind in (Rot90Transform, TransposeAxesTransform)
        for transform in parts(pipeline, kind)
    ]
    assert found == ([] if axes is None else [axes, axes])


@pytest.mark.parametrize(("patch", "dummy"), [((12, 12, 12), False), ((4, 16, 16), True), ((16, 14), False)])
def test_patches_keep_their_shape_whatever_is_drawn(patch, dummy):
    np.random.seed(0)
    torch.manual_seed(0)
    scales = [[1.0] * len(patch), [0.5] * len(patch)]
    pipeline = build(patch, dummy=dummy, use_mask_for_norm=[True, False], scales=scales)
    loaded = [length if dummy and axis == 0 else length + 6 for axis, length in enumerate(patch)]
    for _ in range(40):
        segmentation = torch.randint(-1, 3, (1, *loaded)).to(torch.int16)
        sample = pipeline(image=torch.randn(2, *loaded), segmentation=segmentation)
        assert sample["image"].shape == (2, *patch) and torch.isfinite(sample["image"]).all()
        full, half = sample["segmentation"]
        assert full.shape == (1, *patch) and half.shape == (1, *[length // 2 for length in patch])
        assert full.min() >= 0 and full.dtype == torch.int16


def test_a_cascade_and_regions_end_as_in_the_default_augmentation():
    pipeline = build((8, 8, 8), is_cascaded=True, foreground_labels=[1, 2], regions=[(1, 2), 2], ignore_label=3)
    seg = torch.randint(0, 4, (2, 14, 14, 14)).to(torch.int16)
    sample = pipeline(image=torch.randn(1, 14, 14, 14), segmentation=seg)
    assert sample["image"].shape == (3, 8, 8, 8)
    assert sample["segmentation"].shape == (3, 8, 8, 8) and sample["segmentation"].dtype == torch.bool


def test_interpolation_is_a_choice():
    (spatial,) = parts(build((8, 8, 8), mode_image="nearest", mode_seg="nearest"), SpatialTransform)
    assert (spatial.mode_image, spatial.mode_seg) == ("nearest", "nearest")
    (spatial,) = parts(build((8, 8, 8)), SpatialTransform)
    assert (spatial.mode_image, spatial.mode_seg) == ("bilinear", "bilinear")


@pytest.mark.parametrize(("length", "sides"), [(128, [12, 42]), (6, [1, 2]), (4, [1, 2]), (1, [1, 2])])
def test_rectangles_have_a_side_also_in_thin_patches(length, sides):
    (blank,) = parts(build((length, 40, 40)), BlankRectangleTransform)
    assert blank.rectangle_size[0] == sides


def test_draws_stay_in_their_ranges():
    np.random.seed(0)
    widths = [draw_width((60, 90), 1) for _ in range(300)]
    assert 15 <= min(widths) < 18 and 80 < max(widths) <= 90
    strengths = np.array([draw_strength() for _ in range(300)])
    assert (np.abs(strengths) >= 1).all() and (np.abs(strengths) <= 5).all() and 100 < (strengths > 0).sum() < 200
    gammas = np.array([draw_gamma() for _ in range(300)])
    small = gammas < 1
    assert gammas[small].max() <= 0.8 and gammas[~small].min() >= 1.5 and 100 < small.sum() < 200


def test_the_pipeline_goes_to_worker_processes():
    pickle.loads(pickle.dumps(build((8, 8, 8))))
