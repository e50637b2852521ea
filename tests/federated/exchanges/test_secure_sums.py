"""Groups of tensors, exponents, and settings of masked sums."""

import numpy as np
import pytest
from fake_federation import make_settings

from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.exchanges.masked_codecs import MaskedChanges, MaskedWeights
from nnunetv2.federated.exchanges.secure_sums import (
    COUNTS,
    check_count_groups,
    check_groups,
    check_secure_settings,
    count_groups,
    groups_of,
    match_digest,
    num_classes_of,
    sites_that_differ,
)
from nnunetv2.federated.privacy.secure_aggregation.fixed_point import DivergedError
from nnunetv2.federated.protocol.api import Secure
from nnunetv2.federated.protocol.messages import Match

SHARED = {
    "a": dict.fromkeys("ABCD", "a"),
    "b": dict.fromkeys("ABC", "b"),
    "c": dict.fromkeys("AB", "c"),
    "d": dict.fromkeys("DCBA", "d"),
}


# ----------------------------------------------------------------------------------------------------------- groups
def test_tensors_are_grouped_by_the_sites_that_hold_them():
    found = {group.holders: group.tensors for group in groups_of(SHARED, "ABCD", least=3)}
    assert found == {("A", "B", "C", "D"): ("a", "d"), ("A", "B", "C"): ("b",)}


def test_sites_that_are_away_make_other_groups_and_too_small_ones_are_left_out():
    found = {group.holders: group.tensors for group in groups_of(SHARED, "ABC", least=3)}
    assert found == {("A", "B", "C"): ("a", "b", "d")}
    assert groups_of(SHARED, "AB", least=3) == ()


def test_names_of_groups_follow_from_the_sites_alone():
    names = [group.name for group in groups_of(SHARED, "ABCD", least=3)]
    assert names == [group.name for group in groups_of(dict(reversed(SHARED.items())), "DCBA", least=3)]
    assert all(len(name) == 16 for name in names)


def match_of(shared, received=(), annotated=()) -> Match:
    settings = {"rule": "name", "weighting": "cases", "precision": "float32", "exchange_every": 1}
    return Match.model_construct(**settings, shared=shared, received=dict(received), annotated=dict(annotated))


def test_sites_differ_where_one_lacks_what_another_one_gets():
    match = match_of(SHARED, {"c": {"D": "c"}})
    assert sites_that_differ(match, "ABCD") == ("C", "D")
    assert sites_that_differ(match, "AB") == ()
    assert sites_that_differ(match, "CD") == ("C", "D")  # C has b, D gets c
    assert sites_that_differ(match_of({"a": SHARED["a"], "b": {"E": "b"}}), "ABD") == ()


def test_what_a_match_says_of_a_cohort_is_compared_and_what_it_says_of_others_is_not():
    digest = match_digest(match_of(SHARED), "AB")
    assert (
        match_digest(match_of({name: dict(reversed(sites.items())) for name, sites in SHARED.items()}), "BA") == digest
    )
    assert match_digest(match_of({**SHARED, "b": dict.fromkeys("AB", "b")}, {"c": {}}), "AB") == digest
    assert match_digest(match_of(SHARED, {"c": {"D": "c"}}), "AB") == digest
    for told in (
        match_of({**SHARED, "b": {"A": "b"}}),
        match_of({**SHARED, "b": {"A": "b", "B": "a"}}),
        match_of({**SHARED, "b": {"A": "b"}}, {"b": {"B": "b"}}),
        match_of(SHARED, annotated={"A": (1,)}),
    ):
        assert match_digest(told, "AB") != digest


def test_more_sets_of_sites_than_can_be_summed_are_refused():
    shared = {str(n): dict.fromkeys([f"s{n}", "x", "y"], "w") for n in range(65)}
    with pytest.raises(RefusedError) as refused:
        check_groups(shared)
    assert refused.value.code == "too_many_groups" and "65" in refused.value.message
    check_groups(dict(list(shared.items())[:64]))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"background": 0, "liver": 1, "tumour": 2}, 2),
        ({"background": 0, "liver": 1, "ignore": 2}, 1),
        ({"background": 0, "whole": (1, 2), "core": (2,), "ignore": 3}, 2),
        ({"background": 0, "liver": (1,), "same": 1}, 1),
    ],
)
def test_classes_are_counted_as_training_does(labels, expected):
    assert num_classes_of(labels) == expected


def test_counts_of_classes_are_summed_over_their_annotators_and_never_over_too_few():
    annotated = {"A": (1, 3), "B": (1, 2), "C": (1, 2, 3), "D": (2, 3)}
    match = Match.model_construct(annotated=annotated)
    found = {group.holders: group.classes for group in count_groups(match, "DCBA", 3, least=3)}
    assert found == {("A", "B", "C"): (0,), ("B", "C", "D"): (1,), ("A", "C", "D"): (2,)}
    assert (
        count_groups(match, "ABC", 3, least=3)[0].classes == (0,) and len(count_groups(match, "ABC", 3, least=3)) == 1
    )


