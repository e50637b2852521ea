"""Tests of distances between surfaces."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nnunetv2.evaluation.surface_distances import compute_surface_metrics, find_surface
from nnunetv2.evaluation.surface_scores import score_surfaces


def ball(radius, shape=(48, 48, 48), spacing=(1.0, 1.0, 1.0), shift=0.0):
    grid = [(np.arange(n) - (n - 1) / 2) * size for n, size in zip(shape, spacing)]
    grid[0] = grid[0] - shift
    return sum(axis**2 for axis in np.meshgrid(*grid, indexing="ij")) < radius**2


def slab(start, stop, shape=(30, 12, 14)):
    mask = np.zeros(shape, dtype=bool)
    mask[start:stop] = True
    return mask


def test_equal_masks_have_no_distance():
    assert compute_surface_metrics(ball(9), ball(9), (1, 1, 1), 0) == {"HD95": 0, "ASSD": 0, "SurfaceDice": 1}


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 1.0, 0.5)])
def test_shells_of_two_balls_have_the_difference_of_their_radii(spacing):
    shape = [int(48 / size) for size in spacing]
    metrics = compute_surface_metrics(ball(14, shape, spacing), ball(19, shape, spacing), spacing, 6)
    assert metrics["ASSD"] == pytest.approx(5, rel=0.05)
    assert metrics["HD95"] == pytest.approx(5, rel=0.1)
    assert metrics["SurfaceDice"] == 1


@pytest.mark.slow
def test_walls_that_move_away():
    # one of the two large walls moves by 4 voxels of 1.5 mm; edges and side walls weigh little
    wide = {"shape": (30, 200, 200)}
    metrics = compute_surface_metrics(slab(5, 15, **wide), slab(5, 19, **wide), (1.5, 1, 1), 5.9)
    assert metrics["HD95"] == pytest.approx(6, abs=0.01)
    # 2 x 40000 mm^2 at 6 mm, and 4800 mm^2 of side walls at 3 mm on average, of 188800 mm^2 in all
    assert metrics["ASSD"] == pytest.approx(2.62, rel=0.05)
    assert metrics["SurfaceDice"] == pytest.approx(0.57, abs=0.03)
    assert compute_surface_metrics(slab(5, 15, **wide), slab(5, 19, **wide), (1.5, 1, 1), 6.1)["SurfaceDice"] > 0.99


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (4.0, 1.0, 2.0)])
def test_the_area_of_a_box(spacing):
    mask = np.zeros((40, 30, 20), dtype=bool)
    mask[5:35, 5:25, 5:15] = True
    a, b, c = (n * size for n, size in zip((30, 20, 10), spacing))
    assert find_surface(mask, spacing).areas.sum() == pytest.approx(2 * (a * b + b * c + a * c), rel=0.05)


def test_a_part_beyond_the_border_of_the_image_has_a_surface_there():
    assert find_surface(np.ones((2, 3, 4), dtype=bool), (1, 1, 1)).areas.sum() > 30


def test_lines_in_images_of_one_slice():
    reference, prediction = np.zeros((2, 1, 40, 40))
    reference[0, 10:20, 10:20] = 1
    prediction[0, 10:20, 13:23] = 1
    scores = score_surfaces(reference, prediction, [1], (999.0, 1.0, 2.0), 6)[1]
    assert scores["HD95"] == pytest.approx(6) and scores["SurfaceDice"] == 1


def test_results_do_not_depend_on_which_map_is_which():
    one, other = ball(9), ball(11, shift=3)
    assert compute_surface_metrics(one, other, (1, 2, 3), 1) == pytest.approx(
        compute_surface_metrics(other, one, (1, 2, 3), 1)
    )


def test_without_a_surface_there_is_no_distance():
    empty, full = np.zeros((3, 4, 5), bool), np.ones((3, 4, 5), bool)
    assert all(math.isnan(value) for value in compute_surface_metrics(empty, empty, (1, 1, 1), 1).values())
    for pair in ((empty, full), (full, empty)):
        metrics = compute_surface_metrics(*pair, (1, 1, 1), 1)
        assert math.isnan(metrics["HD95"]) and math.isnan(metrics["ASSD"]) and metrics["SurfaceDice"] == 0


def test_classes_regions_and_ignored_voxels():
    reference = np.zeros((8, 20, 20))
    reference[2:6, 2:8, 2:8], reference[2:6, 8:14, 2:8] = 1, 2
    prediction = reference.copy()
    prediction[:, :, 15:] = 1
    scores = score_surfaces(reference, prediction, [1, (1, 2), 5], (1, 1, 1), 1)
    assert scores[1]["HD95"] > 5 and math.isnan(scores[5]["HD95"])
    reference[:, :, 15:] = 3
    scores = score_surfaces(reference, prediction, [1, (1, 2)], (1, 1, 1), 1, ignore_label=3)
    assert scores[1]["HD95"] == 0 and scores[1, 2]["SurfaceDice"] == 1
