import numpy as np
import pytest
import torch

from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg
from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet, resample_torch_simple


def test_images_agree_with_the_default_linear_function():
    data = np.random.default_rng(0).normal(size=(2, 6, 7, 8)).astype(np.float32)
    result = resample_torch_simple(data, (9, 14, 5))
    np.testing.assert_allclose(result, resample_data_or_seg(data, (9, 14, 5), order=1), atol=1e-5)
    assert result.dtype == np.float32


def test_slices_are_resampled_in_plane_then_repeated():
    data = np.random.default_rng(0).normal(size=(2, 4, 7, 8)).astype(np.float32)
    result = resample_torch_fornnunet(data, (8, 9, 10), (5, 1, 1), (2.5, 1, 1))
    expected = resample_data_or_seg(data, (8, 9, 10), axis=0, order=1, do_separate_z=True)
    np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_any_axis_may_be_the_long_one(axis):
    spacing = [1.0, 1.0, 1.0]
    spacing[axis] = 5.0
    data = torch.rand(2, 4, 5, 6)
    new = [6, 8, 10]
    result = resample_torch_fornnunet(data, new, spacing, (1, 1, 1))
    assert tuple(result.shape) == (2, *new)
    axis_first = [new[axis], *(n for a, n in enumerate(new) if a != axis)]
    swapped = resample_torch_fornnunet(data.movedim(axis + 1, 1), axis_first, (5, 1, 1), (1, 1, 1))
    torch.testing.assert_close(result, swapped.movedim(1, axis + 1))


@pytest.mark.parametrize("memefficient", [False, True])
def test_labels_keep_their_values(memefficient):
    labels = torch.zeros(1, 4, 6, 8, dtype=torch.int16)
    labels[:, 1:3, 2:5, 2:6] = 3
    labels[:, :, :, 0] = 150
    result = resample_torch_simple(labels, (8, 12, 16), is_seg=True, memefficient_seg_resampling=memefficient)
    assert result.dtype == torch.int16
    assert set(result.unique().tolist()) == {0, 3, 150}
    assert resample_torch_simple(labels.clamp(max=3), (8, 12, 16), is_seg=True).dtype == torch.int8


def test_equal_shape_returns_the_same_object():
    data = torch.rand(1, 2, 3, 4)
    assert resample_torch_simple(data, (2, 3, 4)) is data


def test_threads_are_restored_after_errors():
    before = torch.get_num_threads()
    with pytest.raises(NotImplementedError):
        resample_torch_simple(torch.rand(1, 2, 3, 4), (4, 4, 4), num_threads=before + 1, mode="no such mode")
    assert torch.get_num_threads() == before


def test_wrong_shapes_are_refused():
    with pytest.raises(AssertionError):
        resample_torch_fornnunet(torch.rand(2, 3, 4), (2, 3, 4), (1, 1, 1), (1, 1, 1))
    with pytest.raises(AssertionError):
        resample_torch_simple(torch.rand(2, 3), (4,))
