"""Intervals, paired tests and Holm's correction, on numbers that can be checked by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2.comparison.significance import compare_arms, estimate_mean, holm


def test_holm_multiplies_the_smallest_by_the_number_of_tests():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_comparisons_that_could_not_be_made_do_not_count():
    corrected = holm([0.02, math.nan, 0.01])
    assert corrected[0] == pytest.approx(0.02) and corrected[2] == pytest.approx(0.02) and math.isnan(corrected[1])


@given(st.lists(st.floats(0, 1), max_size=12))
def test_corrected_values_keep_their_order_and_never_get_smaller(p_values):
    corrected = holm(p_values)
    assert all(0 <= p <= after <= 1 for p, after in zip(p_values, corrected))
    ordered = [corrected[index] for index in np.argsort(p_values, kind="stable")]
    assert ordered == sorted(ordered)


def test_the_mean_counts_every_dataset_the_same_and_lies_in_its_interval():
    rng = np.random.default_rng(0)
    datasets = {
        1: {f"a{n}": float(x) for n, x in enumerate(rng.normal(0.8, 0.1, 60))},
        2: {"b": 0.5, "c": 0.7, "d": 0.6},
    }
    estimate = estimate_mean(datasets)
    assert estimate.mean == pytest.approx((np.mean(list(datasets[1].values())) + 0.6) / 2)
    assert estimate.low < estimate.mean < estimate.high and estimate.num_cases == 63


def test_few_cases_give_no_interval_and_equal_cases_give_a_point():
    assert math.isnan(estimate_mean({1: {"a": 0.5}}).low)
    estimate = estimate_mean({1: {f"c{number}": 0.5 for number in range(6)}})
    assert (estimate.low, estimate.high) == (0.5, 0.5)


@pytest.mark.parametrize("sizes", [(5,), (72, 2), ()])
def test_no_interval_is_made_of_few_cases(sizes):
    datasets = {number: {f"c{n}": n / 100 for n in range(size)} for number, size in enumerate(sizes)}
    assert math.isnan(estimate_mean(datasets).low) and math.isnan(estimate_mean(datasets).high)


@pytest.mark.parametrize("sizes", [(6,), (72, 11, 5, 6), (3, 3, 3)])
def test_intervals_hold_the_true_mean_in_nearly_nine_of_ten(sizes, monkeypatch):
    monkeypatch.setattr("nnunetv2.comparison.significance.RESAMPLES", 200)
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        datasets = {
            number: {f"c{n}": float(x) for n, x in enumerate(rng.normal(0.7, 0.2, size))}
            for number, size in enumerate(sizes)
        }
        estimate = estimate_mean(datasets)
        held += estimate.low <= 0.7 <= estimate.high
    assert 0.8 < held / 100 < 0.99


def test_arms_are_compared_on_the_cases_that_both_have():
    base = {f"c{n}": 0.5 + n / 100 for n in range(10)}
    values = {
        "alone": {1: base},
        "ffe": {1: {case: value + 0.1 for case, value in base.items()} | {"only here": 0.0}},
        "same": {1: base},
    }
    better, same = compare_arms(values, ["alone", "not there"])
    assert (better.arm, better.num_cases) == ("ffe", 10) and better.difference == pytest.approx(0.1)
    assert better.p == pytest.approx(2 / 2**10) and better.p_holm == pytest.approx(4 / 2**10) and better.is_shown
    assert same.p == 1 and not same.is_shown


def test_two_references_are_compared_with_each_other_once():
    values = {arm: {1: {f"c{n}": n / 10 for n in range(3)}} for arm in ("alone", "pooled", "ffe")}
    pairs = [(one.arm, one.reference) for one in compare_arms(values, ["alone", "pooled"])]
    assert pairs == [("pooled", "alone"), ("ffe", "alone"), ("ffe", "pooled")]


def test_too_few_cases_prove_nothing():
    values = {arm: {1: {f"c{n}": n / 10 + shift for n in range(5)}} for arm, shift in (("alone", 0), ("ffe", 1))}
    [one] = compare_arms(values, ["alone"])
    assert math.isnan(one.p) and math.isnan(one.low) and not one.is_shown and one.fewest_cases == 5


def test_the_more_comparisons_the_more_cases_a_test_needs():
    """Of six pairs, p can be 0.031; twice that is not below 0.05, so a test of two arms could show nothing."""
    values = {arm: {1: {f"c{n}": n / 10 + shift for n in range(6)}} for arm, shift in (("a", 0), ("b", 1), ("c", 2))}
    assert [math.isnan(one.p) for one in compare_arms(values, ["a"])] == [True, True]
    del values["c"]
    [one] = compare_arms(values, ["a"])
    assert one.p == pytest.approx(2 / 2**6)


def test_a_site_with_most_cases_decides_the_test_and_shows_nothing_of_the_mean():
    """A gain of 0.02 at a site with 72 cases, chance at three others: the difference of the means is chance."""
    rng = np.random.default_rng(0)
    sizes = {1: 72, 2: 11, 3: 5, 4: 6}
    alone = {site: {f"c{n}": 0.6 for n in range(size)} for site, size in sizes.items()}
    ffe = {
        site: {case: 0.6 + rng.normal(0.02 if site == 1 else 0, 0.01 if site == 1 else 0.3) for case in cases}
        for site, cases in alone.items()
    }
    [one] = compare_arms({"alone": alone, "ffe": ffe}, ["alone"])
    assert one.is_beyond_chance and one.low < 0 < one.high and not one.is_shown


def test_what_one_seed_contradicts_is_not_shown():
    alone = {1: {f"c{n}": n / 100 for n in range(20)}}

    def better_by(gain):
        return {"alone": alone, "ffe": {1: {case: value + gain for case, value in alone[1].items()}}}

    [agreed] = compare_arms(better_by(0.1), ["alone"], [better_by(0.05), better_by(0.15)])
    assert agreed.is_shown and agreed.per_seed == pytest.approx((0.05, 0.15))
    [torn] = compare_arms(better_by(0.1), ["alone"], [better_by(-0.05), better_by(0.25)])
    assert torn.is_beyond_chance and not torn.is_shown and torn.objection == "seeds disagree"


def test_no_direction_is_shown_where_most_cases_contradict_the_mean():
    """A little better in 25 cases, far worse in 3: the ranks speak for the arm, its mean against it."""
    base = {f"c{n:02d}": 0.6 for n in range(28)}
    arm = {case: value + (0.01 + n / 10_000 if n < 25 else -0.5) for n, (case, value) in enumerate(base.items())}
    [one] = compare_arms({"alone": {1: base}, "ffe": {1: arm}}, ["alone"])
    assert one.difference == pytest.approx(-0.0437, abs=1e-3) and one.tendency > 0 and one.p_holm < 0.01
    assert one.is_beyond_chance and not one.is_shown


def test_a_difference_is_that_of_the_tables():
    """The mean of the sites' means, however many test cases a site has."""
    alone = {1: {f"a{n}": 0.7 for n in range(90)}, 2: {f"b{n}": 0.9 for n in range(5)}}
    ffe = {1: {f"a{n}": 0.71 for n in range(90)}, 2: {f"b{n}": 0.75 for n in range(5)}}
    [one] = compare_arms({"alone": alone, "ffe": ffe}, ["alone"])
    assert one.difference == pytest.approx(estimate_mean(ffe).mean - estimate_mean(alone).mean)
    assert one.num_cases == 95 and one.tendency > 0 and not one.is_shown
