"""A site answers what a fingerprint takes, in its order, and nothing else."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from nnunetv2.experiment_planning.dataset_fingerprint.case_sample import CaseSample
from nnunetv2.experiment_planning.secure_fingerprint import FingerprintAnswers, extends
from nnunetv2.federated.aggregation import fingerprint_sums, geometry_quantiles
from nnunetv2.federated.aggregation.outermost import MOST_LOOKS
from nnunetv2.federated.errors import FederationError, StatisticsError
from nnunetv2.federated.protocol.messages import PooledFingerprint
from nnunetv2.federated.protocol.secure_fingerprint_messages import Branch, CaseTable, DigitCounts, NextSum

SPACINGS = ((5.0, 0.7, 0.7), (3.0, 0.7, 0.7), (5.0, 0.8, 0.8))


def weighted(values):
    return np.unique(np.asarray(values, np.float32), return_counts=True)


def make_answers(geometry, *, others=0, num_cases=3):
    rng = np.random.default_rng(0)
    samples = [
        CaseSample((20 + number, 200, 210), spacing, 0.5, [weighted(rng.normal(100, 20, 500))])
        for number, spacing in enumerate(SPACINGS)
    ]
    values = [tuple(np.concatenate(parts) for parts in zip(*(sample.intensities[0] for sample in samples)))]
    return FingerprintAnswers(samples, values, num_cases=num_cases, others=others, geometry=geometry)


def follow(answers, geometry, upto=99):
    """Let one site alone pool its fingerprint; return what was asked and what came of it."""
    asked = []
    for _ in range(upto):
        asked.append(answers.asked)
        message = fingerprint_sums.next_sum(
            answers.asked, answers.vector(), num_channels=1, num_cases=3, geometry=geometry
        )
        if isinstance(message, PooledFingerprint):
            return asked, message
        answers.proceed(message)
    return asked, None


@pytest.mark.parametrize("geometry", ["list", "quantiles"])
def test_an_honest_coordinator_gets_a_fingerprint(geometry):
    _, pooled = follow(make_answers(geometry), geometry)
    if geometry == "list":
        assert pooled.fingerprint["spacings"] == sorted(map(list, SPACINGS))
    else:
        assert pooled.fingerprint["geometry_statistics"]["spacings"]["median"] == [5.0, 0.7, 0.7]


@pytest.mark.parametrize(
    ("geometry", "question"),
    [
        ("quantiles", CaseTable()),
        ("list", CaseTable(doublings=1)),
        ("list", DigitCounts(level=0, branches=geometry_quantiles.roots(geometry_quantiles.OF_CASES))),
        ("quantiles", DigitCounts(level=1, branches=geometry_quantiles.roots(geometry_quantiles.OF_CASES))),
        ("quantiles", DigitCounts(level=0, branches=geometry_quantiles.roots(geometry_quantiles.OF_RESAMPLED_SHAPES))),
        ("quantiles", DigitCounts(level=0, branches=((Branch(prefix=5, below=0),),) * 7)),
    ],
)
def test_geometry_is_told_as_the_federation_says(geometry, question):
    answers = make_answers(geometry)
    follow(answers, geometry, upto=1)  # the next question is about bins
    with pytest.raises(FederationError, match=f"--geometry {geometry} does not need: nothing more is sent"):
        answers.proceed(NextSum(question=question))


def test_a_table_is_made_larger_once_at_a_time():
    answers = make_answers("list")
    follow(answers, "list", upto=2)
    assert answers.asked.question == CaseTable()
    with pytest.raises(FederationError, match="does not need"):
        answers.proceed(NextSum(question=CaseTable(doublings=2)))
    answers.proceed(NextSum(question=CaseTable(doublings=1)))
    assert answers.vector().size == 2 * make_size(0)


def make_size(doublings):
    return fingerprint_sums.num_words(CaseTable(doublings=doublings), num_channels=1, num_cases=3)


def test_digits_are_counted_only_behind_those_that_were_asked_for():
    asked, _ = follow(make_answers("quantiles"), "quantiles")
    digits = [one.question for one in asked if isinstance(one.question, DigitCounts)]
    assert all(extends(now, before) for before, now in pairwise(digits))
    elsewhere = ((Branch(prefix=digits[1].branches[0][0].prefix + 1, below=0),), *digits[1].branches[1:])
    assert not extends(DigitCounts(level=2, branches=elsewhere), digits[1])
    assert not extends(digits[3], digits[1]) and not extends(digits[1], digits[1])


def test_bins_that_hold_no_percentile_are_not_looked_into():
    answers = make_answers("list")
    honest = fingerprint_sums.next_sum(answers.asked, answers.vector(), num_channels=1, num_cases=3, geometry="list")
    with pytest.raises(StatisticsError, match="nothing more is sent"):
        answers.proceed(NextSum(question=honest.question.model_copy(update={"bins": ((3,),)})))


def test_nobody_looks_for_ever():
    answers = make_answers("list")
    honest = fingerprint_sums.next_sum(answers.asked, answers.vector(), num_channels=1, num_cases=3, geometry="list")
    for _ in range(MOST_LOOKS):
        answers.proceed(honest)
    with pytest.raises(FederationError, match="no percentile needs"):
        answers.proceed(honest)


def test_intensities_are_not_looked_into_again_after_geometry():
    answers = make_answers("list")
    asked, _ = follow(answers, "list")
    with pytest.raises(FederationError, match="no percentile needs"):
        answers.proceed(asked[1])


def test_bins_of_other_channels_are_refused():
    answers = make_answers("list")
    honest = fingerprint_sums.next_sum(answers.asked, answers.vector(), num_channels=1, num_cases=3, geometry="list")
    two = {"bins": honest.question.bins * 2, "steps": honest.question.steps * 2}
    with pytest.raises(FederationError, match="no percentile needs"):
        answers.proceed(NextSum(question=honest.question.model_copy(update=two)))


def test_impossible_spacings_stay_at_the_site(monkeypatch):
    monkeypatch.setitem(globals(), "SPACINGS", ((5e9, 0.7, 0.7),))
    with pytest.raises(StatisticsError, match="look at the headers of the images"):
        make_answers("list")
