"""The list of doubtful cases is as long as it should be."""

from __future__ import annotations

import numpy as np
import pytest

from nnunetv2.annotation_audit.doubtful import choose_cut, describe_classes, describe_usual, score_case


def draw_distances(rng, number, *, typical=0.5, spread=0.25):
    return list(typical * np.exp(rng.normal(0, spread, number)))


@pytest.mark.parametrize(("classes", "cut"), [(1, 2.326), (2, 2.575), (10, 3.089)])
def test_more_classes_raise_the_cut(classes, cut):
    assert choose_cut(classes) == pytest.approx(cut, abs=1e-3)


def test_the_usual_is_hardly_moved_by_a_fifth_of_wrong_labels():
    rng = np.random.default_rng(0)
    right, wrong = draw_distances(rng, 400), draw_distances(rng, 100, typical=4)
    alone, mixed = describe_usual(right), describe_usual(right + wrong)
    assert abs(mixed.median - alone.median) < 0.1 and mixed.spread == pytest.approx(alone.spread, rel=0.35)


def test_of_right_labels_about_as_many_are_listed_as_asked_for():
    rng = np.random.default_rng(1)
    cases = [{"a": one, "b": other} for one, other in zip(draw_distances(rng, 4000), draw_distances(rng, 4000))]
    usual, cut = describe_classes(cases), choose_cut(2, 0.05)
    assert np.mean([score_case(case, usual)[0] > cut for case in cases]) == pytest.approx(0.05, abs=0.02)


def test_a_case_is_as_doubtful_as_its_most_doubtful_class():
    usual = describe_classes([{"a": 1.0, "b": 2.0}, {"a": 1.3, "b": 2.5}, {"a": 0.8, "b": 1.8}])
    assert score_case({"a": 9.0, "b": 2.0}, usual)[1] == "a" and score_case({}, usual) == (0.0, None)


def test_equal_distances_are_no_reason_to_list_everything():
    usual = describe_usual([0.5] * 20)
    assert usual.score(0.5) == 0 and usual.score(0.55) < 1 and usual.distance_mm(0) == pytest.approx(0.5)
