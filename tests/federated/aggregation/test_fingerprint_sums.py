"""The fingerprint found by sums is the pooled one of today, to the bit, for any split of the cases into sites."""

from __future__ import annotations

import json
from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2.federated.aggregation import fingerprint_statistics as statistics
from nnunetv2.federated.aggregation import fingerprint_sums as sums
from nnunetv2.federated.aggregation import geometry_quantiles
from nnunetv2.federated.aggregation.case_table import Case
from nnunetv2.federated.aggregation.integer_moments import integer_sums, to_words
from nnunetv2.federated.errors import StatisticsError
from nnunetv2.federated.protocol.messages import CoarseSummary, PooledFingerprint
from nnunetv2.federated.protocol.secure_fingerprint_messages import (
    CaseTable,
    CoarseHistograms,
    DigitCounts,
    FineHistograms,
    NextSum,
    ResampledShape,
)


def make_cases(seed, number=9, channels=2, empty=()):
    """Make cases: geometry, and per channel some foreground voxels."""
    rng = np.random.default_rng(seed)
    return [
        (
            Case(
                tuple(rng.choice([0.8, 1.0, 2.5, 5.0], 3).tolist()),
                tuple(rng.integers(10, 400, 3).tolist()),
                float(rng.uniform(0.3, 1)),
            ),
            [rng.normal(100 * index, 40, 0 if index in empty else 301).astype(np.float32) for _ in range(channels)],
        )
        for index in range(number)
    ]


def values_of(site):
    return [np.concatenate(parts) for parts in zip(*(voxels for _, voxels in site))]


def vector(site, question, num_cases):
    """Do what a site does."""
    values, cases = values_of(site), [case for case, _ in site]
    coarse = [statistics.coarse_histogram(channel) for channel in values]
    if isinstance(question, CoarseHistograms):
        return sums.coarse_vector(coarse)
    if isinstance(question, FineHistograms):
        channels = [
            sums.FineChannel(
                to_words(*integer_sums(channel, np.ones(channel.size, np.int64), steps)),
                histogram,
                statistics.fine_histogram(channel, bins),
            )
            for channel, histogram, bins, steps in zip(values, coarse, question.bins, question.steps)
        ]
        return sums.fine_vector(channels, promotes_to_float64=any(not voxels[0].size for _, voxels in site))
    if isinstance(question, CaseTable):
        return sums.cases_vector(cases, question, num_cases=num_cases)
    quantities = geometry_quantiles.quantities_of_cases(
        *([getattr(case, name) for case in cases] for name in Case._fields)
    )
    return sums.digits_vector(quantities, question)


def by_sums(sites, geometry, *, mask=0):
    """Run the whole exchange, with masks that cancel, and return the fingerprint and the questions."""
    rng = np.random.default_rng(mask)
    num_cases, num_channels = sum(map(len, sites)), len(sites[0][0][1])
    asked, questions = sums.FIRST, []
    while isinstance(asked, NextSum):
        asked = NextSum.model_validate_json(asked.model_dump_json(), strict=True)  # as it travels
        questions.append(asked.question)
        vectors = [vector(site, asked.question, num_cases) for site in sites]
        length = sums.num_words(asked.question, num_channels=num_channels, num_cases=num_cases)
        assert all(one.dtype == np.uint64 and one.shape == (length,) for one in vectors)
        masks = rng.integers(0, 2**64, length, np.uint64)
        total = reduce(np.add, vectors[1:], vectors[0] + masks) - masks
        asked = sums.next_sum(asked, total, num_channels=num_channels, num_cases=num_cases, geometry=geometry)
        assert len(questions) < 20
    assert isinstance(asked, PooledFingerprint) and asked.num_cases == num_cases
    return asked.fingerprint, questions


def in_clear(sites):
    """Pool the fingerprint as a federation does whose coordinator sees every site's summary."""
    summaries = []
    for site in sites:
        spacings, shapes = statistics.sorted_geometry([c.spacing for c, _ in site], [c.shape for c, _ in site])
        summaries.append(
            CoarseSummary(
                spacings=spacings,
                shapes=shapes,
                relative_sizes=tuple(sorted(case.relative_size for case, _ in site)),
                moments=tuple(vars(statistics.Moments.of(channel)) for channel in values_of(site)),
                promotes_to_float64=any(not voxels[0].size for _, voxels in site),
            )
        )
    channels = list(zip(*map(values_of, sites)))
    coarse = [statistics.pool_histograms(map(statistics.coarse_histogram, parts)) for parts in channels]
    fine = [
        statistics.pool_histograms(statistics.fine_histogram(part, statistics.wanted_bins(total)) for part in parts)
        for total, parts in zip(coarse, channels)
    ]
    return statistics.pool_fingerprint(summaries, coarse, fine)


