"""Boxes read out of arrays."""

from __future__ import annotations

import blosc2
import numpy as np
import pytest
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2.training.dataloading.patch_reading import overlaps, read_box, read_sample

ARRAY = np.arange(2 * 4 * 5 * 6, dtype=np.float32).reshape(2, 4, 5, 6) + 1

corners = st.tuples(*[st.integers(-7, 7)] * 3)
sizes = st.tuples(*[st.integers(1, 12)] * 3)


@given(corners, sizes)
def test_a_box_is_what_the_library_cuts_out(lower, size):
    upper = [low + length for low, length in zip(lower, size)]
    expected = crop_and_pad_nd(ARRAY, [list(pair) for pair in zip(lower, upper)], -1)
    assert np.array_equal(read_box(ARRAY, lower, upper, pad_value=-1, dtype=np.float32), expected)


@pytest.mark.parametrize("lower", [(0, 0, 0), (-1, 2, 3), (1, -3, 4)])
def test_a_compressed_array_and_a_memory_map_give_the_same_box(lower, tmp_path):
    np.save(tmp_path / "array.npy", ARRAY)
    upper = [low + 3 for low in lower]
    expected = read_box(ARRAY, lower, upper, pad_value=-1, dtype=np.int16)
    for array in (blosc2.asarray(ARRAY), np.load(tmp_path / "array.npy", mmap_mode="r")):
        assert np.array_equal(read_box(array, lower, upper, pad_value=-1, dtype=np.int16), expected)


def test_a_box_shares_no_memory_with_its_array(tmp_path):
    array = ARRAY.copy()
    read_box(array, (0, 0, 0), (4, 5, 6), pad_value=0, dtype=np.float32)[:] = 0
    assert np.array_equal(array, ARRAY)


def test_boxes_overlap_if_they_have_a_voxel_in_common():
    assert overlaps((-3,), (1,), (4,))
    assert not overlaps((-3,), (0,), (4,))
    assert not overlaps((4, 0), (6, 1), (4, 4))


def test_a_sample_is_padded_with_zeros_and_with_outside():
    labels = np.ones((1, 4, 5, 6), np.int8)
    image, seg = read_sample(ARRAY, labels, labels[0] * 2, (-1, 0, 0), (1, 2, 2))
    assert image.shape == (2, 2, 2, 2)
    assert (image[:, 0] == 0).all() and (image[:, 1] > 0).all()
    assert seg[:, 0].tolist() == [[[-1, -1], [-1, -1]], [[-1, -1], [-1, -1]]]
    assert seg[:, 1].tolist() == [[[1, 1], [1, 1]], [[2, 2], [2, 2]]]
    assert str(seg.dtype) == "torch.int16"
