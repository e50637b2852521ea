"""The classes of all sites get numbers that do not depend on who came first."""

from __future__ import annotations

import time
from itertools import islice, permutations, product

import pytest

from nnunetv2.federated.errors import RefusedError, WireError
from nnunetv2.federated.exchanges.label_union import LabelUnion, check_union, check_within, unite_labels


def labels(*names, **others) -> dict:
    return {"background": 0, **{name: number for number, name in enumerate(names, 1)}, **others}


def test_the_numbers_are_those_of_the_first_site_that_has_all_classes():
    sites = {"C": labels("spleen", "liver"), "B": labels("liver", "spleen"), "A": labels("spleen")}
    assert unite_labels(sites).labels == labels("liver", "spleen")  # B comes before C


def test_without_such_a_site_the_smallest_value_decides_and_then_the_name():
    sites = {"A": labels("spleen", "liver"), "B": labels("liver", "kidney"), "C": labels("aorta", "kidney")}
    assert unite_labels(sites).labels == labels("aorta", "liver", "spleen", "kidney")


def test_the_order_of_sites_does_not_matter():
    sites = {"A": labels("spleen", "liver"), "B": labels("liver", "kidney"), "C": labels("aorta", "kidney")}
    found = [unite_labels(dict(order)) for order in permutations(sites.items())]
    assert all(one == found[0] and [*one.labels] == [*found[0].labels] for one in found)


def test_equal_labels_stay_as_they_are():
    own = labels("liver", "spleen", ignore=3)
    union = unite_labels({"A": own, "B": own})
    assert union.labels == own
    assert union.annotators == {"liver": 2, "spleen": 2}


def test_gaps_are_closed_and_ignore_comes_last():
    union = unite_labels({"A": labels(liver=7, spleen=3), "B": labels("liver", ignore=2)})
    assert union.labels == {"background": 0, "spleen": 1, "liver": 2, "ignore": 3}
    assert union.annotators == {"spleen": 1, "liver": 2}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Tumor", "tumor"),
        ("left kidney", "left_kidney"),
        ("kidney", "kidneys"),
        ("biopsy", "biopsies"),
        ("mass", "masses"),
        ("rib 1", "rib1"),
    ],
)
def test_one_class_in_two_spellings_is_refused_with_both(one, other):
    with pytest.raises(RefusedError) as caught:
        unite_labels({"A": labels("liver", one), "B": labels("liver", other)})
    assert all(words in str(caught.value) for words in (f"{one!r} at A", f"{other!r} at B"))
    assert caught.value.code == "datasets_differ"


def test_names_that_differ_in_more_are_two_classes():
    assert len(unite_labels({"A": labels("liver", "rib 1"), "B": labels("liver", "rib 11")}).annotators) == 3


def test_a_site_that_has_both_names_means_two_classes():
    union = unite_labels({"A": labels("lesion", "lesions"), "B": labels("lesion")})
    assert union.annotators == {"lesion": 2, "lesions": 1}


@pytest.mark.parametrize(
    ("sites", "words"),
    [
        ({"A": labels(whole=(1, 2)), "B": labels("liver")}, "'whole' of site A is a region"),
        ({"A": {"liver": 1}, "B": labels("liver")}, "site A has no label 'background' with value 0"),
        ({"A": {"background": 1, "liver": 0}, "B": labels("liver")}, "site A has no label 'background'"),
        ({"A": labels(liver=1, spleen=1), "B": labels("liver")}, "'liver', 'spleen' of site A both have value 1"),
        (
            {"A": labels("liver"), "B": labels("spleen"), "C": labels("liver")},
            "site B annotates 'spleen', and no other",
        ),
        ({"A": labels(), "B": labels("liver"), "C": labels("liver")}, "site A annotates nothing"),
    ],
)
def test_what_cannot_be_told_apart_is_refused_by_name(sites, words):
    with pytest.raises(RefusedError, match="--labels union: ") as caught:
        unite_labels(sites)
    assert words in str(caught.value)


def test_thousands_of_classes_take_no_time():
    many = labels(*(f"class number {number}x" for number in range(3000)))
    assert len(unite_labels({"A": many, "B": many}).annotators) == 3000


def test_thousands_of_names_of_one_site_that_look_alike_take_no_time():
    alike = ["a" + "".join(signs) for signs in islice(product("_.- ", repeat=7), 10_000)]
    sites = {"A": labels(*alike), "B": labels(alike[0]), "C": labels(alike[0])}
    begin = time.process_time()
    assert len(unite_labels(sites).annotators) == len(alike)
    assert time.process_time() - begin < 2  # 12 s and more when each is compared with each
    with pytest.raises(RefusedError, match="'A' at C and 'a-. __  ' at A look like one class"):
        unite_labels({**sites, "C": labels("A", alike[1])})


UNION = LabelUnion(labels("liver", "spleen", ignore=3), {"liver": 2, "spleen": 1})


def test_a_late_site_has_classes_of_the_others():
    check_within(UNION, "C", labels("spleen"))
    with pytest.raises(RefusedError, match="site C comes late with 'aorta'"):
        check_within(UNION, "C", labels("spleen", "aorta"))
    with pytest.raises(RefusedError, match="'Spleen' at C"):
        check_within(UNION, "C", labels("Spleen"))
    with pytest.raises(RefusedError, match="no class but 'background'"):
        check_within(UNION, "C", labels())


@pytest.mark.parametrize(
    ("numbers", "annotators", "words"),
    [
        (None, {}, "has not numbered the classes"),
        (labels("liver"), {"liver": 2}, "has not numbered 'spleen' of this site"),
        ({"background": 0, "liver": 1, "spleen": 3}, {"liver": 2, "spleen": 1}, "expected 0 to 2"),
        ({"background": 1, "liver": 0, "spleen": 2}, {"liver": 2, "spleen": 1}, "expected 0 to 2"),
        ({"background": 0, "ignore": 1, "liver": 2, "spleen": 3}, {"liver": 1, "spleen": 1}, "'ignore' the number 1"),
        (labels("liver", "spleen"), {"liver": 2}, "how many sites annotate it"),
        ({**labels("liver"), "spleen": (2,)}, {"liver": 2, "spleen": 1}, "expected 0 to 2"),
    ],
)
def test_a_site_believes_no_impossible_numbers(numbers, annotators, words):
    with pytest.raises(WireError, match=words):
        check_union(numbers, annotators, labels("liver", "spleen"))


def test_a_site_takes_the_numbers_in_their_order():
    sent = dict(reversed(UNION.labels.items()))
    assert [*check_union(sent, UNION.annotators, labels("spleen"))] == [*UNION.labels]
