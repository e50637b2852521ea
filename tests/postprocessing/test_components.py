"""Tests of keeping the largest component."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.measure import label

from nnunetv2.postprocessing.components import bounding_box, find_smaller_components
from nnunetv2.postprocessing.remove_connected_components import (
    apply_postprocessing,
    remove_all_but_largest_component_from_segmentation,
)

keep_largest = remove_all_but_largest_component_from_segmentation


def test_small_islands_become_background():
    labels = np.array([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 2, 2]])
    expected = [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 2, 2]]
    assert keep_largest(labels, 1).tolist() == expected
    assert labels[0, 3] == 1  # the input stays


def test_corners_connect():
    labels = np.zeros((2, 2, 2), dtype=np.uint8)
    labels[0, 0, 0] = labels[1, 1, 1] = 1
    assert np.array_equal(keep_largest(labels, 1), labels)


def test_components_of_equal_size_all_stay():
    labels = np.array([[1, 1, 0, 1, 1, 0, 1]])
    assert keep_largest(labels, 1).tolist() == [[1, 1, 0, 1, 1, 0, 0]]


def test_a_tuple_is_one_class_and_a_list_a_union():
    labels = np.array([[1, 2, 2, 0, 1, 0, 3]])
    assert keep_largest(labels, (1, 2)).tolist() == [[1, 2, 2, 0, 0, 0, 3]]
    assert keep_largest(labels, [(1, 2), 3]).tolist() == [[1, 2, 2, 0, 0, 0, 0]]
    assert keep_largest(labels, [1, 2, 3], background_label=9).tolist() == [[1, 2, 2, 0, 9, 0, 9]]


def test_nothing_to_keep_changes_nothing():
    labels = np.zeros((3, 4), dtype=np.float32)
    assert np.array_equal(keep_largest(labels, 1), labels) and keep_largest(labels, 1).dtype == np.float32


@pytest.mark.parametrize("shape", [(30, 31), (1, 20, 21), (9, 12, 11), (1, 9, 12, 11)])
@pytest.mark.parametrize("density", [0.05, 0.3])
def test_all_groups_at_once_are_as_one_after_the_other(shape, density):
    rng = np.random.default_rng(0)
    groups = (rng.integers(1, 4, shape) * (rng.random(shape) < density)).astype(np.uint8)
    expected = np.zeros(shape, dtype=bool)
    for group in (1, 2, 3):
        components = label(groups == group, connectivity=None)
        sizes = np.bincount(components.ravel())[1:]
        kept = 1 + np.flatnonzero(sizes == sizes.max(initial=0))
        expected |= (groups == group) & ~np.isin(components, kept)
    assert np.array_equal(find_smaller_components(groups), expected)


def test_four_real_axes_are_refused():
    with pytest.raises(ValueError, match="2D and 3D"):
        find_smaller_components(np.ones((2, 2, 2, 2), dtype=np.uint8))


def test_bounding_boxes():
    array = np.zeros((4, 5), dtype=int)
    assert bounding_box(array) is None
    array[1, 2] = array[3, 2] = 1
    assert bounding_box(array) == (slice(1, 4), slice(2, 3))


def test_functions_apply_in_order():
    steps = [lambda labels, add: labels + add, lambda labels, times: labels * times]
    assert apply_postprocessing(np.array([1]), steps, [{"add": 1}, {"times": 3}]).tolist() == [6]
