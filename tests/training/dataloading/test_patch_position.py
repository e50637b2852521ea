"""Where patches are cut out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2.training.dataloading.patch_position import (
    corner_around,
    corner_range,
    draw_class,
    draw_corner,
    draw_voxel,
)

ANNOTATED = (-1, 0, 1)


@pytest.mark.parametrize(
    ("shape", "patch", "pad", "smallest", "largest"),
    [
        (20, 8, 0, 0, 12),
        (20, 8, 3, -2, 14),  # 3 voxels to pad: 2 may come before, and 2 after
        (20, 8, 4, -2, 14),
        (5, 8, 0, -2, -1),  # an image smaller than the patch: 3 voxels of padding
        (5, 8, 6, -3, 0),
        (8, 8, 0, 0, 0),
    ],
)
def test_the_range_of_corners_leaves_room_for_the_padding(shape, patch, pad, smallest, largest):
    assert corner_range([shape], [patch], [pad]) == ([smallest], [largest])


@given(st.integers(1, 60), st.integers(2, 60), st.integers(-20, 40))
def test_there_is_always_a_corner_and_its_patch_touches_the_image(length, patch, pad):
    (smallest,), (largest,) = corner_range([length], [patch], [min(pad, patch)])
    assert smallest <= largest
    assert smallest + patch > 0
    assert largest < length


def test_corners_are_drawn_from_the_whole_range():
    np.random.seed(0)
    assert {tuple(draw_corner([-1, 3], [1, 3])) for _ in range(200)} == {(-1, 3), (0, 3), (1, 3)}


def test_classes_that_occur_have_the_same_chance():
    np.random.seed(0)
    locations = {1: np.zeros((1, 4)), (1, 2): np.zeros((1000, 4)), 3: [], ANNOTATED: np.zeros((5, 4))}
    drawn = [draw_class(locations, ANNOTATED) for _ in range(400)]
    assert set(drawn) == {1, (1, 2)}
    assert 150 < drawn.count(1) < 250


def test_annotated_voxels_stand_in_where_no_class_occurs():
    assert draw_class({1: [], ANNOTATED: np.zeros((5, 4))}, ANNOTATED) == ANNOTATED
    assert draw_class({1: [], ANNOTATED: []}, ANNOTATED) is None
    assert draw_class({}, ANNOTATED) is None


def test_a_wanted_class_is_taken_if_it_occurs():
    locations = {1: np.zeros((1, 4)), 2: np.zeros((1, 4)), 3: []}
    assert all(draw_class(locations, ANNOTATED, 2) == 2 for _ in range(20))
    assert draw_class(locations, ANNOTATED, 3) in (1, 2)
    with pytest.raises(KeyError):
        draw_class(locations, ANNOTATED, 4)


def test_a_voxel_comes_without_its_channel():
    assert draw_voxel(np.array([[0, 3, 4, 5]])) == [3, 4, 5]


def test_a_patch_is_centred_on_its_voxel_but_not_moved_back_at_the_far_end():
    assert corner_around([10], [8], [0]) == [6]
    assert corner_around([1], [8], [-2]) == [-2]
    assert corner_around([19], [8], [0]) == [15]
    assert corner_around([19], [8], [0], [12]) == [12]
