"""Labels, regions and the ignore label."""

import pickle
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2.utilities.label_handling.label_handling import (
    LabelManager,
    convert_labelmap_to_one_hot,
    determine_num_input_channels,
    get_labelmanager_class_from_plans,
)
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

PLAIN = {"background": 0, "liver": 1, "tumour": 2}
REGIONS = {"background": 0, "whole": (1, 2, 3), "core": [2, 3], "enhancing": 3}


def test_plain_labels():
    manager = LabelManager(PLAIN, None)
    assert not manager.has_regions and not manager.has_ignore_label
    assert manager.ignore_label is None and manager.all_regions is None
    assert manager.all_labels == [0, 1, 2] and isinstance(manager.all_labels[0], np.integer)
    assert manager.foreground_labels == [1, 2]
    assert manager.num_segmentation_heads == 3
    with pytest.raises(TypeError, match="no regions"):
        manager.foreground_regions  # noqa: B018


def test_regions():
    manager = LabelManager(REGIONS, [1, 2, 3])
    assert manager.has_regions
    assert manager.all_labels == [0, 1, 2, 3]
    assert manager.all_regions == manager.foreground_regions == [(1, 2, 3), (2, 3), 3]
    assert manager.num_segmentation_heads == 3


def test_a_list_of_one_label_is_no_region():
    manager = LabelManager({"background": 0, "a": [3]}, None)
    assert not manager.has_regions
    assert manager.all_labels == [0, 3]


def test_ignore_label():
    manager = LabelManager({**PLAIN, "ignore": 3}, None)
    assert manager.has_ignore_label and manager.ignore_label == 3
    assert manager.all_labels == [0, 1, 2] and manager.num_segmentation_heads == 3
    assert LabelManager({**REGIONS, "ignore": 4}, [1, 2, 3]).foreground_regions == [(1, 2, 3), (2, 3), 3]


def test_regions_can_be_read_as_labels():
    manager = LabelManager(REGIONS, [1, 2, 3], force_use_labels=True)
    assert not manager.has_regions and manager.num_segmentation_heads == 4


@pytest.mark.parametrize(
    ("labels", "order", "error"),
    [
        ({"liver": 1}, None, RuntimeError),
        ({"background": [0, 1], "liver": 1}, None, RuntimeError),
        ({"background": 1, "liver": 2}, None, AssertionError),
        ({**PLAIN, "ignore": 4}, None, AssertionError),
        ({**PLAIN, "ignore": 3.0}, None, AssertionError),
        (REGIONS, None, AssertionError),
        (REGIONS, [1, 2], AssertionError),
    ],
)
def test_nonsense_is_refused(labels, order, error):
    with pytest.raises(error, match="dataset.json"):
        LabelManager(labels, order)


def test_lists_handed_out_are_copies():
    manager = LabelManager(PLAIN, None)
    manager.all_labels.append(9)
    manager.foreground_labels.append(9)
    assert manager.all_labels == [0, 1, 2]


def test_filter_background():
    assert LabelManager.filter_background([0, 1, (0,), (0, 0), (0, 1), [2]]) == [1, (0, 1), [2]]


def test_nonlinearities():
    logits = np.array([[0.0], [2.0]], np.float16)
    softmax = LabelManager({"background": 0, "a": 1}, None).apply_inference_nonlin(logits)
    assert softmax.dtype == torch.float32 and softmax[1, 0] == pytest.approx(1 / (1 + np.exp(-2)))
    sigmoid = LabelManager({"background": 0, "a": (1, 2), "b": 2}, [1, 2]).apply_inference_nonlin(torch.tensor(logits))
    assert sigmoid[0, 0] == 0.5 and not sigmoid.requires_grad
    identity = LabelManager(PLAIN, None, inference_nonlin=lambda x: x)
    assert identity.apply_inference_nonlin(logits)[1, 0] == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_largest_channel_wins_and_the_first_of_equals(dtype):
    manager = LabelManager(PLAIN, None)
    probabilities = torch.tensor([[0.2, 0.5, 0.1], [0.5, 0.5, 0.1], [0.3, 0.0, 0.8]], dtype=dtype)
    segmentation = manager.convert_probabilities_to_segmentation(probabilities)
    assert segmentation.dtype == torch.int64 and segmentation.tolist() == [1, 0, 2]
    if dtype != torch.bfloat16:
        array = manager.convert_probabilities_to_segmentation(probabilities.numpy())
        assert array.dtype == np.int64 and array.tolist() == [1, 0, 2]


