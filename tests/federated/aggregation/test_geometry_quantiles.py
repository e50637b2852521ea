"""Order statistics found by sums of histograms are numpy's, to the bit, for any split."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2.federated.aggregation import geometry_quantiles as quantiles
from nnunetv2.federated.aggregation.order_statistics import (
    LEVELS,
    ROOT,
    count_digits,
    median_of,
    narrow,
    percentile_of,
    ranks_of,
    value_at,
)
from nnunetv2.federated.errors import StatisticsError
from nnunetv2.federated.protocol.secure_fingerprint_messages import Branch

LENGTHS = st.one_of(st.floats(0, 1e5), st.sampled_from([0.0, -0.0, 0.6836, 0.7, 1.0, 5.0, 5e-324]))
VALUES = st.lists(LENGTHS, min_size=1, max_size=60)


def search(parts, percentiles):
    """Run the four exchanges for one quantity whose values are spread over sites."""
    count, branches = sum(map(len, parts)), ROOT
    for level in range(LEVELS):
        prefixes = [branch.prefix for branch in branches]
        histograms = [count_digits(np.array(part), prefixes, level) for part in parts]
        branches = narrow(branches, sum(histograms[1:], histograms[0]), ranks_of(count, percentiles))
        assert len(branches) <= 2 * len(percentiles)
    return branches


def bits(value):
    return np.float64(value + 0.0).tobytes()  # numpy leaves open which of -0.0 and 0.0 comes first


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(values=VALUES, data=st.data())
def test_percentiles_and_medians_equal_numpy_to_the_bit(values, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=4)))
    branches = search(np.split(np.array(values), cuts), (10.0, 50.0))
    for percentile in (10, 50):
        assert bits(percentile_of(branches, len(values), percentile)) == bits(np.percentile(values, percentile))
    assert bits(median_of(branches, len(values))) == bits(np.median(values))


def test_every_rank_can_be_found():
    values = np.random.default_rng(0).uniform(0.3, 5, 41)
    found = [value_at(search([values[:20], values[20:]], (percentile,)), 0) for percentile in (0.0,)]
    assert found == [values.min()]


def test_median_and_percentile_may_differ_in_the_last_digit():
    values = [0.1, 0.7000000000000001]
    branches = search([values], (50.0,))
    assert median_of(branches, 2) == np.median(values) and percentile_of(branches, 2, 50) == np.percentile(values, 50)


def test_a_level_shows_nothing_of_values_elsewhere():
    histogram = count_digits(np.array([1.0, 1.0, 7.0]), [int(np.float64(1).view(np.uint64)) >> 48], 1)
    assert histogram.shape == (1, 65536) and histogram.sum() == 2


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_values_that_do_not_sort_by_their_bits_are_refused(bad):
    with pytest.raises(StatisticsError, match="finite numbers from 0 on"):
        count_digits(np.array([1.0, bad]), [0], 0)


@pytest.mark.parametrize("histogram", [np.zeros((1, 65536), np.uint64), np.full((1, 65536), 2**63, np.uint64)])
def test_counts_without_the_wanted_rank_are_refused(histogram):
    with pytest.raises(StatisticsError, match="do not hold the rank"):
        narrow((Branch(prefix=0, below=0),), histogram, [3])


# ------------------------------------------------------------------------------------------- geometry of all cases
def find(parts, percentiles, count):
    """Run the exchanges for all quantities; parts: per site, the values of each."""
    branches = quantiles.roots(percentiles)
    for level in range(LEVELS):
        prefixes = [[branch.prefix for branch in of_quantity] for of_quantity in branches]
        counted = [quantiles.count_all(part, prefixes, level) for part in parts]
        histograms = [sum(one[1:], one[0]) for one in zip(*counted)]
        if level == 0:
            quantiles.check_total(histograms, count)
        branches = quantiles.narrow_all(branches, histograms, percentiles, count)
    return branches


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), number=st.integers(1, 60), sites=st.integers(1, 4))
def test_geometry_is_described_as_numpy_does(seed, number, sites):
    rng = np.random.default_rng(seed)
    spacings = np.where(
        rng.random((number, 3)) < 0.6,
        rng.choice([0.5, 0.6836, 1.0, 5.0], (number, 3)),
        rng.uniform(0.3, 5, (number, 3)),
    )
    shapes, sizes = rng.integers(20, 600, (number, 3)), rng.uniform(0.1, 1, number)
    owners = rng.integers(0, sites, number)
    parts = [
        quantiles.quantities_of_cases(spacings[owners == s], shapes[owners == s], sizes[owners == s])
        for s in set(owners.tolist())
    ]
    fields = quantiles.described_cases(find(parts, quantiles.OF_CASES, number), number)
    assert fields == {
        "geometry_statistics": {
            "num_cases": number,
            "spacings": {
                "percentile_10": np.percentile(spacings, 10, axis=0).tolist(),
                "percentile_50": np.percentile(spacings, 50, axis=0).tolist(),
                "median": np.median(spacings, axis=0).tolist(),
            },
            "shapes_after_crop": {"median": np.median(shapes, axis=0).tolist()},
        },
        "median_relative_size_after_cropping": np.median(sizes),
    }


def test_counts_of_another_number_of_cases_are_refused():
    parts = quantiles.quantities_of_cases([(1, 1, 1)] * 3, [(5, 5, 5)] * 3, [1.0] * 3)
    histograms = quantiles.count_all(parts, [[0]] * 7, 0)
    quantiles.check_total(histograms, 3)
    with pytest.raises(StatisticsError, match="the 4 cases of their census"):
        quantiles.check_total(histograms, 4)


def test_impossible_geometry_is_refused():
    parts = quantiles.quantities_of_cases([(0, 1, 1)] * 3, [(5, 5, 5)] * 3, [1.0] * 3)
    with pytest.raises(StatisticsError, match="impossible"):
        quantiles.described_cases(find([parts], quantiles.OF_CASES, 3), 3)


def test_resampled_shapes_of_several_plans_stand_side_by_side():
    fingerprint = {"geometry_statistics": {"num_cases": 2}}
    once = quantiles.with_resampled_shape(fingerprint, (1.0, 2.0, 3.0), (5.0, 6.0, 7.0))
    again = quantiles.with_resampled_shape(once, (1.0, 1.0, 1.0), (5.0, 12.0, 21.0))
    assert again["geometry_statistics"]["resampled_shapes"] == [
        {"spacing": [1.0, 2.0, 3.0], "median": [5.0, 6.0, 7.0]},
        {"spacing": [1.0, 1.0, 1.0], "median": [5.0, 12.0, 21.0]},
    ]
    assert quantiles.with_resampled_shape(again, (1.0, 1.0, 1.0), (5.0, 12.0, 21.0)) == again
    assert fingerprint == {"geometry_statistics": {"num_cases": 2}}
