"""One value per case from the scores of many models, classes and seeds."""

import json
import math

import pytest

from nnunetv2.comparison.scores import POOLED, Score, matrix, means_per_seed, read_scores, values_per_case

SITES = {1: "north", 2: "south"}


def score(model, dataset, dice, *, arm="ffe", case="case", which="1", seed=0):
    values = {"Dice": dice, "HD95": math.nan, "SurfaceDice": math.nan}
    return Score(arm=arm, seed=seed, model=model, dataset=dataset, case=f"{dataset}_{case}", which=which, values=values)


def test_a_case_has_the_mean_of_its_classes_then_of_models_then_of_seeds():
    scores = [
        score("north", 2, 0.2, which="1"),
        score("north", 2, 0.4, which="2"),
        score("north", 2, 0.9, which="1", seed=1),
        score("north", 2, math.nan, which="2", seed=1),
    ]
    assert values_per_case(scores, SITES, "other", "Dice") == {"ffe": {2: {"2_case": pytest.approx(0.625)}}}


def test_cases_with_dots_in_their_names_are_told_apart(tmp_path):
    cases = [
        {"metrics": {"1": {"Dice": dice}}, "reference_file": "", "prediction_file": f"/there/001_scan.{number}.nii.gz"}
        for number, dice in ((1, 0.2), (2, 0.6))
    ]
    summary = {"metric_per_case": cases, "mean": {"1": {"Dice": 0.4}}, "foreground_mean": {"Dice": 0.4}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    scores = read_scores(tmp_path / "summary.json", ending=".nii.gz", arm="ffe", seed=0, model="north")
    assert values_per_case(scores, SITES, "own", "Dice") == {"ffe": {1: {"001_scan.1": 0.2, "001_scan.2": 0.6}}}


def test_places_are_told_apart():
    scores = [score("north", 1, 0.9), score("north", 2, 0.5), score("north", 3, 0.7), score("south", 3, 0.1)]
    assert values_per_case(scores, SITES, "own", "Dice") == {"ffe": {1: {"1_case": 0.9}}}
    assert values_per_case(scores, SITES, "other", "Dice") == {"ffe": {2: {"2_case": 0.5}}}
    assert values_per_case(scores, SITES, "external", "Dice") == {"ffe": {3: {"3_case": pytest.approx(0.4)}}}


def test_a_pooled_model_is_at_home_everywhere_and_a_stranger_too():
    scores = [score(POOLED, 1, 0.9), score(POOLED, 3, 0.3)]
    for place in ("own", "other"):
        assert values_per_case(scores, SITES, place, "Dice") == {"ffe": {1: {"1_case": 0.9}}}


def test_what_is_nowhere_defined_is_left_out():
    assert values_per_case([score("north", 1, math.nan)], SITES, "own", "HD95") == {}


def test_who_predicts_nothing_where_nothing_is_beats_who_invents_something():
    """The evaluation defines no Dice there."""
    scores = [score("north", 1, math.nan), score("north", 1, 0.0, arm="alone")]
    assert values_per_case(scores, SITES, "own", "Dice") == {"alone": {1: {"1_case": 0.0}}, "ffe": {1: {"1_case": 1.0}}}
    assert values_per_case(scores, SITES, "own", "SurfaceDice")["ffe"] == {1: {"1_case": 1.0}}
    assert matrix(scores, "ffe", "Dice") == {"north": {1: 1.0}}


def test_a_seed_and_a_matrix_have_means_of_their_own():
    scores = [score("north", 1, 0.2), score("north", 1, 0.6, seed=1), score("south", 2, 0.4)]
    assert means_per_seed(scores, SITES, "own", "Dice") == {"ffe": {0: pytest.approx(0.3), 1: pytest.approx(0.6)}}
    assert matrix(scores, "ffe", "Dice") == {"north": {1: pytest.approx(0.4)}, "south": {2: 0.4}}
