import numpy as np
import pytest

from nnunetv2.preprocessing.resampling.default_resampling import (
    compute_new_shape,
    determine_do_sep_z_and_axis,
    get_do_separate_z,
    get_lowres_axis,
    resample_data_or_seg,
    resample_data_or_seg_to_shape,
    resample_data_or_seg_to_spacing,
)
from nnunetv2.preprocessing.resampling.no_resampling import no_resampling_hack
from nnunetv2.preprocessing.resampling.utils import recursive_find_resampling_fn_by_name


@pytest.mark.parametrize(
    ("current", "new", "force", "expected"),
    [
        ((3.01, 1, 1), (1, 1, 1), None, (True, 0)),
        ((3, 1, 1), (1, 1, 1), None, (False, None)),
        ((1, 1, 1), (4, 1, 1), None, (True, 0)),
        ((1, 1, 5), (1, 1, 1), None, (True, 2)),
        ((1, 5, 5), (1, 1, 1), None, (False, None)),
        ((1, 5, 5), (9, 1, 1), None, (False, None)),  # the current spacing decides alone
        ((2, 1, 1), (1, 1, 1), True, (True, 0)),
        ((9, 1, 1), (1, 1, 1), False, (False, None)),
        ((1, 1, 1), (1, 1, 1), True, (False, None)),
    ],
)
def test_separate_z_decision(current, new, force, expected):
    assert determine_do_sep_z_and_axis(force, current, new) == expected


def test_anisotropy_helpers():
    assert get_do_separate_z((3.01, 1, 1)) is True
    assert get_do_separate_z((2, 1, 1), anisotropy_threshold=1.5) is True
    assert get_lowres_axis((1, 5, 5)).tolist() == [1, 2]


def test_new_shape_rounds_half_to_even():
    assert compute_new_shape((5, 7, 10), (1, 1, 1), (2, 2, 0.5)).tolist() == [2, 4, 20]
    with pytest.raises(AssertionError, match="same length"):
        compute_new_shape((5, 7), (1, 1, 1), (1, 1, 1))


def test_equal_shape_returns_the_same_object():
    data = np.zeros((1, 2, 3, 4), np.float32)
    assert resample_data_or_seg(data, (2, 3, 4)) is data
    assert no_resampling_hack(data, (9, 9, 9), (1, 1, 1), (2, 2, 2)) is data


def test_slices_are_repeated_and_dropped_not_mixed():
    data = np.arange(4, dtype=np.float32).reshape(1, 4, 1, 1) * np.ones((1, 4, 3, 3), np.float32)
    up = resample_data_or_seg(data, (8, 3, 3), axis=0, do_separate_z=True)
    assert up[0, :, 1, 1].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    down = resample_data_or_seg(data, (2, 6, 6), axis=0, do_separate_z=True)
    assert down[0, :, 1, 1].tolist() == [1, 3]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("order_z", [0, 1, 3])
def test_each_slice_is_resampled_and_clipped_by_itself(axis, order_z):
    from scipy.ndimage import map_coordinates
    from skimage.transform import resize

    data = np.random.default_rng(0).normal(size=(2, 9, 10, 11))
    new = [14, 15, 16]
    in_plane = [n for a, n in enumerate(new) if a != axis]
    result = resample_data_or_seg(data, new, axis=axis, order=3, do_separate_z=True, order_z=order_z)
    for channel, channel_result in zip(data, result):
        planes = np.stack(
            [resize(plane, in_plane, 3, mode="edge", anti_aliasing=False) for plane in np.moveaxis(channel, axis, 0)]
        )
        old_n, new_n = len(planes), new[axis]
        positions = (old_n / new_n) * (np.arange(new_n) + 0.5) - 0.5
        grid = np.meshgrid(positions, *(np.arange(n) for n in in_plane), indexing="ij")
        expected = map_coordinates(planes, grid, order=order_z, mode="nearest")
        np.testing.assert_allclose(np.moveaxis(channel_result, axis, 0), expected, atol=1e-10)


def test_labels_across_slices_need_more_than_half():
    seg = np.array([0, 2, 2, 5]).reshape(1, 4, 1, 1) * np.ones((1, 4, 2, 2), int)
    nearest = resample_data_or_seg(seg, (8, 2, 2), True, 0, 1, True, 0)
    assert nearest[0, :, 0, 0].tolist() == [0, 0, 2, 2, 2, 2, 5, 5]
    # Halving puts both samples midway between two labels; neither has more than half at the second, so it is 0.
    linear = resample_data_or_seg(seg, (2, 2, 2), True, 0, 1, True, 1)
    assert linear[0, :, 0, 0].tolist() == [0, 0]


def test_tensors_become_arrays():
    torch = pytest.importorskip("torch")
    tensor = torch.rand(2, 4, 5, 6)
    result = resample_data_or_seg_to_shape(tensor, (8, 5, 6), (1, 1, 1), (0.5, 1, 1))
    assert isinstance(result, np.ndarray)
    assert result.shape == (2, 8, 5, 6)
    assert resample_data_or_seg_to_shape(tensor.bfloat16(), (8, 5, 6), (1, 1, 1), (0.5, 1, 1)).dtype == np.float32


def test_spacing_determines_the_shape():
    data = np.random.default_rng(0).normal(size=(1, 4, 5, 6)).astype(np.float16)
    result = resample_data_or_seg_to_spacing(data, (1, 1, 1), (0.5, 1, 2))
    assert result.shape == (1, 8, 5, 3)
    assert result.dtype == np.float16
    assert resample_data_or_seg(data, (8, 5, 3), dtype_out=np.float64).dtype == np.float64


def test_wrong_shapes_are_refused():
    with pytest.raises(AssertionError, match="three new sizes"):
        resample_data_or_seg(np.zeros((3, 4, 5)), (3, 4, 5))
    with pytest.raises(AssertionError, match="needs to know the axis"):
        resample_data_or_seg(np.zeros((1, 3, 4, 5)), (3, 4, 9), do_separate_z=True)


def test_functions_are_found_by_name():
    assert recursive_find_resampling_fn_by_name("resample_data_or_seg_to_shape") is resample_data_or_seg_to_shape
    assert recursive_find_resampling_fn_by_name("no_resampling_hack") is no_resampling_hack
    with pytest.raises(RuntimeError, match="no_such_function"):
        recursive_find_resampling_fn_by_name("no_such_function")
