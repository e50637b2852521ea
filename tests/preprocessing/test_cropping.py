import numpy as np
import pytest

from nnunetv2.preprocessing.cropping.cropping import create_nonzero_mask, crop_to_nonzero


def test_box_encloses_every_channel():
    data = np.zeros((2, 6, 8, 10), np.float32)
    data[0, 2, 3, 4] = 1
    data[1, 4, 3, 7] = -1
    cropped, _, bbox = crop_to_nonzero(data)
    assert bbox == [[2, 5], [3, 4], [4, 8]]
    assert all(type(end) is int for side in bbox for end in side)
    np.testing.assert_array_equal(cropped, data[:, 2:5, 3:4, 4:8])


def test_holes_belong_to_the_mask_and_bays_do_not():
    data = np.zeros((1, 7, 7, 7), np.float32)
    data[0, 1:6, 1:6, 1:6] = 1
    data[0, 3, 3, 3] = 0  # a hole
    data[0, 1, 1, 1] = 0  # a bay
    _, seg, _ = crop_to_nonzero(data)
    assert seg.dtype == np.int8
    assert seg[0, 2, 2, 2] == 0
    assert seg[0, 0, 0, 0] == -1
    assert (seg == -1).sum() == 1
    mask = create_nonzero_mask(data)
    assert mask.shape == (7, 7, 7)
    assert mask.sum() == 5**3 - 1


def test_a_hollow_that_touches_the_image_border_is_no_hole():
    data = np.ones((1, 5, 5, 5), np.float32)
    data[0, 0:3, 2, 2] = 0
    assert not create_nonzero_mask(data)[1, 2, 2]


@pytest.mark.parametrize("seed", range(5))
def test_mask_equals_scipys_on_the_full_volume(seed):
    from scipy.ndimage import binary_fill_holes

    data = (np.random.default_rng(seed).random((1, 9, 10, 11)) > 0.4).astype(np.float32)
    data[:, :2], data[:, :, -1:] = 0, 0
    np.testing.assert_array_equal(create_nonzero_mask(data), binary_fill_holes(data[0] != 0))


def test_only_background_outside_the_mask_is_marked():
    data = np.zeros((1, 4, 5, 6), np.float32)
    data[0, 1:3, 1:4, 1:5] = 7
    data[0, 1, 1, 1:3] = 0
    seg = np.zeros((1, 4, 5, 6), np.float32)
    seg[0, 1, 1, 1] = 2
    before = seg.copy()
    _, cropped, _ = crop_to_nonzero(data, seg)
    assert cropped.dtype == seg.dtype
    assert cropped[0, 0, 0, 0] == 2
    assert cropped[0, 0, 0, 1] == -1
    assert (cropped == -1).sum() == 1
    np.testing.assert_array_equal(seg, before)


def test_an_image_of_zeros_keeps_its_extent():
    cropped, seg, bbox = crop_to_nonzero(np.zeros((1, 3, 4, 5), np.float32))
    assert bbox == [[0, 3], [0, 4], [0, 5]]
    assert cropped.shape == (1, 3, 4, 5)
    assert (seg == -1).all()


@pytest.mark.parametrize("error", [ValueError, AssertionError])
def test_wrong_number_of_axes_is_refused(error):
    with pytest.raises(error, match="got shape"):
        create_nonzero_mask(np.zeros((4, 4)))
    with pytest.raises(error, match="differ in shape"):
        crop_to_nonzero(np.ones((1, 2, 3, 4)), np.ones((1, 2, 3, 5)))
