"""Turned and scaled labels: those of the library, voxel for voxel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from scipy.ndimage import gaussian_filter

from nnunetv2.training.data_augmentation.affine_sampling import AffineGrid
from nnunetv2.training.data_augmentation.label_sampling import choose_labels, find_mixed_cells, sample_labels
from nnunetv2.training.data_augmentation.spatial import BoundarySpatialTransform

OPTIONS = {
    "patch_center_dist_from_border": 0,
    "random_crop": False,
    "p_rotation": 1,
    "rotation": (-0.5, 0.5),
    "p_scaling": 1,
    "scaling": (0.7, 1.4),
    "p_synchronize_scaling_across_axes": 1,
    "bg_style_seg_sampling": False,
    "border_mode_seg": "constant",
    "padding_value_seg": -1,
}


def blobs(shape: tuple[int, ...], num_labels: int, channels: int = 1, lowest: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(num_labels)
    fields = [[gaussian_filter(rng.normal(size=shape), 2) for _ in range(num_labels)] for _ in range(channels)]
    return torch.from_numpy(np.argmax(fields, 1).astype(np.int16) + lowest)


@pytest.mark.parametrize(
    ("shape", "patch"), [((30, 34, 26), (20, 22, 18)), ((40, 51), (30, 33)), ((12, 12, 12), (20, 20, 20))]
)
@pytest.mark.parametrize("num_labels", [1, 2, 3, 7])
def test_labels_are_those_of_the_library(shape, patch, num_labels):
    seg = blobs(shape, num_labels, channels=2, lowest=-1 if num_labels > 2 else 0)
    image = torch.zeros(1, *shape)
    theirs, ours = SpatialTransform(patch, **OPTIONS), BoundarySpatialTransform(patch, **OPTIONS)
    for seed in range(6):
        np.random.seed(seed)
        expected = theirs(image=image, segmentation=seg)
        np.random.seed(seed)
        result = ours(image=image, segmentation=seg)
        assert torch.equal(result["segmentation"], expected["segmentation"])
        assert result["segmentation"].dtype == torch.int16


@pytest.mark.parametrize(
    "options",
    [
        {"mode_seg": "nearest"},
        {"border_mode_seg": "border"},
        {"border_mode_seg": "zeros", "padding_value_seg": 0},
        {"align_corners": True},
        {"p_rotation": 0, "p_scaling": 0},
        {"p_elastic_deform": 1, "elastic_deform_scale": 0.2, "elastic_deform_magnitude": 2},
    ],
)
def test_other_settings_too(options):
    seg = blobs((20, 24, 22), 3)
    options = {**OPTIONS, **options}
    results = []
    for transform_class in (SpatialTransform, BoundarySpatialTransform):
        np.random.seed(0)
        torch.manual_seed(0)
        transform = transform_class((14, 16, 12), **options)
        results.append(transform(image=torch.zeros(1, 20, 24, 22), segmentation=seg)["segmentation"])
    assert torch.equal(*results)


def test_a_point_between_two_labels_gets_the_one_with_the_larger_share():
    labels = np.array([[[5, 5, 9, 9]] * 3], dtype=np.int16)
    for first, expected in ((0.0, [5, 5, 9, 9]), (1.4, [5, 9, 9, -1]), (1.6, [9, 9, -1, -1]), (-0.6, [-1, 5, 5, 9])):
        grid = AffineGrid(np.eye(2), np.array([1.0, first]), (1, 4))
        assert sample_labels(labels, grid, -1, start=(0, 0), shape=(3, 4)).tolist() == [[expected]], first


def test_a_box_of_the_labels_gives_the_same_as_all_of_them():
    labels = blobs((20, 24, 22), 3).numpy()
    turn = np.array([[0.9, 0.3, 0.1], [-0.3, 0.9, 0.2], [0.0, -0.2, 1.0]])
    grid = AffineGrid(turn, np.array([6.0, 9.0, 7.0]), (6, 6, 6))
    lower, upper = grid.cells()
    box = labels[(slice(None), *map(slice, lower, upper))]
    expected = sample_labels(labels, grid, -1, start=(0, 0, 0), shape=(20, 24, 22))
    assert np.array_equal(sample_labels(box, grid, -1, start=lower, shape=(20, 24, 22)), expected)
    assert len(np.unique(expected)) > 1


def test_cells_are_mixed_where_labels_meet():
    labels = np.array([[[1, 1, 2], [1, 1, 2], [1, 3, 2]], [[3, 3, 3], [3, 3, 3], [3, 3, 1]]])
    assert find_mixed_cells(labels)[:, :2, :2].tolist() == [
        [[False, True], [True, True]],
        [[False, False], [False, True]],
    ]


def test_equal_shares_go_to_the_nearest_voxel_or_else_to_the_lowest_label():
    corners = np.array([[7, 3, 3], [3, 7, 5], [3, 3, 7]], np.int8)
    weights = np.array([[0.5, 0.4, 0.2], [0.5, 0.5, 0.4], [0, 0.1, 0.4]], np.float32)
    assert choose_labels(corners, weights, np.array([7, 7, 3], np.int8)).tolist() == [7, 7, 5]
