"""Strides and kernels of networks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2.experiment_planning.experiment_planners.network_topology import (
    get_pool_and_conv_props,
    get_shape_must_be_divisible_by,
    pad_shape,
)


def test_isotropic_patch_is_halved_alike_on_all_axes():
    num_pool, strides, kernels, patch, divisor = get_pool_and_conv_props((1, 1, 1), (40, 56, 40), 4, 999999)
    assert num_pool == [3, 3, 3]
    assert strides == ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    assert kernels == ((3, 3, 3),) * 4
    assert patch == (40, 56, 40)
    assert divisor.tolist() == [8, 8, 8]


def test_thick_slices_are_neither_mixed_nor_halved_at_first():
    topology = get_pool_and_conv_props((3.6, 0.625, 0.625), (20, 320, 256), 4, 999999)
    assert topology.num_pool_per_axis == [2, 6, 6]
    assert topology.strides == ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2))
    assert topology.kernel_sizes == ((1, 3, 3),) * 2 + ((3, 3, 3),) * 5


def test_fractional_patch_is_padded_to_whole_multiples():
    assert get_pool_and_conv_props((4, 0.8, 0.8), (19.5, 82.5, 80), 4, 999999).patch_size == (20, 96, 80)


def test_a_last_axis_on_its_own_keeps_three_times_the_minimum():
    assert get_pool_and_conv_props((1, 1), (4, 11), 4, 999999).num_pool_per_axis == [0, 0]
    assert get_pool_and_conv_props((1, 1), (4, 12), 4, 999999).num_pool_per_axis == [0, 1]


def test_number_of_halvings_can_be_bounded():
    assert get_pool_and_conv_props((1, 1, 1), (128, 128, 128), 4, 2).num_pool_per_axis == [2, 2, 2]


def test_arguments_stay_as_they_were():
    spacing, patch = np.array([1.0, 1.0]), np.array([64, 64])
    get_pool_and_conv_props(spacing, patch, 4, 999999)
    assert spacing.tolist() == [1, 1] and patch.tolist() == [64, 64]


def test_divisor_is_two_to_the_power_of_halvings():
    assert get_shape_must_be_divisible_by([0, 1, 5]).tolist() == [1, 2, 32]


@pytest.mark.parametrize(
    ("shape", "divisor", "padded"),
    [((3.5, 8), 4, [4, 8]), ((9, 8), (8, 8), [16, 8]), ((1, 1, 1), (1, 2, 4), [1, 2, 4])],
)
def test_shapes_are_padded_upwards(shape, divisor, padded):
    result = pad_shape(shape, divisor)
    assert result.tolist() == padded
    assert np.issubdtype(result.dtype, np.integer)


@given(st.lists(st.tuples(st.floats(0.2, 10), st.integers(1, 300)), min_size=2, max_size=3))
def test_every_stage_divides_the_padded_patch(axes):
    spacing, patch = zip(*axes)
    topology = get_pool_and_conv_props(spacing, patch, 4, 999999)
    assert len(topology.strides) == len(topology.kernel_sizes)
    assert np.prod(topology.strides, axis=0).tolist() == topology.must_be_divisible_by.tolist()
    assert all(a >= b and a % d == 0 for a, b, d in zip(topology.patch_size, patch, topology.must_be_divisible_by))
    bottom = np.array(topology.patch_size) / topology.must_be_divisible_by
    assert all(edge >= 4 for edge, pools in zip(bottom, topology.num_pool_per_axis) if pools)
