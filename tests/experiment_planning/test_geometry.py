"""Spacings, axis orders and initial patches."""

import numpy as np
import pytest

from nnunetv2.experiment_planning.experiment_planners.case_geometry import ListedGeometry
from nnunetv2.experiment_planning.experiment_planners.geometry import (
    coarsen,
    coarsest_axis_first,
    initial_patch_size,
    median_resampled_shape,
    median_target_spacing,
)


def test_target_is_the_median_spacing():
    spacings, shapes = np.array([[1, 0.8, 0.8], [3, 1, 1], [2, 0.9, 0.9]]), np.array([[50, 60, 70]] * 3)
    assert median_target_spacing(ListedGeometry(spacings, shapes), 3).tolist() == [2, 0.9, 0.9]


def test_thick_few_slices_take_the_tenth_percentile():
    spacings = np.array([[10, 1.5, 1.5]] * 6 + [[5, 1.5, 1.5]] * 4)
    assert median_target_spacing(ListedGeometry(spacings, np.array([[9, 256, 216]] * 10)), 3).tolist() == [5, 1.5, 1.5]
    assert median_target_spacing(ListedGeometry(spacings, np.array([[90, 256, 216]] * 10)), 3).tolist() == [
        10,
        1.5,
        1.5,
    ]


def test_coarsest_axis_stays_the_coarsest():
    spacings = np.array([[10, 1.5, 1.25]] * 8 + [[1, 1.5, 1.25]] * 2)
    assert median_target_spacing(ListedGeometry(spacings, np.array([[9, 256, 216]] * 10)), 3).tolist() == [
        1.50001,
        1.5,
        1.25,
    ]


@pytest.mark.parametrize(
    ("spacing", "forward", "backward"),
    [
        ((3, 1, 1), [0, 1, 2], [0, 1, 2]),
        ((1, 1, 1), [0, 1, 2], [0, 1, 2]),
        ((1, 3, 1), [1, 0, 2], [1, 0, 2]),
        ((1, 2, 3), [2, 0, 1], [1, 2, 0]),
    ],
)
def test_coarsest_axis_goes_first_and_back(spacing, forward, backward):
    assert coarsest_axis_first(spacing) == (forward, backward)
    assert np.array(spacing)[forward][backward].tolist() == list(spacing)


def test_median_shape_is_that_after_resampling():
    shape = median_resampled_shape(ListedGeometry([(2, 1, 1), (4, 1, 1)], [(10, 20, 30), (10, 21, 30)]), (2, 1, 1))
    assert shape.tolist() == [15, 20.5, 30]


def test_initial_patch_is_cubic_in_mm_and_within_the_image():
    assert initial_patch_size((1, 1, 1), (500, 500, 500)).tolist() == [256, 256, 256]
    assert initial_patch_size((1, 1), (3000, 82.5)).tolist() == [2048, 82.5]
    assert initial_patch_size((4, 1, 1), (1000, 1000, 1000)).tolist() == [102, 406, 406]


def test_fine_axes_are_coarsened_first():
    assert coarsen(np.array([5.0, 1.0, 2.5])).tolist() == [5, 1.03, 2.5]
    assert coarsen(np.array([2.0, 1.0, 1.0])).tolist() == [2.06, 1.03, 1.03]
