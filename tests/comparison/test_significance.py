"""Intervals, paired tests and Holm's correction, on numbers that can be checked by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2.comparison.significance import Comparison, compare_arms, estimate_mean, holm


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
    datasets = {1: {f"a{n}": float(x) for n, x in enumerate(rng.normal(0.8, 0.1, 60))}, 2: {"b": 0.5, "c": 0.7}}
    estimate = estimate_mean(datasets)
    assert estimate.mean == pytest.approx((np.mean(list(datasets[1].values())) + 0.6) / 2)
    assert estimate.low < estimate.mean < estimate.high and estimate.num_cases == 62


def test_one_case_gives_no_interval_and_equal_cases_give_a_point():
    assert math.isnan(estimate_mean({1: {"a": 0.5}}).low)
    estimate = estimate_mean({1: {"a": 0.5, "b": 0.5}})
    assert (estimate.low, estimate.high) == (0.5, 0.5)


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
    assert math.isnan(one.p) and not one.is_shown
    assert not Comparison(arm="a", reference="b", difference=1, tendency=1, num_cases=5, p=math.nan).is_shown


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
