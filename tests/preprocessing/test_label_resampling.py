import numpy as np
import pytest
from batchgenerators.augmentations.utils import resize_segmentation
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2.preprocessing.resampling.label_resampling import find_mixed_cells, resample_labels


def blobs(shape, num_labels, seed=0, sigma=4.0, dtype=np.int8):
    from scipy.ndimage import gaussian_filter

    smooth = gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma)
    borders = np.quantile(smooth, np.linspace(0, 1, num_labels + 1)[1:-1])
    return (np.digitize(smooth, borders) - 1).astype(dtype)


def test_doubling_a_row_moves_no_border():
    row = np.array([[0, 0, 3, 3]])
    assert resample_labels(row, (1, 8), 1).tolist() == [[0, 0, 0, 0, 3, 3, 3, 3]]


def test_labels_in_between_never_appear():
    assert set(np.unique(resample_labels(np.array([[0, 5, 0, 9]]), (1, 11), 1))) == {0, 5, 9}


def test_the_nearest_voxel_wins_an_exact_tie():
    # Halving puts outputs midway between two voxels; scipy's nearest is the upper one.
    assert resample_labels(np.array([[1, 2, 4, 3]]), (1, 2), 1).tolist() == [[2, 3]]


def test_the_smallest_label_wins_a_tie_without_the_nearest():
    # One voxel midway between four: label 1 is nearest with a quarter, 5 has a half.
    assert resample_labels(np.array([[5, 7], [5, 1]]), (1, 1), 1).tolist() == [[5]]
    # Eight corners: 6 and 4 have three each, the nearest, 9, has two.
    assert resample_labels(np.array([[[6, 4], [6, 4]], [[6, 4], [9, 9]]]), (1, 1, 1), 1).item() == 4


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((20, 31, 17), (40, 62, 34)),
        ((20, 31, 17), (33, 29, 40)),
        ((24, 30, 18), (12, 15, 9)),
        ((30, 40), (77, 21)),
        ((1, 40, 50), (1, 80, 33)),
        ((9, 8, 7), (9, 8, 14)),
    ],
)
def test_agrees_with_batchgenerators_on_smooth_objects(old, new, order):
    labels = blobs(old, 6)
    expected = resize_segmentation(labels, new, order)
    result = resample_labels(labels, new, order)
    assert result.dtype == labels.dtype
    # What remains are ties that one rounding error decides.
    assert np.mean(result != expected) <= 1e-4


@pytest.mark.parametrize("new", [(24, 20, 28), (36, 30, 42), (12, 10, 14), (6, 5, 7), (17, 13, 9), (5, 23, 31)])
def test_the_same_labels_win_ties_as_in_batchgenerators(new):
    noise = np.random.default_rng(0).integers(-1, 5, (12, 10, 14)).astype(np.int16)
    np.testing.assert_array_equal(resample_labels(noise, new, 1), resize_segmentation(noise, new, 1))


@settings(max_examples=50, deadline=None)
@given(st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.integers(1, 9)] * 3), st.integers(0, 3), st.integers(0, 99))
def test_only_labels_of_the_input_appear(old, new, order, seed):
    labels = np.random.default_rng(seed).integers(-1, 4, old).astype(np.float32)
    before = labels.copy()
    result = resample_labels(labels, new, order)
    assert result.shape == new
    assert set(np.unique(result)) <= set(np.unique(labels))
    np.testing.assert_array_equal(labels, before)


def test_mixed_cells_by_hand():
    labels = np.array([[1, 1, 1], [1, 1, 2]])
    assert find_mixed_cells(labels).tolist() == [[False, True]]
    assert find_mixed_cells(np.array([[1, 1, 2]])).tolist() == [[False, True]]


def test_many_slabs_and_chunks_give_the_same_labels(monkeypatch):
    from nnunetv2.preprocessing.resampling import label_resampling

    labels = np.random.default_rng(0).integers(0, 9, (11, 12, 13))
    expected = resample_labels(labels, (20, 17, 19), 1)
    monkeypatch.setattr(label_resampling, "_SLAB_VOXELS", 700)
    monkeypatch.setattr(label_resampling, "_VOTERS", 100)
    np.testing.assert_array_equal(resample_labels(labels, (20, 17, 19), 1), expected)


def test_constant_and_empty_maps():
    assert (resample_labels(np.full((3, 4, 5), 7), (6, 2, 9), 1) == 7).all()
    assert resample_labels(np.zeros((0, 4), np.int8), (3, 3), 1).tolist() == [[0, 0, 0]] * 3
