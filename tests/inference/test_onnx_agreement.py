"""The check of the benchmark on ONNX fails where it has to."""

import re

import numpy as np
import pytest

from benchmarks.onnx_prediction import compare_maps, find_faults


def make_maps(side: int = 100) -> np.ndarray:
    labels = np.zeros((side, side), np.uint8)
    labels[:30] = 1
    labels[:4, :25] = 2
    return labels


def test_equal_label_maps_have_no_fault():
    found = compare_maps([(make_maps(), make_maps())])
    assert found.same == found.least_dice == 1 and found.shares == {0: 0.7, 1: 0.29, 2: 0.01}
    assert find_faults(found, 0.5) == []


@pytest.mark.parametrize(("label", "text"), [(0, r"label \[0\] only"), (1, r"label \[1\] only")])
def test_a_network_that_predicts_one_label_is_refused(label, text):
    one = np.full((4, 5), label)
    (fault,) = find_faults(compare_maps([(one, one)]), 0.5)
    assert re.search(text, fault)


@pytest.mark.parametrize("num_voxels", [11, 100])
def test_voxels_that_differ_are_a_fault(num_voxels):
    other = make_maps()
    other.ravel()[-num_voxels:] = 1
    assert any("% of voxels agree" in fault for fault in find_faults(compare_maps([(make_maps(), other)]), 0.5))


def test_a_small_label_that_differs_is_a_fault_though_nearly_all_voxels_agree():
    other = make_maps()
    other[0, :5] = 1
    found = compare_maps([(make_maps(), other)])
    assert found.same > 0.999 and find_faults(found, 0.5) == ["a label agrees with a Dice of 0.974, wanted 0.99"]


@pytest.mark.parametrize("ratio", [1.21, float("nan")])
def test_more_time_than_is_wanted_is_a_fault(ratio):
    assert "wanted 1.2 at most" in find_faults(compare_maps([(make_maps(), make_maps())]), ratio)[0]
