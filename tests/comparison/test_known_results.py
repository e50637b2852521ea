"""Results of the same comparison from another folder."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from nnunetv2.comparison.arms import choose_arms
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


def write_result(folder, study=STUDY, *, arm="ffe", seeds=(0, 1)):
    scores = [
        {
            "arm": arm,
            "seed": seed,
            "model": "Dataset601_North",
            "dataset": 601,
            "case": "601_a",
            "which": "1",
            "values": {"Dice": 0.5 + seed / 10, "HD95": None, "SurfaceDice": 0.5},
        }
        for seed in seeds
    ]
    file = folder / f"{arm}.json"
    file.write_text(
        json.dumps({"study": study.as_json(), "scores": scores, "costs": {arm: [{"seconds": seed} for seed in (0, 1)]}})
    )
    return file


def test_scores_and_costs_come_per_arm_and_seed_from_any_machine(tmp_path):
    elsewhere = replace(STUDY, device="cuda", sites=tuple(replace(one, folder="/b") for one in STUDY.sites), seeds=1)
    known = read_known([write_result(tmp_path, elsewhere), write_result(tmp_path, arm="alone", seeds=(1,))], STUDY)
    assert known.scores.keys() == {("ffe", 0), ("ffe", 1), ("alone", 1)}
    [score] = known.scores["ffe", 1]
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
        read_known([write_result(tmp_path, replace(STUDY, **change))], STUDY)
    assert "ffe.json" in str(raised.value)


@pytest.mark.parametrize("part", ["scores", "costs"])
def test_a_damaged_file_is_named(tmp_path, part):
    file = write_result(tmp_path)
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, part: [{"arm": "ffe", "seed": 0}] if part == "scores" else {"ffe": []}}))
    with pytest.raises(ValueError, match="ffe.json is not what nnUNetv2_fed_compare writes"):
        read_known([file], STUDY)