def test_where_all_annotate_the_same_there_is_one_sum_of_counts():
    (group,) = count_groups(Match.model_construct(annotated={}), "BA", 2, least=2)
    assert (group.name, group.holders, group.classes) == (COUNTS, ("A", "B"), (0, 1))


def test_more_sets_of_annotators_than_can_be_summed_are_refused():
    annotated = {f"s{label}": (label,) for label in range(1, 66)}
    with pytest.raises(RefusedError, match="65 different sets of sites annotate classes"):
        check_count_groups(annotated)
    check_count_groups({"A": tuple(range(1000)), "B": tuple(range(1000))})


# ----------------------------------------------------------------------------------------------------------- codecs
def as_words(codec, values, start, exponent, dtype, weight=3):
    out = np.empty(values.size, dtype)
    codec.encode_("w", values, start, weight=weight, bits=4, exponent=exponent, out=out)
    return out


def test_a_diverging_tensor_is_named():
    values = np.array([1.0, np.nan], np.float32)
    with pytest.raises(DivergedError, match="tensor w"):
        as_words(MaskedWeights(), values, values, 3, np.uint32)
    with pytest.raises(DivergedError, match="tensor w"):
        as_words(MaskedChanges(), values, np.zeros(2, np.float16), 3, np.uint16)


def test_what_is_cut_comes_with_the_next_rounds():
    codec, kept, start = MaskedChanges(), np.zeros(3, np.float32), np.zeros(3, np.float16)
    learned = np.array([0.01, -0.7, 0.2], np.float32)  # in the first epoch, and nothing more in others
    for number in range(8):
        trained = start.astype(np.float32) + (learned if number == 0 else 0)
        words = as_words(codec, trained, start, -3, np.uint16)
        assert np.array_equal(words, as_words(codec, trained, start, -3, np.uint16))  # the same until it has counted
        codec.settle(["w"])
        kept = codec.decode(words, kept, total=3, bits=4, exponent=-3).astype(np.float32)
        start = kept.astype(np.float16)
    assert np.abs(kept - learned).max() < 1e-3


def test_exponents_follow_from_the_last_aggregates():
    assert MaskedWeights().exponent(np.array([0.9, -1.5], np.float32), None) == 4
    assert MaskedWeights().exponent(np.zeros(0, np.float32), None) == 3
    changes = MaskedChanges()
    one = np.array([1.0], np.float16)
    assert changes.exponent(one, None) == -1  # a quarter of the values
    assert changes.exponent(one, one) == -1  # what has not moved says nothing of the next change
    assert changes.exponent(np.zeros(1, np.float16), None) == -6
    assert changes.exponent(np.array([1e-7], np.float16), np.zeros(1, np.float16)) == -20
    assert changes.exponent(one, np.array([0.75], np.float16)) == 1


def test_thirty_rounds_behind_masks_stay_as_close_as_float32_does():
    """The distance to the exact run is that of rounding: less than twice what float32 itself takes."""
    rng = np.random.default_rng(0)
    cases, sizes = [20, 31, 47, 8, 55], 2000
    start = rng.normal(0, 0.05, sizes).astype(np.float32)
    bias = [rng.normal(0, 0.01, sizes).astype(np.float32) for _ in cases]
    total, bits = sum(cases), sum(cases).bit_length()

    def trained(weights, site):
        return (weights * np.float32(0.95) + bias[site]).astype(np.float32)

    masked, plain, exact = start.copy(), start.copy(), start.astype(np.float64)
    codec = MaskedWeights()
    for _ in range(30):
        exponent, words = codec.exponent(masked, None), np.zeros(sizes, np.uint32)
        for site, weight in enumerate(cases):
            out = np.empty(sizes, np.uint32)
            values = trained(masked, site)
            codec.encode_("w", values, masked, weight=weight, bits=bits, exponent=exponent, out=out)
            words += out
        masked = codec.decode(words, masked, total=total, bits=bits, exponent=exponent).astype(np.float32)
        plain = (sum(trained(plain, site).astype(np.float64) * n for site, n in enumerate(cases)) / total).astype("f4")
        exact = sum((exact * 0.95 + bias[site]) * n for site, n in enumerate(cases)) / total
    assert np.linalg.norm(masked - exact) <= 2 * np.linalg.norm(plain - exact)


# --------------------------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"sites": ("A", "B")}, "cohort_too_small"),
        ({"sites": tuple(f"s{n}" for n in range(65))}, "too_many_sites_for_secure"),
        ({"min_sites": 2}, "min_sites_below_k"),
        ({"quorum": 3, "deadline_s": 1.0}, "quorum_below_threshold"),
        ({"quorum": 4, "deadline_s": 1.0, "late_updates": "carry"}, "late_updates_masked"),
        ({"precision": "int8"}, "refused"),
    ],
)
def test_settings_that_do_not_go_with_masks_are_refused(settings, code):
    given = {"sites": tuple("ABCDE"), "min_sites": 3, **settings}
    with pytest.raises(RefusedError) as refused:
        check_secure_settings(make_settings(**given, secure=Secure()))
    assert refused.value.code == code
    if code in ("quorum_below_threshold", "late_updates_masked"):
        check_secure_settings(make_settings(**given))  # in clear they may be
