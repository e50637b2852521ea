"""Results of the same comparison from another folder."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from nnunetv2.comparison.arms import Arm, choose_arms
from nnunetv2.comparison.known_results import read_known
from nnunetv2.comparison.study import Dataset, Study

STUDY = Study(
    sites=(Dataset(name="Dataset601_North", folder="/a/north"), Dataset(name="Dataset602_South", folder="/a/south")),
    arms=choose_arms(("alone", "ffe"), {}),
    seeds=2,
    epochs=3,
    iterations=4,
    val_iterations=1,
    configuration="2d",
    fold="all",
    plans_name="nnUNetPlans",
    device="cpu",
)


TESTS = {601: ("601_a",), 602: ("602_a", "602_b")}


def write_result(folder, study=STUDY, *, arm="ffe", seeds=(0, 1)):
    scores = [
        {
            "arm": arm,
            "seed": seed,
            "model": site.name,
            "dataset": dataset,
            "case": case,
            "which": "1",
            "values": {"Dice": 0.5 + seed / 10, "HD95": None, "SurfaceDice": 0.5},
        }
        for seed in seeds
        for site in STUDY.sites
        for dataset, cases in TESTS.items()
        for case in cases
    ]
    file = folder / f"{arm}.json"
    file.write_text(
        json.dumps({"study": study.as_json(), "scores": scores, "costs": {arm: [{"seconds": seed} for seed in (0, 1)]}})
    )
    return file


def test_scores_and_costs_come_per_arm_and_seed_from_any_machine(tmp_path):
    elsewhere = replace(STUDY, device="cuda", sites=tuple(replace(one, folder="/b") for one in STUDY.sites), seeds=1)
    known = read_known(
        [write_result(tmp_path, elsewhere), write_result(tmp_path, arm="alone", seeds=(1,))], STUDY, TESTS
    )
    assert known.scores.keys() == {("ffe", 0), ("ffe", 1), ("alone", 1)}
    assert len(known.scores["ffe", 1]) == 6
    score = known.scores["ffe", 1][0]
    assert score.values["Dice"] == 0.6 and math.isnan(score.values["HD95"])
    assert known.costs["alone", 1] == {"seconds": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 5}, "of a comparison with epochs 5, this one has 3"),
        ({"plans_patch": {"configurations": {}}}, "with plans_patch .*, this one has {}"),
        ({"sites": tuple(reversed(STUDY.sites))}, "with sites Dataset602_South Dataset601_North, this one has"),
        ({"external": STUDY.sites[:1]}, "with external Dataset601_North, this one has"),
        ({"arms": (replace(STUDY.arms[1], checkpoint="checkpoint_best.pth"),)}, "was begun with another arm ffe"),
    ],
)
def test_results_of_another_comparison_are_refused_by_name(tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as raised:
        read_known([write_result(tmp_path, replace(STUDY, **change))], STUDY, TESTS)
    assert "ffe.json" in str(raised.value)


@pytest.mark.parametrize("part", ["scores", "costs"])
def test_a_damaged_file_is_named(tmp_path, part):
    file = write_result(tmp_path)
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, part: [{"arm": "ffe", "seed": 0}] if part == "scores" else {"ffe": []}}))
    with pytest.raises(ValueError, match="ffe.json is not what nnUNetv2_fed_compare writes"):
        read_known([file], STUDY, TESTS)


def changed(file, *, of="scores", change):
    """Change the first score, or the first cost, of a file."""
    content = json.loads(file.read_text())
    change(content["scores"][0] if of == "scores" else content["costs"]["ffe"][0])
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize("value", ["0.9", 7.0, -0.1, math.inf, math.nan, True, [0.9], 10**400])
@pytest.mark.parametrize("metric", ["Dice", "HD95", "SurfaceDice"])
def test_a_value_that_cannot_be_is_refused_by_its_field(tmp_path, metric, value):
    file = changed(write_result(tmp_path), change=lambda score: score["values"].update({metric: value}))
    if (metric, value) == ("HD95", 7.0):
        assert read_known([file], STUDY, TESTS).scores["ffe", 0][0].values["HD95"] == 7.0
        return
    with pytest.raises(ValueError, match=rf"ffe\.json .*scores\[0\]\.values\.{metric} must be a finite number"):
        read_known([file], STUDY, TESTS)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"dataset": "601"}, r"scores\[0\]\.dataset must be a whole number"),
        ({"dataset": 603}, r"scores\[0\]\.dataset must be one of 601, 602"),
        ({"dataset": 602}, r"scores\[0\]\.case must be a test case of dataset 602, it is '601_a'"),
        ({"case": "../../x"}, r"scores\[0\]\.case must be a test case of dataset 601"),
        ({"case": "602_a"}, r"scores\[0\]\.case must be"),
        ({"model": 1}, r"scores\[0\]\.model must be a text"),
        ({"which": ["1"]}, r"scores\[0\]\.which must be a text"),
        ({"seed": True}, r"scores\[0\]\.seed must be a whole number"),
        ({"seed": -1}, r"scores\[0\]\.seed must be a whole number"),
        ({"further": 1}, r"scores\[0\] must be in braces, with arm, "),
        ({"values": {"HD95": 1.0}}, r"scores\[0\]\.values must be in braces, with Dice, HD95, SurfaceDice"),
        ({"model": "Dataset602_South"}, r"scores\[3\] must be of a model, case and class that come once"),
    ],
)
def test_a_score_of_something_else_is_refused_by_its_field(tmp_path, change, field):
    file = changed(write_result(tmp_path), change=lambda score: score.update(change))
    with pytest.raises(ValueError, match=field) as raised:
        read_known([file], STUDY, TESTS)
    assert "ffe.json" in str(raised.value)


@pytest.mark.parametrize("change", [{"seconds": "3"}, {"bytes": -1}, {"bytes": math.inf}, {"further": 1}])
def test_a_cost_that_cannot_be_is_refused_by_its_field(tmp_path, change):
    file = changed(write_result(tmp_path), of="costs", change=lambda cost: cost.update(change))
    with pytest.raises(ValueError, match=r"ffe\.json .*costs\.ffe\[0\]"):
        read_known([file], STUDY, TESTS)


@pytest.mark.parametrize("lacks", ["a case", "a model", "a class"])
def test_a_training_without_all_its_scores_is_not_known_and_a_line_says_so(tmp_path, capsys, lacks):
    file = write_result(tmp_path)
    content = json.loads(file.read_text())
    of_first_seed = [one for one in content["scores"] if one["seed"] == 0]
    gone = (
        [one for one in of_first_seed if one["model"] == "Dataset602_South"]
        if lacks == "a model"
        else of_first_seed[:1]
    )
    content["scores"] = [one for one in content["scores"] if one not in gone]
    if lacks == "a class":
        content["scores"] += [gone[0], {**gone[0], "which": "2"}]
    file.write_text(json.dumps(content))
    assert read_known([file], STUDY, TESTS).scores.keys() == {("ffe", 1)}
    assert re.search(r"ffe\.json: arm ffe, seed 0 lacks \d scores, such as that of Data", capsys.readouterr().out)
    (tmp_path / "whole").mkdir()
    assert read_known([file, write_result(tmp_path / "whole")], STUDY, TESTS).scores.keys() == {("ffe", 0), ("ffe", 1)}


def test_trainings_of_other_arms_and_seeds_are_left_out(tmp_path):
    only_one = replace(STUDY, arms=STUDY.arms[:1], seeds=1)
    files = [write_result(tmp_path), write_result(tmp_path, arm="alone")]
    assert read_known(files, only_one, TESTS).scores.keys() == {("alone", 0)}


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[2] / "benchmarks" / "study_results").glob("*.json")))
def test_the_results_of_our_own_studies_are_known(file):
    content = json.loads(file.read_text())
    study = content["study"]
    parts = {
        "sites": tuple(Dataset(**one) for one in study["sites"]),
        "external": tuple(Dataset(**one) for one in study["external"]),
        "arms": tuple(
            Arm(**{key: tuple(value) if isinstance(value, list) else value for key, value in one.items()})
            for one in study["arms"]
        ),
    }
    same = Study(**{key: value for key, value in {**study, **parts}.items() if key != "version"})
    tests = defaultdict(set)
    for score in content["scores"]:
        tests[score["dataset"]].add(score["case"])
    trained = {(score["arm"], score["seed"]) for score in content["scores"]}
    assert {arm for arm, _ in trained} == {arm.name for arm in same.arms}
    assert {seed for _, seed in trained} == set(range(same.seeds))
    assert read_known([file], same, tests).scores.keys() == trained
