"""What dataset.json says of classes that a site does not annotate."""

from __future__ import annotations

import numpy as np
import pytest

from nnunetv2.errors import InvalidInputError
from nnunetv2.plans.label_manager import LabelManager
from nnunetv2.plans.partial_labels import (
    as_in_raw_data,
    common_numbers,
    renumber,
    scored_classes,
    unannotated_labels,
    with_union,
    without_raw_values,
)

RAW = {"labels": {"background": 0, "spleen": 1, "liver": 2, "ignore": 3}, "file_ending": ".png"}
UNION = {"background": 0, "liver": 1, "kidney": 2, "spleen": 3, "ignore": 4}
JOINT = with_union(RAW, UNION)


def test_a_site_says_what_it_annotates_and_how_its_files_call_it():
    assert JOINT["labels"] == UNION
    assert JOINT["annotated_labels"] == ["background", "spleen", "liver", "ignore"]
    assert JOINT["values_in_raw_data"] == RAW["labels"]
    assert as_in_raw_data(JOINT) == RAW and as_in_raw_data(RAW) == RAW
    assert "values_in_raw_data" not in without_raw_values(JOINT)


def test_classes_of_others_are_neither_annotated_nor_scored():
    assert unannotated_labels(JOINT) == (2,)
    assert scored_classes(LabelManager(UNION, None), JOINT) == [1, 3]
    assert unannotated_labels(RAW) == ()
    assert scored_classes(LabelManager(RAW["labels"], None), RAW) == [1, 2]


def test_regions_are_scored_as_ever():
    labels = {"background": 0, "whole": [1, 2], "core": 2}
    assert scored_classes(LabelManager(labels, [1, 2]), {"labels": labels}) == [(1, 2), 2]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_values_become_common_numbers(dtype):
    found = renumber(np.array([[0, 1], [2, 3]], dtype), common_numbers(JOINT))
    assert found.tolist() == [[0, 3], [1, 4]]


def test_equal_values_are_left_alone():
    same = with_union({**RAW, "labels": {"background": 0, "liver": 1}}, UNION)
    assert common_numbers(same) == {} == common_numbers(RAW)
    values = np.array([0, 1, 7])
    assert renumber(values, {}) is values


def test_numbers_that_a_files_dtype_cannot_hold_get_a_larger_one():
    assert renumber(np.array([0, 1], np.uint8), {0: 0, 1: 300}).tolist() == [0, 300]


def test_a_value_without_a_name_is_refused():
    with pytest.raises(InvalidInputError, match=r"the value 9, which 'labels' .* does not name: expected 0, 1, 2, 3"):
        renumber(np.array([0, 9]), common_numbers(JOINT))