def test_later_regions_are_painted_over_earlier_ones():
    manager = LabelManager(REGIONS, [1, 2, 3])
    probabilities = np.array([[0.9, 0.9, 0.9, 0.5], [0.2, 0.6, 0.6, 0.5], [0.1, 0.2, 0.7, 0.5]])
    array = manager.convert_probabilities_to_segmentation(probabilities)
    tensor = manager.convert_probabilities_to_segmentation(torch.from_numpy(probabilities))
    assert array.dtype == np.uint16 and tensor.dtype == torch.int16
    assert array.tolist() == tensor.tolist() == [1, 2, 3, 0]


def test_logits_of_arrays_give_arrays():
    for manager in (LabelManager(PLAIN, None), LabelManager(REGIONS, [1, 2, 3])):
        logits = np.random.default_rng(0).normal(size=(3, 4, 5, 6)).astype(np.float32)
        array = manager.convert_logits_to_segmentation(logits)
        tensor = manager.convert_logits_to_segmentation(torch.from_numpy(logits))
        assert isinstance(array, np.ndarray) and isinstance(tensor, torch.Tensor)
        expected = manager.convert_probabilities_to_segmentation(manager.apply_inference_nonlin(logits))
        assert np.array_equal(array, tensor) and np.array_equal(array, expected)


def test_wrong_probabilities_are_refused():
    manager = LabelManager(PLAIN, None)
    with pytest.raises(AssertionError, match=r"\(2, 5\)"):
        manager.convert_probabilities_to_segmentation(np.zeros((2, 5)))
    with pytest.raises(RuntimeError, match="list"):
        manager.convert_probabilities_to_segmentation([[0.0]])


@pytest.mark.parametrize("make", [np.asarray, torch.tensor])
def test_uncropping(make):
    cropped = make(np.full((3, 1, 2), 0.25, np.float16))
    full = LabelManager(PLAIN, None).revert_cropping_on_probabilities(cropped, [[1, 2], [0, 2]], (3, 2))
    assert full.dtype == cropped.dtype
    assert full.tolist() == [[[1, 1], [0.25, 0.25], [1, 1]]] + 2 * [[[0, 0], [0.25, 0.25], [0, 0]]]
    regions = LabelManager(REGIONS, [1, 2, 3]).revert_cropping_on_probabilities(cropped, [[1, 2], [0, 2]], (3, 2))
    assert regions.sum() == 1.5


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20))
def test_one_hot_is_undone_by_argmax(voxels):
    segmentation = np.array(voxels)
    labels = [0, 1, 2, 3, 4]
    one_hot = convert_labelmap_to_one_hot(segmentation, labels)
    assert one_hot.dtype == np.uint8 and one_hot.sum() == len(voxels)
    assert np.array_equal(one_hot.argmax(0), segmentation)
    tensor = convert_labelmap_to_one_hot(torch.from_numpy(segmentation), labels)
    assert tensor.dtype == torch.uint8 and np.array_equal(tensor, one_hot)


def test_one_hot_of_any_labels():
    segmentation = torch.tensor([7, 300, 0])
    assert convert_labelmap_to_one_hot(segmentation, [7, 300]).tolist() == [[1, 0, 0], [0, 1, 0]]
    assert convert_labelmap_to_one_hot(segmentation.numpy(), [7, 300]).dtype == np.uint16
    assert convert_labelmap_to_one_hot(segmentation, [7], torch.float16).dtype == torch.float16
    assert convert_labelmap_to_one_hot(segmentation.numpy(), [7], bool).dtype == bool


def test_class_from_plans():
    assert get_labelmanager_class_from_plans({}) is LabelManager
    assert get_labelmanager_class_from_plans({"label_manager": "LabelManager"}) is LabelManager
    with pytest.raises(RuntimeError, match="LabelManagerTypo"):
        get_labelmanager_class_from_plans({"label_manager": "LabelManagerTypo"})


def test_input_channels_of_a_cascade():
    plans = PlansManager(
        {"label_manager": "LabelManager", "configurations": {"one": {}, "two": {"previous_stage": "one"}}}
    )
    dataset = {"channel_names": {"0": "CT", "1": "PET"}, "labels": PLAIN}
    assert determine_num_input_channels(plans, "one", dataset) == 2
    assert determine_num_input_channels(plans, plans.get_configuration("two"), dataset) == 4
    assert determine_num_input_channels(plans, "one", {"modality": {"0": "CT"}, "labels": PLAIN}) == 1


def test_manager_pickles():
    manager = pickle.loads(pickle.dumps(LabelManager(REGIONS, [1, 2, 3])))
    assert manager.foreground_regions == [(1, 2, 3), (2, 3), 3]


def test_labels_need_no_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert LabelManager(REGIONS, [1, 2, 3]).foreground_regions
    assert LabelManager(PLAIN, None).convert_logits_to_segmentation(np.eye(3)).tolist() == [0, 1, 2]
