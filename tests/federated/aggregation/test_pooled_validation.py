"""Scores of classes that only some sites annotate, pooled over these."""

from __future__ import annotations

import pytest

from nnunetv2.federated.aggregation.pooled_validation import pool
from nnunetv2.federated.protocol.messages import Validation

COUNTED = {
    "A": Validation(tp=(4, 0), fp=(1, 0), fn=(1, 0)),
    "B": Validation(tp=(6, 2), fp=(2, 1), fn=(0, 1)),
    "C": Validation(tp=(0, 8), fp=(0, 2), fn=(0, 0)),
}
ANNOTATED = {"A": (1,), "B": (1, 2), "C": (2,)}


def test_a_class_is_summed_over_its_annotators():
    found = pool(0, COUNTED, before=None, min_sites=2, annotated=ANNOTATED)
    assert found.dice == pytest.approx((20 / 24, 20 / 24))
    assert found.dice_of_site["A"] == (pytest.approx(0.8), None)


def test_the_score_of_a_class_of_too_few_sites_is_not_told():
    without_c = {site: COUNTED[site] for site in "AB"}
    found = pool(0, without_c, before=None, min_sites=2, annotated=ANNOTATED)
    assert found.dice[0] == pytest.approx(20 / 24) and found.dice[1] is None
    assert found.mean_dice == found.dice[0]


def test_where_all_annotate_the_same_nothing_changes():
    assert pool(0, COUNTED, before=None, min_sites=2) == pool(
        0, COUNTED, before=None, min_sites=2, annotated=dict.fromkeys("ABC", (1, 2))
    )