def deal(cases, data):
    owners = data.draw(st.lists(st.integers(0, 3), min_size=len(cases), max_size=len(cases)))
    sites = [[case for case, owner in zip(cases, owners) if owner == site] for site in range(4)]
    return [site for site in sites if site]


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), number=st.integers(1, 8), empty=st.sampled_from([(), (0,)]), data=st.data())
def test_any_split_gives_the_fingerprint_of_today_to_the_bit(seed, number, empty, data):
    cases = make_cases(seed, number=number + 1, empty=empty)
    sites = deal(cases, data)
    assert json.dumps(by_sums(sites, "list", mask=seed)[0]) == json.dumps(in_clear(sites))


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32), number=st.integers(2, 9), data=st.data())
def test_order_statistics_are_those_of_the_lists(seed, number, data):
    cases = make_cases(seed, number=number, channels=1)
    found, questions = by_sums(deal(cases, data), "quantiles", mask=seed)
    listed = in_clear([cases])
    assert [question.what for question in questions] == ["coarse", "fine", *["digits"] * 4]
    assert "spacings" not in found and "shapes_after_crop" not in found
    assert found["geometry_statistics"] == {
        "num_cases": number,
        "spacings": {
            "percentile_10": np.percentile(listed["spacings"], 10, axis=0).tolist(),
            "percentile_50": np.percentile(listed["spacings"], 50, axis=0).tolist(),
            "median": np.median(listed["spacings"], axis=0).tolist(),
        },
        "shapes_after_crop": {"median": np.median(listed["shapes_after_crop"], axis=0).tolist()},
    }
    for name in ("median_relative_size_after_cropping", "foreground_intensity_properties_per_channel"):
        assert found[name] == listed[name]


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), number=st.integers(1, 30))
def test_median_resampled_shape_is_numpys(seed, number):
    rng = np.random.default_rng(seed)
    shapes = rng.integers(0, 300, (number, 3))
    parts = [part for part in np.array_split(shapes, 3) if len(part)]
    asked = sums.FIRST_RESAMPLED
    while isinstance(asked, NextSum):
        vectors = [sums.digits_vector(geometry_quantiles.quantities_of_shapes(part), asked.question) for part in parts]
        asked = sums.next_resampled(asked, sum(vectors[1:], vectors[0]), num_cases=number)
    assert asked == ResampledShape(median=tuple(np.median(shapes, axis=0).tolist()))


def test_corrected_histograms_lead_to_other_bins():
    cases = make_cases(0, number=3, channels=1)
    values = values_of(cases)[0]
    elsewhere = FineHistograms(
        bins=((5, 6),),
        steps=sums.next_sum(
            sums.FIRST,
            sums.coarse_vector([statistics.coarse_histogram(values)]),
            num_channels=1,
            num_cases=3,
            geometry="list",
        ).question.steps,
    )
    answer = sums.next_sum(
        NextSum(question=elsewhere), vector(cases, elsewhere, 3), num_channels=1, num_cases=3, geometry="list"
    )
    assert answer.question.bins == (statistics.wanted_bins(statistics.coarse_histogram(values)),)
    assert not answer.intensities


def test_garbage_is_refused_at_every_step():
    rng = np.random.default_rng(0)
    cases = make_cases(1, number=3, channels=1)
    asked = sums.FIRST
    for geometry in ("list", "quantiles"):
        for question in by_sums([cases], geometry)[1]:
            length = sums.num_words(question, num_channels=1, num_cases=3)
            asked = NextSum(question=question)
            with pytest.raises(StatisticsError):
                for _ in range(8):  # a table may be too small seven times
                    garbage = rng.integers(0, 2**64, length, np.uint64)
                    asked = sums.next_sum(asked, garbage, num_channels=1, num_cases=3, geometry=geometry)
                    length = sums.num_words(asked.question, num_channels=1, num_cases=3)


def test_a_site_that_counts_cases_twice_is_noticed():
    cases = make_cases(2, number=4, channels=1)
    for geometry in ("list", "quantiles"):
        question = by_sums([cases], geometry)[1][2]
        assert isinstance(question, CaseTable | DigitCounts)
        twice = vector([*cases, cases[0]], question, 4)
        with pytest.raises(StatisticsError, match="census"):
            sums.next_sum(NextSum(question=question), twice, num_channels=1, num_cases=4, geometry=geometry)


@pytest.mark.parametrize("prefix", [0x7FF0, 0x7FF8, 0xBFF0, 0xFFFF], ids=["infinite", "no number", "negative", "all"])
def test_counts_that_lead_to_no_length_are_refused(prefix):
    """As of a site that counts what it likes."""
    for first, following in (
        (sums.FIRST_RESAMPLED, lambda asked, total: sums.next_resampled(asked, total, num_cases=2)),
        (
            NextSum(question=DigitCounts(level=0, branches=geometry_quantiles.roots(geometry_quantiles.OF_CASES))),
            lambda asked, total: sums.next_sum(asked, total, num_channels=1, num_cases=2, geometry="quantiles"),
        ),
    ):
        asked, digit = first, prefix
        with pytest.raises(StatisticsError, match="impossible"):
            for _ in range(4):
                branches = sum(map(len, asked.question.branches))
                counts = np.zeros((branches, 65536), np.uint64)
                counts[:, digit] = 2
                asked, digit = following(asked, counts.reshape(-1)), 1


@pytest.mark.parametrize("number", [0, 100, 65535])
def test_histograms_of_what_are_no_numbers_are_refused(number):
    counts = np.zeros(65536, np.uint64)
    counts[[number, 40_000]] = 5
    with pytest.raises(StatisticsError, match="no numbers"):
        sums.next_sum(sums.FIRST, counts, num_channels=1, num_cases=2, geometry="list")
