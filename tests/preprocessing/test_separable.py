"""Separable interpolation against scikit-image's, which computes every voxel from its 64 neighbours."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2.preprocessing.resampling.separable import (
    axis_bands,
    gather,
    nearest_indices,
    resample_image,
    resampled_slabs,
    sample_positions,
)


def resampled(image, new_shape, order, dtype=None):
    out = np.empty(new_shape, dtype or image.dtype)
    resample_image(image, new_shape, order, out)
    return out


def matrix(old, new, order):
    full = np.zeros((new, old))
    for band in axis_bands(old, new, order, np.float64):
        full[band.outputs, band.inputs] = band.weights if band.weights is not None else np.eye(len(full))[band.inputs]
    return full


def test_outer_edges_of_both_grids_coincide():
    np.testing.assert_allclose(sample_positions(2, 4), [-0.25, 0.25, 0.75, 1.25])
    np.testing.assert_allclose(sample_positions(4, 2), [0.5, 2.5])


def test_nearest_rounds_halves_up():
    assert nearest_indices(4, 2).tolist() == [1, 3]
    assert nearest_indices(3, 6).tolist() == [0, 0, 1, 1, 2, 2]


def test_linear_weights_by_hand():
    np.testing.assert_allclose(matrix(2, 4, 1), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])


@pytest.mark.parametrize("order", range(1, 6))
@pytest.mark.parametrize(("old", "new"), [(1, 3), (2, 5), (7, 3), (40, 41), (300, 90), (90, 300)])
def test_constants_are_reproduced(old, new, order):
    np.testing.assert_allclose(matrix(old, new, order).sum(axis=1), 1, atol=1e-12)


@pytest.mark.parametrize("order", range(6))
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((20, 31, 17), (33, 29, 40)),
        ((1, 40, 50), (1, 80, 33)),
        ((5, 3, 100), (2, 9, 30)),
        ((9, 8, 7), (9, 8, 14)),
        ((30, 40), (77, 21)),
    ],
)
def test_agrees_with_scikit_image(old, new, order):
    from skimage.transform import resize

    image = np.random.default_rng(0).normal(3, 2, size=old)
    expected = resize(image, new, order, mode="edge", anti_aliasing=False)
    value_range = np.ptp(image)
    assert np.abs(resampled(image, new, order) - expected).max() < 1e-12 * value_range
    assert np.abs(resampled(image.astype(np.float32), new, order) - expected).max() < 5e-7 * value_range


def test_long_axes_agree_across_block_borders():
    from skimage.transform import resize

    image = np.random.default_rng(0).normal(size=(2, 700))
    expected = resize(image, (2, 1111), 3, mode="edge", anti_aliasing=False)
    assert np.abs(resampled(image, (2, 1111), 3) - expected).max() < 1e-12


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(1, 12)] * 3), st.tuples(*[st.integers(1, 12)] * 3), st.integers(0, 3), st.integers(0, 9))
def test_results_stay_within_the_range_of_the_input(old, new, order, seed):
    image = np.random.default_rng(seed).normal(size=old).astype(np.float32)
    result = resampled(image, new, order)
    assert result.shape == new
    assert image.min() <= result.min() <= result.max() <= image.max()


def test_constant_images_stay_exactly_constant():
    image = np.full((5, 6, 7), 1000.1, np.float32)
    assert (resampled(image, (9, 11, 3), 3) == np.float32(1000.1)).all()


def test_half_precision_is_computed_in_single():
    image = np.random.default_rng(0).normal(size=(6, 7, 8)).astype(np.float16)
    single = resampled(image.astype(np.float32), (9, 9, 9), 1)
    np.testing.assert_array_equal(resampled(image, (9, 9, 9), 1), single.astype(np.float16))


def test_input_is_left_alone_even_where_nothing_changes():
    image = np.random.default_rng(0).normal(size=(6, 7, 8)).astype(np.float32)
    before = image.copy()
    result = resampled(image, (6, 7, 8), 3)
    result[...] = 0
    np.testing.assert_array_equal(image, before)


def test_slabs_tile_the_output():
    image = np.random.default_rng(0).normal(size=(50, 6, 7)).astype(np.float32)
    slabs = list(resampled_slabs(image, (100, 9, 9), 1))
    assert len(slabs) > 1
    assert [row for rows, _ in slabs for row in range(rows.start, rows.stop)] == list(range(100))
    np.testing.assert_array_equal(np.concatenate([slab for _, slab in slabs]), resampled(image, (100, 9, 9), 1))


def test_shared_matrices_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        axis_bands(10, 20, 3, np.float32)[0].weights[0, 0] = 1


def test_unknown_orders_are_refused():
    with pytest.raises(ValueError, match="got 6"):
        resampled(np.arange(8.0).reshape(2, 2, 2), (3, 3, 3), 6)


def test_gather_is_fancy_indexing():
    array = np.random.default_rng(0).integers(0, 9, (4, 5, 6))
    indices = [np.array([0, 3]), np.array([4, 4, 1]), np.array([5])]
    np.testing.assert_array_equal(gather(array, indices), array[np.ix_(*indices)])
