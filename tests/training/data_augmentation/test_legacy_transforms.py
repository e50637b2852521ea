"""Batched transforms that third parties import."""

from __future__ import annotations

import numpy as np
import pytest

from nnunetv2.training.data_augmentation.custom_transforms.cascade_transforms import (
    ApplyRandomBinaryOperatorTransform,
    MoveSegAsOneHotToData,
    RemoveRandomConnectedComponentFromOneHotEncodingTransform,
    ball,
    closing,
    dilation,
    erosion,
    opening,
)
from nnunetv2.training.data_augmentation.custom_transforms.deep_supervision_donwsampling import (
    DownsampleSegForDSTransform2,
)
from nnunetv2.training.data_augmentation.custom_transforms.masking import MaskTransform
from nnunetv2.training.data_augmentation.custom_transforms.region_based_training import (
    ConvertSegmentationToRegionsTransform,
)
from nnunetv2.training.data_augmentation.custom_transforms.transforms_for_dummy_2d import (
    Convert2DTo3DTransform,
    Convert3DTo2DTransform,
)


def test_voxels_outside_are_masked():
    seg = np.array([[[-1, 0, 1]]])
    result = MaskTransform([1], set_outside_to=7)(data=np.ones((1, 2, 3)), seg=seg)
    assert result["data"].tolist() == [[[1, 1, 1], [7, 1, 1]]]


def test_regions_are_uint8_maps():
    result = ConvertSegmentationToRegionsTransform([(1, 2), 2])(seg=np.array([[[0, 1, 2]]]))["seg"]
    assert result.dtype == np.uint8
    assert result.tolist() == [[[0, 1, 1], [0, 0, 1]]]


def test_slices_become_channels_and_back():
    data = np.arange(2 * 3 * 4 * 5 * 6).reshape(2, 3, 4, 5, 6)
    flat = Convert3DTo2DTransform(["data"])(data=data)
    assert flat["data"].shape == (2, 12, 5, 6) and flat["orig_shape_data"] == data.shape
    cropped = {**flat, "data": flat["data"][..., :2]}
    back = Convert2DTo3DTransform(["data"])(**cropped)
    assert np.array_equal(back["data"], data[..., :2]) and back["orig_shape_data"] == data.shape


def test_targets_are_made_for_each_scale():
    seg = np.kron(np.array([[[[1, 2], [3, 4]]]]), np.ones((4, 4))).astype(np.int16)
    full, half, flat = DownsampleSegForDSTransform2([1, (0.5, 0.5), (1, 0.5)])(seg=seg)["seg"]
    assert full is seg
    assert half.shape == (1, 1, 4, 4) and half[0, 0, ::2, ::2].tolist() == [[1, 2], [3, 4]]
    assert flat.shape == (1, 1, 8, 4) and half.dtype == seg.dtype


def test_a_scale_needs_an_entry_per_axis():
    with pytest.raises(ValueError, match="3 entries for 2 axes"):
        DownsampleSegForDSTransform2([(1, 1, 0.5)])(seg=np.zeros((1, 1, 4, 4)))


def test_labels_move_to_channels_of_the_image():
    data, seg = np.zeros((1, 1, 3), np.float32), np.array([[[9, 9, 9], [0, 1, 2]]])
    result = MoveSegAsOneHotToData(1, [1, 2])(data=data, seg=seg)
    assert result["data"].tolist() == [[[0, 0, 0], [0, 1, 0], [0, 0, 1]]]
    assert result["data"].dtype == np.float32
    assert result["seg"].tolist() == [[[9, 9, 9]]]


@pytest.fixture
def two_squares() -> np.ndarray:
    data = np.zeros((1, 3, 12, 12), np.float32)
    data[0, 1, 1:3, 1:3] = 1
    data[0, 1, 6:11, 6:11] = 1
    return data


def test_a_small_component_is_removed_and_a_large_one_stays(two_squares):
    transform = RemoveRandomConnectedComponentFromOneHotEncodingTransform(
        [1, 2], p_per_sample=1, fill_with_other_class_p=1, dont_do_if_covers_more_than_x_percent=0.05
    )
    moved = 0
    for _ in range(20):  # classes come in a random order, so a component may be moved there and back
        result = transform(data=two_squares.copy())["data"][0]
        assert (result[1, 6:11, 6:11] == 1).all() and result[1].sum() + result[2].sum() == 29
        moved += result[2].sum() == 4 and (result[2, 1:3, 1:3] == 1).all()
    assert moved


def test_probability_zero_changes_nothing(two_squares):
    before = two_squares.copy()
    for transform_class in (
        RemoveRandomConnectedComponentFromOneHotEncodingTransform,
        ApplyRandomBinaryOperatorTransform,
    ):
        assert np.array_equal(transform_class(1, p_per_sample=0)(data=two_squares)["data"], before)


def test_a_grown_label_takes_its_voxels_from_the_others(two_squares):
    np.random.seed(0)
    two_squares[0, 2, :, 5] = 1
    transform = ApplyRandomBinaryOperatorTransform(
        [1, 2], p_per_sample=1, any_of_these=(dilation,), strel_size=(1, 2), p_per_label=1
    )
    labels = transform(data=two_squares)["data"][0, 1:]
    assert labels.sum() > 41
    assert labels.sum(0).max() == 1


def test_operators_on_a_hand_checked_mask():
    mask = np.zeros((5, 7), bool)
    mask[1:4, 1:6] = True
    mask[2, 3] = False
    assert closing(mask, ball(1, 2))[2, 3]
    assert dilation(mask, ball(1, 2)).sum() == 15 + 16
    assert opening(mask | (np.indices(mask.shape).sum(0) == 0), ball(1, 2))[0, 0] == 0
    assert erosion(np.ones((3, 3), bool), ball(1, 2)).all()
    assert ball(1, 3).sum() == 7 and ball(2, 2).shape == (5, 5)
