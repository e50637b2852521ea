"""The list of doubtful cases is as long as it should be."""

from __future__ import annotations

import numpy as np
import pytest

from nnunetv2.annotation_audit.disagreement import Figures
from nnunetv2.annotation_audit.doubtful import choose_cut, describe_classes, describe_usual, score_case


def draw_figures(rng, number, *, typical=0.5, offset=0.0):
    distances = typical * np.exp(rng.normal(0, 0.25, number))
    return [Figures(distance, rng.normal(offset, 0.1)) for distance in distances]


@pytest.mark.parametrize(("classes", "cut"), [(1, 2.712), (2, 2.934), (10, 3.402)])
def test_more_classes_raise_the_cut(classes, cut):
    assert choose_cut(classes) == pytest.approx(cut, abs=1e-3)


def test_the_usual_is_hardly_moved_by_a_fifth_of_wrong_labels():
    rng = np.random.default_rng(0)
    right, wrong = draw_figures(rng, 400), draw_figures(rng, 100, typical=4, offset=2)
    alone, mixed = describe_usual(right), describe_usual(right + wrong)
    assert abs(mixed.log_distance - alone.log_distance) < 0.1 and abs(mixed.offset_mm - alone.offset_mm) < 0.04
    assert mixed.log_distance_spread == pytest.approx(alone.log_distance_spread, rel=0.5)
    assert mixed.offset_spread_mm == pytest.approx(alone.offset_spread_mm, rel=0.5)


def test_of_right_labels_about_as_many_are_listed_as_asked_for():
    rng = np.random.default_rng(1)
    cases = [{"a": one, "b": other} for one, other in zip(draw_figures(rng, 4000), draw_figures(rng, 4000))]
    usual, cut = describe_classes(cases), choose_cut(2, 0.05)
    assert np.mean([score_case(case, usual)[0] > cut for case in cases]) == pytest.approx(0.05, abs=0.02)


def test_a_case_is_as_doubtful_as_its_most_doubtful_class():
    cases = [{"a": Figures(a, 0.0), "b": Figures(b, 0.0)} for a, b in ((1.0, 2.0), (1.3, 2.5), (0.8, 1.8))]
    usual = describe_classes(cases)
    assert score_case({"a": Figures(9.0, 0.0), "b": Figures(2.0, 0.0)}, usual)[1] == "a"
    assert score_case({}, usual) == (0.0, None)


@pytest.mark.parametrize("offset", [-0.8, 0.8])
def test_a_label_that_is_too_small_or_too_large_stands_out_by_its_offset(offset):
    rng = np.random.default_rng(2)
    usual = describe_usual(draw_figures(rng, 100, offset=0.1))
    assert usual.score(Figures(0.9, offset)) > choose_cut(1) > usual.score_distance(0.9)


def test_equal_figures_are_no_reason_to_list_everything():
    usual = describe_usual([Figures(0.5, 0.0)] * 20)
    assert usual.score(Figures(0.5, 0.0)) == 0 and usual.score(Figures(0.54, 0.04)) < 1
    assert usual.distance_mm == pytest.approx(0.5)
