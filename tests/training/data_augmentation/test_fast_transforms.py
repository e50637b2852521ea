"""The faster transforms give what the library's transforms give, for the same parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from nnunetv2.training.data_augmentation.affine_sampling import AffineGrid, cut_source, sample_images
from nnunetv2.training.data_augmentation.intensity import (
    FastGammaTransform,
    SeparableBlurTransform,
    blur,
    gaussian_kernel,
    standard_deviation,
)
from nnunetv2.training.data_augmentation.spatial import BoundarySpatialTransform, needed_box
from nnunetv2.training.data_augmentation.targets import (
    FastMaskImageTransform,
    FastRemoveLabelTransform,
    StridedDownsampleTransform,
    nearest_voxels,
)


def make_sample(shape=(9, 14, 12), channels=2, seed=0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randn((channels, *shape), generator=generator) * 3 + 40,
        "segmentation": torch.randint(-1, 4, (2, *shape), generator=generator, dtype=torch.int16),
    }


def apply_both(theirs, ours, seed=0, **options) -> tuple[dict, dict]:
    results = []
    for transform in (theirs, ours):
        np.random.seed(seed)
        torch.manual_seed(seed)
        results.append(transform(**make_sample(seed=seed, **options)))
    return tuple(results)


@pytest.mark.parametrize("shape", [(9, 14, 12), (14, 12), (4, 30, 6)])
@pytest.mark.parametrize(("synchronize_channels", "synchronize_axes"), [(False, False), (True, True), (False, True)])
def test_blur(shape, synchronize_channels, synchronize_axes):
    options = {
        "blur_sigma": (0.5, 1.0),
        "synchronize_channels": synchronize_channels,
        "synchronize_axes": synchronize_axes,
        "p_per_channel": 1 if synchronize_channels else 0.5,
    }  # the library fails if it then draws no channel
    for seed in range(8):
        theirs, ours = apply_both(
            GaussianBlurTransform(**options), SeparableBlurTransform(**options), seed, shape=shape, channels=3
        )
        assert torch.allclose(theirs["image"], ours["image"], atol=2e-5)


def test_a_kernel_is_six_sigmas_wide_and_of_odd_length():
    assert [len(gaussian_kernel(sigma)) for sigma in (0.5, 0.58, 0.75, 0.9, 1.0)] == [3, 3, 5, 5, 7]
    assert gaussian_kernel(0.8).sum() == pytest.approx(1)


def test_blur_mirrors_at_the_edges_and_keeps_a_constant():
    assert blur(np.full((3, 5), 2, np.float32), [gaussian_kernel(1)] * 2) == pytest.approx(2)
    kernel = np.array([0.25, 0.5, 0.25], np.float32)
    one = np.array([[0, 1, 0, 4]], np.float32)
    assert blur(one, [np.ones(1, np.float32), kernel]).tolist() == [[0.5, 0.5, 1.25, 2]]


@pytest.mark.parametrize(("p_invert", "p_retain"), [(0, 1), (1, 1), (0.5, 0.5)])
@pytest.mark.parametrize("shape", [(9, 14, 12), (14, 12)])
def test_gamma(shape, p_invert, p_retain):
    options = {
        "gamma": (0.7, 1.5),
        "p_invert_image": p_invert,
        "synchronize_channels": False,
        "p_per_channel": 0.7,
        "p_retain_stats": p_retain,
    }
    for seed in range(8):
        theirs, ours = apply_both(GammaTransform(**options), FastGammaTransform(**options), seed, shape=shape)
        assert torch.allclose(theirs["image"], ours["image"], atol=1e-4)  # of values around 40


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_gamma_leaves_a_constant_image_as_it_is(value):
    transform = FastGammaTransform(
        gamma=1.3, p_invert_image=1, synchronize_channels=False, p_per_channel=1, p_retain_stats=1
    )
    assert torch.allclose(transform(image=torch.full((1, 4, 4), value))["image"], torch.tensor(value))


def test_the_standard_deviation_does_not_lose_digits():
    values = torch.randn(300_000, generator=torch.Generator().manual_seed(0)) * 5
    values -= values.mean()
    assert standard_deviation(values) == pytest.approx(float(values.double().std()), rel=1e-6)


@pytest.mark.parametrize("channels", [None, 0, [1]])
def test_labels_are_removed(channels):
    theirs, ours = apply_both(RemoveLabelTansform(-1, 0, channels), FastRemoveLabelTransform(-1, 0, channels))
    assert torch.equal(theirs["segmentation"], ours["segmentation"])
    assert ours["segmentation"].dtype == torch.int16


def test_images_are_masked():
    options = {"apply_to_channels": [1], "channel_idx_in_seg": 1, "set_outside_to": 5}
    theirs, ours = apply_both(MaskImageTransform(**options), FastMaskImageTransform(**options))
    assert torch.equal(theirs["image"], ours["image"])
    assert (ours["image"] == 5).any()


@pytest.mark.parametrize("shape", [(8, 16, 12), (9, 13, 17), (13, 12), (1, 64, 48)])
@pytest.mark.parametrize("dtype", [torch.int16, torch.bool])
def test_targets_of_all_resolutions(shape, dtype):
    scales = [[1] * len(shape), [1, *[0.5] * (len(shape) - 1)], [0.5] * len(shape), 0.25, [0.3] * len(shape)]
    scales = [
        scale
        for scale in scales
        if min(round(n * f) for n, f in zip(shape, scale if isinstance(scale, list) else [scale] * len(shape))) > 0
    ]
    labels = torch.randint(0, 4, (2, *shape), generator=torch.Generator().manual_seed(0)).to(dtype)
    theirs = DownsampleSegForDSTransform(scales)(segmentation=labels)["segmentation"]
    ours = StridedDownsampleTransform(scales)(segmentation=labels)["segmentation"]
    for expected, result in zip(theirs, ours):
        assert torch.equal(expected, result) and result.dtype == dtype and result.is_contiguous()


def test_a_scale_needs_an_entry_per_axis():
    with pytest.raises(ValueError, match="3 entries for 2 axes"):
        StridedDownsampleTransform([[1, 1, 0.5]])(segmentation=torch.zeros((1, 4, 4)))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.floats(0.02, 1))
def test_the_nearest_voxels_are_those_of_torch(length, factor):
    new_length = max(1, round(length * factor))
    expected = interpolate(torch.arange(length, dtype=torch.float32)[None, None], new_length, mode="nearest-exact")
    assert nearest_voxels(length, new_length).tolist() == expected[0, 0].long().tolist()


SPATIAL = {
    "patch_center_dist_from_border": 0,
    "random_crop": False,
    "rotation": (-3.1, 3.1),
    "scaling": (0.5, 1.6),
    "p_synchronize_scaling_across_axes": 0.5,
    "border_mode_seg": "constant",
    "padding_value_seg": -1,
}


@pytest.mark.parametrize(
    ("shape", "patch"), [((20, 24, 22), (14, 16, 12)), ((30, 26), (22, 24)), ((9, 9, 9), (14, 5, 9))]
)
@pytest.mark.parametrize("p_rotation", [0, 1])
def test_turned_and_scaled_images(shape, patch, p_rotation):
    theirs, ours = (
        kind(patch, p_rotation=p_rotation, p_scaling=1 - p_rotation / 2, **SPATIAL)
        for kind in (SpatialTransform, BoundarySpatialTransform)
    )
    for seed in range(6):
        expected, result = apply_both(theirs, ours, seed, shape=shape)
        assert result["image"].shape == (2, *patch)
        # The library rounds positions in float32: 1e-6 of the patch times the steps between voxels.
        assert (expected["image"] - result["image"]).abs().max() < 1e-3


def test_a_whole_turn_by_a_right_angle_is_exact():
    image = np.arange(12, dtype=np.float32).reshape(1, 3, 4)
    grid = AffineGrid(np.array([[0.0, 1.0], [-1.0, 0.0]]), np.array([0.0, 3.0]), (4, 3))
    assert np.array_equal(sample_images(image, grid)[0], np.rot90(image[0]))


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 3), st.integers(0, 10**6))
def test_what_a_grid_needs_is_enough_and_outside_is_zero(num_axes, seed):
    rng = np.random.default_rng(seed)
    shape, patch = rng.integers(1, 9, num_axes), tuple(int(n) for n in rng.integers(1, 7, num_axes))
    matrix = rng.normal(size=(num_axes, num_axes)) if seed % 2 else np.diag(rng.uniform(-2, 2, num_axes))
    grid = AffineGrid(matrix, rng.normal(scale=6, size=num_axes), patch)
    image = rng.normal(size=(1, *shape)).astype(np.float32)
    expected = interpolate_by_definition(image[0], grid)
    assert sample_images(image, grid)[0] == pytest.approx(expected, abs=1e-4)
    lower, upper = needed_box(grid, shape)
    part = image[(slice(None), *map(slice, lower, upper))]
    assert sample_images(part, grid.seen_from(lower))[0] == pytest.approx(expected, abs=1e-4)
    assert (np.array(cut_source(image, grid, 0).values.shape[1:]) <= shape + 3).all()


def interpolate_by_definition(image: np.ndarray, grid: AffineGrid) -> np.ndarray:
    result = np.zeros(grid.patch)
    for index in np.ndindex(*grid.patch):
        position = grid.matrix @ np.array(index) + grid.offset
        lower = np.floor(position).astype(int)
        for step in np.ndindex(*(2,) * image.ndim):
            voxel = lower + step
            if (voxel >= 0).all() and (voxel < image.shape).all():
                result[index] += image[tuple(voxel)] * np.prod(1 - np.abs(position - voxel))
    return result
