"""Statistics of values with multiplicities, against numpy on the values written out."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nnunetv2.experiment_planning.dataset_fingerprint.weighted_statistics import (
    interpolate,
    lower_histogram,
    mean_and_std_of,
    order_statistics,
    percentile_ranks,
    percentiles_of,
    range_of,
    upper_histogram,
)

PERCENTILES = [0.5, 50, 99.5]
floats = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-2.0 ** 99, 2.0 ** 99, width=32))


@st.composite
def datasets(draw):
    values = draw(st.lists(floats, min_size=1, max_size=4))
    samples = [(v, np.array(draw(st.lists(st.integers(0, 9), min_size=len(v), max_size=len(v))))) for v in values]
    samples[0][1][0] += 1  # something is drawn
    return samples


def write_out(samples, dtype=np.float32):
    return np.concatenate([np.repeat(values, counts) for values, counts in samples]).astype(dtype)


@given(datasets(), st.sampled_from([np.float32, np.float64]))
def test_percentiles_equal_numpy_to_the_bit(samples, dtype):
    expected = np.percentile(write_out(samples, dtype), PERCENTILES)
    assert np.array_equal(percentiles_of(samples, PERCENTILES, dtype), expected)


def test_percentiles_of_many_values_equal_numpy_to_the_bit():
    generator = np.random.default_rng(0)
    for size in (10, 1001, 54321):
        values = generator.normal(-3, 50, size).astype(np.float32)
        samples = [(part, generator.integers(0, 5, len(part))) for part in np.array_split(values, 3)]
        for dtype in (np.float32, np.float64):
            expected = np.percentile(write_out(samples, dtype), PERCENTILES)
            assert np.array_equal(percentiles_of(samples, PERCENTILES, dtype), expected)


@given(datasets())
def test_every_rank_is_that_of_the_sorted_values(samples):
    expected = np.sort(write_out(samples))
    assert np.array_equal(order_statistics(samples, np.arange(len(expected))), expected)


def test_rank_beyond_the_values_is_refused():
    with pytest.raises(ValueError, match="rank 3 of 3 values"):
        order_statistics([(np.float32([1, 2]), np.array([1, 2]))], [3])


def test_order_is_that_of_numbers_across_zero_and_infinity():
    values = np.float32([np.inf, 1e-42, -1e-42, 0, -np.inf, 3, -3])
    assert order_statistics([(values, np.ones(7, int))], range(7)).tolist() == sorted(values.tolist())


def test_histograms_count_draws_not_values():
    samples = [(np.float32([1.0, 1.5]), np.array([3, 4]))]
    upper = upper_histogram(samples)
    assert upper.sum() == 7 and np.count_nonzero(upper) == 2
    assert lower_histogram(samples, int(np.flatnonzero(upper)[0])).sum() == 3


def test_ranks_are_neighbours_of_the_position():
    lower, upper, weight = percentile_ranks(4, [0, 50, 100])
    assert lower.tolist() == [0, 1, 3] and upper.tolist() == [1, 2, 3] and weight.tolist() == [0, 0.5, 0]


def test_interpolation_starts_at_the_nearer_end():
    assert interpolate(np.float64([0, 0]), np.float64([10, 10]), np.array([0.25, 0.75])).tolist() == [2.5, 7.5]


def test_mean_and_deviation_count_multiplicities():
    # 1, 3, 3, 3 has mean 2.5 and variance (2.25 + 3 * 0.25) / 4 = 0.75
    mean, std = mean_and_std_of([(np.float32([1]), np.array([1])), (np.float32([3]), np.array([3]))])
    assert mean == 2.5
    assert std == pytest.approx(np.sqrt(0.75))


def test_range_ignores_what_was_never_drawn():
    assert range_of([(np.float32([-9, 1, 4]), np.array([0, 1, 1])), (np.float32([]), np.array([], int))]) == (1.0, 4.0)
