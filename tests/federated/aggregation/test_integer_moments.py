"""Mean and standard deviation from whole numbers: the same for any split, and in float32 those of today."""

from __future__ import annotations

from fractions import Fraction
from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nnunetv2.federated.aggregation.fingerprint_statistics import Moments, coarse_histogram, merge_moments
from nnunetv2.federated.aggregation.integer_moments import (
    from_words,
    integer_sums,
    moments_of,
    steps_of,
    to_words,
    whole_numbers,
)
from nnunetv2.federated.errors import StatisticsError
from nnunetv2.federated.protocol.secure_fingerprint_messages import Steps

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
SUMS = st.tuples(st.integers(-(2**75), 2**75), st.integers(0, 2**115))


def counted(values):
    return np.ones(values.size, np.int64)


def pooled(parts, steps):
    """Sum words mod 2^128, as masked ones are, and return the moments."""
    words = reduce(np.add, (to_words(*integer_sums(values, counts, steps)) for values, counts in parts))
    return moments_of(*from_words(words), sum(int(counts.sum()) for _, counts in parts), steps)


def test_a_hand_checked_example():
    values, counts = np.float32([1, 2, 5]), np.array([2, 1, 1])
    steps = Steps(pivot=1.0, exponent=1)
    assert whole_numbers(values, steps).tolist() == [0, 2, 8]
    assert integer_sums(values, counts, steps) == (10, 68)
    assert moments_of(10, 68, 4, steps) == Moments(4, 2.25, 10.75)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32), size=st.integers(2, 3000), outlier=st.sampled_from([None, -2.5e5, 3e4]), data=st.data()
)
def test_any_split_gives_the_bits_of_today_in_float32(seed, size, outlier, data):
    rng = np.random.default_rng(seed)
    centre, spread = rng.uniform(-1000, 1000), rng.uniform(0.1, 500)
    values = np.concatenate([rng.normal(centre, spread, size), [] if outlier is None else [outlier]]).astype(np.float32)
    counts = rng.integers(1, 9, values.size)
    steps = steps_of(coarse_histogram(values, counts))
    order, cuts = rng.permutation(values.size), sorted(data.draw(st.lists(st.integers(0, values.size), max_size=5)))
    parts = [(values[part], counts[part]) for part in np.split(order, cuts)]
    found, today = pooled(parts, steps), merge_moments(Moments.of(*part) for part in parts)
    assert found == pooled([(values, counts)], steps)
    assert found.count == today.count
    assert np.float32(found.mean).tobytes() == np.float32(today.mean).tobytes()
    assert np.float32(found.std).tobytes() == np.float32(today.std).tobytes()


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(values=st.integers(1, 30).flatmap(lambda size: arrays(np.float32, size, elements=FLOATS)), data=st.data())
def test_steps_reach_every_value_and_round_none_by_more_than_half_a_step(values, data):
    steps = steps_of(coarse_histogram(values))
    numbers = whole_numbers(values, steps)
    step = Fraction(2) ** -steps.exponent
    assert np.abs(numbers).max() <= 2**46
    for value, number in zip(values, numbers):
        difference = Fraction(float(value)) - Fraction(steps.pivot) - int(number) * step
        # The subtraction rounds, too, by far less than a step.
        assert abs(difference) <= step * Fraction(9, 16)
    cut = data.draw(st.integers(0, values.size))
    parts = [(part, counted(part)) for part in (values[:cut], values[cut:])]
    assert pooled(parts, steps) == pooled(parts[::-1], steps) == pooled([(values, counted(values))], steps)


def test_a_constant_image_has_no_deviation():
    values = np.full(1000, 1234.5, np.float32)
    found = pooled([(values, counted(values))], steps_of(coarse_histogram(values)))
    assert (found.mean, found.std) == (1234.5, 0.0)


def test_chunks_do_not_show(monkeypatch):
    rng = np.random.default_rng(4)
    values, counts = rng.normal(30, 900, 2000).astype(np.float32), rng.integers(0, 10**5, 2000)
    steps = steps_of(coarse_histogram(values, counts))
    whole = integer_sums(values, counts, steps)
    monkeypatch.setattr("nnunetv2.federated.aggregation.integer_moments._CHUNK", 64)
    assert integer_sums(values, counts, steps) == whole
    numbers = [int(number) for number in whole_numbers(values, steps)]
    assert whole == (
        sum(n * int(c) for n, c in zip(numbers, counts)),
        sum(n * n * int(c) for n, c in zip(numbers, counts)),
    )


@given(sites=st.lists(SUMS, min_size=1, max_size=64))
def test_words_add_up_like_the_sums_whatever_is_carried(sites):
    rng = np.random.default_rng(len(sites))
    masks = [rng.integers(0, 2**64, 4, np.uint64) for _ in sites]
    total = sum((to_words(*sums) + mask for sums, mask in zip(sites, masks)), np.zeros(4, np.uint64))
    assert from_words(total - sum(masks, np.zeros(4, np.uint64))) == tuple(map(sum, zip(*sites)))


@pytest.mark.parametrize(
    "steps", [Steps(pivot=0.0, exponent=60), Steps(pivot=1e30, exponent=0), Steps(pivot=0.0, exponent=300)]
)
def test_steps_that_a_value_is_out_of_reach_of_are_refused(steps):
    with pytest.raises(StatisticsError, match="nothing more is sent"):
        integer_sums(np.float32([1e6]), np.array([1]), steps)


@pytest.mark.parametrize("counts", [[-1, 3], [2**31, 1]])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(StatisticsError, match="counts"):
        integer_sums(np.float32([1, 2]), np.array(counts), Steps(pivot=0.0, exponent=0))


@pytest.mark.parametrize(
    ("first", "second", "count"),
    [(3, 4, 2), (0, -1, 2), (2**60, 2**119, 2), (0, 0, 0), (1, 2**99, 2)],
    ids=["smaller than its mean allows", "negative", "sum too large", "nothing", "squares too large"],
)
def test_sums_that_no_values_have_are_refused(first, second, count):
    with pytest.raises(StatisticsError, match="contradict"):
        moments_of(first, second, count, Steps(pivot=0.0, exponent=0))
