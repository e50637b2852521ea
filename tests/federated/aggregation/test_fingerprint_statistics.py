"""The pooled fingerprint is the one that one centre with all cases would have computed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nnunetv2.federated.aggregation.fingerprint_statistics import (
    NUM_BINS,
    PERCENTILES,
    Moments,
    coarse_histogram,
    fine_histogram,
    key_values,
    order_keys,
    outermost_bounds,
    pool_fingerprint,
    pool_histograms,
    pooled_percentiles,
    sorted_geometry,
    wanted_bins,
    wanted_ranks,
)
from nnunetv2.federated.errors import StatisticsError
from nnunetv2.federated.protocol.messages import CoarseSummary

SMALLEST = np.float32(1e-45)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**120), max_value=2.0**120)
TIES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, float(SMALLEST), -float(SMALLEST), 2.0**-127, 3.0e4, -1024.0])
VALUES = st.integers(1, 60).flatmap(lambda size: arrays(np.float32, size, elements=st.one_of(FLOATS, TIES)))


def pooled(parts, promotes=False):
    """Run the whole exchange for one channel whose values are spread over sites."""
    coarse = pool_histograms(coarse_histogram(part) for part in parts)
    bins = wanted_bins(coarse)
    fine = pool_histograms(fine_histogram(part, bins) for part in parts)
    return pooled_percentiles(coarse, fine, promotes_to_float64=promotes)


def assert_same_bits(found, expected):
    # numpy leaves open which of -0.0 and 0.0 comes first, so their signs do not count
    assert (np.asarray(found) + 0.0).tobytes() == (np.asarray(expected, np.float64) + 0.0).tobytes()


# ----------------------------------------------------------------------------------------------------- keys, ranks
def test_keys_order_like_values():
    values = np.array([-3e38, -1.5, -1e-45, -0.0, 0.0, 1e-45, 1e-38, 1.0, 1.0000001, 3e38], np.float32)
    keys = order_keys(values)
    assert (np.diff(keys.astype(np.int64)) > 0).all()
    assert key_values(keys).tobytes() == values.tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_keys_refuse_what_is_not_finite(bad):
    with pytest.raises(StatisticsError, match="NaN or infinite"):
        order_keys(np.array([1.0, bad], np.float32))


def test_keys_refuse_other_dtypes():
    with pytest.raises(StatisticsError, match="float64"):
        coarse_histogram(np.zeros(3))


@pytest.mark.parametrize(
    ("count", "ranks"), [(1, (0,)), (2, (0, 1)), (3, (0, 1, 2)), (4, (0, 1, 2, 3)), (1001, (5, 6, 500, 501, 995, 996))]
)
def test_wanted_ranks_are_the_neighbours_of_the_percentiles(count, ranks):
    assert wanted_ranks(count) == ranks


def test_at_most_six_bins_are_wanted():
    rng = np.random.default_rng(0)
    coarse = coarse_histogram(rng.normal(0, 1000, 10_000).astype(np.float32))
    assert 1 <= len(wanted_bins(coarse)) <= 6


# ----------------------------------------------------------------------------------------------------- percentiles
@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(values=VALUES, promotes=st.booleans(), data=st.data())
def test_percentiles_equal_numpy_to_the_bit_for_any_split(values, promotes, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, values.size), max_size=3)))
    parts = np.split(values, cuts)
    expected = np.percentile(values.astype(np.float64) if promotes else values, PERCENTILES)
    assert_same_bits(pooled(parts, promotes), expected)


@pytest.mark.parametrize("promotes", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 199, 200, 201, 1001, 70_001])
def test_percentiles_equal_numpy_for_scans_of_very_different_sites(size, promotes):
    rng = np.random.default_rng(size)
    scales = ((-500, 300), (40, 5), (2e4, 9e3), (0, 1e-3))
    values = np.concatenate([rng.normal(mean, std, size) for mean, std in scales]).astype(np.float32)
    expected = np.percentile(values.astype(np.float64) if promotes else values, PERCENTILES)
    assert_same_bits(pooled(np.array_split(values, 4), promotes), expected)


@settings(max_examples=40, deadline=None)
@given(values=VALUES, data=st.data())
def test_counts_stand_for_repeated_values(values, data):
    counts = data.draw(arrays(np.int64, values.size, elements=st.integers(0, 9)).filter(lambda c: c.sum() > 0))
    expanded = np.repeat(values, counts)
    coarse = coarse_histogram(values, counts)
    bins = wanted_bins(coarse)
    assert np.array_equal(coarse, coarse_histogram(expanded))
    assert np.array_equal(fine_histogram(values, bins, counts), fine_histogram(expanded, bins))
    moments, expected = Moments.of(values, counts), Moments.of(expanded)
    assert moments.count == expected.count
    np.testing.assert_allclose(moments.mean, expected.mean, rtol=1e-9, atol=1e-12 * np.abs(values).max())


def test_float32_and_float64_arithmetic_can_differ():
    values = np.array([1.0, 1e8 + 8, 2.0**-20], np.float32)
    assert pooled([values], promotes=False) != pooled([values], promotes=True)


def test_chunks_do_not_show(monkeypatch):
    values = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    counts = np.arange(1000)
    whole = coarse_histogram(values, counts), fine_histogram(values, (49024, 16256), counts), Moments.of(values, counts)
    monkeypatch.setattr("nnunetv2.federated.aggregation.fingerprint_statistics._CHUNK", 64)
    assert np.array_equal(whole[0], coarse_histogram(values, counts))
    assert np.array_equal(whole[1], fine_histogram(values, (49024, 16256), counts))
    assert Moments.of(values, counts).m2 == pytest.approx(whole[2].m2, rel=1e-12)


def test_nothing_to_pool_is_an_error():
    with pytest.raises(StatisticsError, match="no case of any site has foreground"):
        wanted_bins(np.zeros(NUM_BINS, np.int64))
    with pytest.raises(StatisticsError, match="no histogram"):
        pool_histograms([])


@pytest.mark.parametrize("bad", [np.full(NUM_BINS, -1), np.full(NUM_BINS, 2**60), np.zeros(NUM_BINS, np.int32)])
def test_impossible_histograms_are_refused(bad):
    with pytest.raises(StatisticsError):
        pool_histograms([bad])


def test_histograms_that_contradict_each_other_are_refused():
    coarse = coarse_histogram(np.float32([1, 2, 3]))
    fine = fine_histogram(np.float32([1, 2]), wanted_bins(coarse))
    with pytest.raises(StatisticsError, match="do not describe the same values"):
        pooled_percentiles(coarse, fine, promotes_to_float64=False)


# --------------------------------------------------------------------------------------------------------- moments
def test_moments_of_a_hand_checked_example():
    moments = Moments.of(np.float32([1, 2])).merge(Moments.of(np.float32([3, 6])))
    assert (moments.count, moments.mean, moments.m2) == (4, 3.0, 14.0)
    assert moments.std == pytest.approx(3.5**0.5)


def test_merging_nothing_changes_nothing():
    moments = Moments.of(np.float32([4, 8]))
    assert Moments().merge(moments) == moments.merge(Moments()) == moments


def test_merged_moments_are_within_a_millionth_of_numpy():
    rng = np.random.default_rng(2)
    scales = ((1e4, 3, 999), (-5, 900, 4001), (7, 1, 1))
    parts = [rng.normal(mean, std, size).astype(np.float32) for mean, std, size in scales]
    merged = Moments()
    for part in parts:
        merged = merged.merge(Moments.of(part))
    values = np.concatenate(parts).astype(np.float64)
    assert merged.mean == pytest.approx(values.mean(), rel=1e-12)
    assert merged.std == pytest.approx(values.std(), rel=1e-12)


# ----------------------------------------------------------------------------------------------------- fingerprint
def make_cases(seed=0, number=9, channels=2, empty=()):
    """Make cases: geometry, relative size, and per channel some foreground voxels."""
    rng = np.random.default_rng(seed)
    return [
        {
            "spacing": tuple(rng.choice([0.8, 1.0, 2.5, 5.0], 3)),
            "shape": tuple(int(size) for size in rng.integers(10, 400, 3)),
            "relative_size": float(rng.uniform(0.3, 1)),
            "voxels": [
                rng.normal(100 * index, 40, 0 if index in empty else 301).astype(np.float32) for _ in range(channels)
            ],
        }
        for index in range(number)
    ]


def summarise(cases, *, extrema=False):
    """Do what a site does, and return its summary and its values per channel."""
    spacings, shapes = sorted_geometry([case["spacing"] for case in cases], [case["shape"] for case in cases])
    values = [np.concatenate(parts) for parts in zip(*(case["voxels"] for case in cases))]
    return CoarseSummary(
        spacings=spacings,
        shapes=shapes,
        relative_sizes=tuple(sorted(case["relative_size"] for case in cases)),
        moments=tuple(vars(Moments.of(channel)) for channel in values),
        promotes_to_float64=any(case["voxels"][0].size == 0 for case in cases),
        extrema=tuple((float(v.min()), float(v.max())) for v in values) if extrema else None,
    ), values


def pool_sites(sites, *, extrema=False):
    """Run the whole exchange between sites, each a list of cases."""
    summaries, values = zip(*(summarise(cases, extrema=extrema) for cases in sites))
    channels = list(zip(*values))
    coarse = [pool_histograms(map(coarse_histogram, parts)) for parts in channels]
    fine = [
        pool_histograms(fine_histogram(part, wanted_bins(total)) for part in parts)
        for total, parts in zip(coarse, channels)
    ]
    return pool_fingerprint(summaries, coarse, fine)


def test_fingerprint_has_the_structure_and_the_values_of_the_centralised_one():
    cases = make_cases()
    fingerprint = pool_sites([cases[:2], cases[2:3], cases[3:]], extrema=True)
    assert list(fingerprint) == sorted(fingerprint)
    assert fingerprint["median_relative_size_after_cropping"] == np.median([case["relative_size"] for case in cases])
    assert sorted(map(tuple, fingerprint["spacings"])) == sorted(case["spacing"] for case in cases)
    assert sorted(map(tuple, fingerprint["shapes_after_crop"])) == sorted(case["shape"] for case in cases)
    assert list(fingerprint["foreground_intensity_properties_per_channel"]) == ["0", "1"]
    for channel, properties in fingerprint["foreground_intensity_properties_per_channel"].items():
        values = np.concatenate([case["voxels"][int(channel)] for case in cases])
        low, median, high = np.percentile(values, PERCENTILES)
        assert properties == {
            "max": float(values.max()),
            "min": float(values.min()),
            "median": median,
            "percentile_00_5": low,
            "percentile_99_5": high,
            "mean": pytest.approx(float(values.mean()), rel=1e-6),
            "std": pytest.approx(float(values.std()), rel=1e-6),
        }


def test_a_case_stays_together_when_cases_are_sorted():
    cases = make_cases()
    fingerprint = pool_sites([cases[5:], cases[:5]])
    pairs = set(zip(map(tuple, fingerprint["spacings"]), map(tuple, fingerprint["shapes_after_crop"])))
    assert pairs == {(case["spacing"], case["shape"]) for case in cases}


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_split_and_order_of_sites_gives_identical_bytes(data):
    cases = make_cases(number=7, empty=(3,))
    expected = json.dumps(pool_sites([cases]))
    owners = data.draw(st.lists(st.integers(0, 3), min_size=7, max_size=7))
    order = data.draw(st.permutations(range(4)))
    sites = [[case for case, owner in zip(cases, owners) if owner == site] for site in order]
    assert json.dumps(pool_sites([site for site in sites if site])) == expected


def test_without_extrema_the_outermost_bounds_are_written():
    cases = make_cases(channels=1)
    properties = pool_sites([cases[:4], cases[4:]])["foreground_intensity_properties_per_channel"]["0"]
    values = np.concatenate([case["voxels"][0] for case in cases])
    assert (properties["min"], properties["max"]) == outermost_bounds(coarse_histogram(values))
    assert properties["min"] <= values.min() and values.max() <= properties["max"]
    assert properties["max"] == pytest.approx(values.max(), rel=0.01)


def test_bounds_enclose_negative_and_positive_values():
    assert outermost_bounds(coarse_histogram(np.float32([-1.0, 1.0]))) == (
        pytest.approx(-1.0078125, rel=1e-6),
        pytest.approx(1.0078125, rel=1e-6),
    )


def test_a_site_without_foreground_is_no_obstacle():
    cases = make_cases(number=4, empty=(0, 1))
    fingerprint = pool_sites([cases[:2], cases[2:]])
    values = np.concatenate([case["voxels"][1] for case in cases]).astype(np.float64)
    assert fingerprint["foreground_intensity_properties_per_channel"]["1"]["median"] == np.percentile(values, 50)


def test_sites_with_different_channels_are_refused():
    cases = make_cases()
    summaries = [summarise(cases[:4])[0], summarise(make_cases(channels=1))[0]]
    with pytest.raises(StatisticsError, match="channels"):
        pool_fingerprint(summaries, [np.zeros(NUM_BINS, np.int64)] * 2, [np.zeros((0, NUM_BINS), np.int64)] * 2)


def test_moments_that_contradict_the_histogram_are_refused():
    summary, values = summarise(make_cases(channels=1))
    coarse = coarse_histogram(values[0][:-1])
    with pytest.raises(StatisticsError, match="channel 0: moments and histograms"):
        pool_fingerprint([summary], [coarse], [fine_histogram(values[0][:-1], wanted_bins(coarse))])
