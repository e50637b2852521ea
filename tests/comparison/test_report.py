"""Report, tables and conclusion from invented scores, with real label maps for the pictures."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2.comparison.arms import ARMS
from nnunetv2.comparison.conclusion import conclude
from nnunetv2.comparison.report import REPORT, RESULT, TABLE, find, write_report
from nnunetv2.comparison.scores import POOLED, Score
from nnunetv2.comparison.significance import Comparison
from nnunetv2.comparison.study import Dataset, Study
from nnunetv2.comparison.study_folder import StudyFolder

ENDING, CASES = ".nii.gz", 8
LEVELS = {"alone": 0.5, "pooled": 0.8, "ffe": 0.7}


def make_study(folder, *, arms=("alone", "pooled", "ffe"), seeds=2):
    datasets = []
    for number, name in ((1, "Dataset001_<b>North"), (2, "Dataset002_South"), (3, "Dataset003_Far")):
        raw = folder / "raw" / str(number)
        raw.mkdir(parents=True, exist_ok=True)
        content = {"labels": {"background": 0, "a": 1}, "channel_names": {"0": "MRI"}, "file_ending": ENDING}
        (raw / "dataset.json").write_text(json.dumps(content))
        datasets.append(Dataset(name=name, folder=str(raw)))
    return Study(
        sites=tuple(datasets[:2]),
        external=tuple(datasets[2:]),
        arms=tuple(ARMS[arm] for arm in arms),
        seeds=seeds,
        epochs=1,
        iterations=1,
        val_iterations=1,
        configuration="3d_fullres",
        fold="all",
        plans_name="nnUNetPlans",
        device="cpu",
    )


def make_scores(study, *, case_name="c{}"):
    scores = []
    for arm in study.arms:
        models = [POOLED] if arm.training == "pooled" else [site.name for site in study.sites]
        for seed in range(study.seeds):
            for model in models:
                for dataset in study.tested:
                    for case in range(CASES):
                        dice = LEVELS[arm.name] + case / 100 + seed / 1000
                        values = {"Dice": dice, "HD95": 10 - 5 * dice, "SurfaceDice": dice}
                        name = f"{dataset.number:03d}_{case_name.format(case)}"
                        scores.append(
                            Score(
                                arm=arm.name,
                                seed=seed,
                                model=model,
                                dataset=dataset.number,
                                case=name,
                                which="1",
                                values=values,
                            )
                        )
    return scores


def write_predictions(study, folder, *, case_name="c{}"):
    """Write what the worst cases are drawn from: those of the federated arm at their own sites."""
    labels = np.zeros((4, 6, 8), np.uint8)
    labels[1:3, 2:4, 2:6] = 1
    for part in ("labels", "images"):
        (folder.tests / part).mkdir(parents=True)
    for site in study.sites:
        output = folder.predicted("ffe", 0, site.name)
        output.mkdir(parents=True)
        cases = []
        for case in range(CASES):
            name = f"{site.number:03d}_{case_name.format(case)}"
            for path in (folder.tests / "labels" / f"{name}{ENDING}", output / f"{name}{ENDING}"):
                sitk.WriteImage(sitk.GetImageFromArray(labels), str(path))
            metrics = {"1": {"Dice": 0.7}}
            reference = str(folder.tests / "labels" / f"{name}{ENDING}")
            cases.append({"metrics": metrics, "reference_file": reference, "prediction_file": f"/gone/{name}{ENDING}"})
        summary = {"metric_per_case": cases, "mean": {"1": {"Dice": 0.7}}, "foreground_mean": {"Dice": 0.7}}
        (output / "summary.json").write_text(json.dumps(summary))


def test_a_report_holds_every_number_and_no_external_asset(tmp_path):
    study = make_study(tmp_path)
    folder = StudyFolder(tmp_path / "study")
    write_predictions(study, folder)
    costs = {
        arm.name: [{"seconds": 90.0, "bytes": 5e6} if arm.is_federated else {"seconds": 60.0}] for arm in study.arms
    }
    write_report(find(study, make_scores(study), costs), folder)
    page = (folder.path / REPORT).read_text()
    assert not re.search(r"(src|href)=['\"](?!data:)", page) and "<b>North" not in page and "&lt;b&gt;North" in page
    assert page.count("<figure>") == 10 and "5.0 MB" in page and "@media print" in page
    result = json.loads((folder.path / RESULT).read_text())
    means = {
        (one["arm"], one["place"]): one["mean"]
        for one in result["estimates"]
        if one["dataset"] is None and one["metric"] == "Dice"
    }
    assert means["ffe", "own"] == means["ffe", "external"] == pytest.approx(0.7 + 0.035 + 0.0005)
    shown = {(one["place"], one["arm"], one["reference"]): one for one in result["comparisons"]}
    assert shown["other", "ffe", "alone"]["difference"] == pytest.approx(0.2)
    assert shown["other", "ffe", "alone"]["p_holm"] < 0.001 and shown["own", "pooled", "alone"]["num_cases"] == 16
    table = (folder.path / TABLE).read_text()
    assert "| ffe | pooled | -0.1000 | -0.100 to -0.100 | -0.100, -0.100 | 16 |" in table


def test_an_arm_without_a_distance_at_a_site_has_a_gap_there(tmp_path):
    study = make_study(tmp_path)
    folder = StudyFolder(tmp_path / "study")
    write_predictions(study, folder)
    scores = [
        replace(one, values={**one.values, "HD95": math.nan}) if (one.arm, one.dataset) == ("alone", 2) else one
        for one in make_scores(study)
    ]
    write_report(find(study, scores, {}), folder)
    table = (folder.path / TABLE).read_text().partition("HD95 (mm) at its own site")[2]
    row = next(line for line in table.splitlines() if line.startswith("| alone |"))
    assert [cell.strip() == "-" for cell in row.strip("| ").split(" | ")] == [False, False, True, True]
    page = (folder.path / REPORT).read_text()
    assert "<td>-<small>" in page
    missed = "Values left out, as nothing is predicted (or nothing is there): 16 of alone."
    assert missed in page and missed in table


def test_the_worst_case_may_have_dots_in_its_name(tmp_path):
    study = make_study(tmp_path)
    folder = StudyFolder(tmp_path / "study")
    write_predictions(study, folder, case_name="c.{}")
    write_report(find(study, make_scores(study, case_name="c.{}"), {}), folder)
    assert (folder.path / REPORT).read_text().count("<figure>") == 10


def test_the_conclusion_names_what_is_shown_and_what_is_not(tmp_path):
    def one(arm, reference, difference, p, tendency=0.0):
        sign = tendency or difference
        return Comparison(
            arm=arm,
            reference=reference,
            difference=difference,
            low=difference - 0.04,
            high=difference + 0.04,
            tendency=sign,
            num_cases=12,
            fewest_cases=4,
            p=p,
            p_holm=p,
        )

    study = make_study(tmp_path, seeds=1)
    several = [one("pooled", "alone", 0.3, 0.001), one("ffe", "alone", 0.2, 0.001), one("ffe", "pooled", -0.1, 0.3)]
    text = conclude(study, {"own": several})
    assert text.startswith(
        "At its own site: ffe (+0.200 Dice) is better than alone; ffe is not shown to differ from pooled.\n\n"
    )
    assert "A site has 4 test cases only" in text and "With 1 training of each kind" in text and "--seeds 3" in text
    assert "not about other trainings: look at the seeds" in text and "pooled is" not in text
    contradiction = conclude(study, {"own": [one("ffe", "alone", -0.05, 0.001, tendency=3.0)]})
    assert "At its own site: ffe is not shown to differ from alone." in contradiction
    untested = conclude(study, {"own": several, "external": [one("ffe", "alone", -0.3, math.nan)]})
    assert "At hospitals that nobody trained on: ffe is tested in too few cases to compare with alone." in untested
    study = make_study(tmp_path, arms=("alone", "ffe", "asym"))
    both = conclude(study, {"other": [one(arm, "alone", -0.1, 0.001) for arm in ("ffe", "asym")]})
    assert "ffe (-0.100 Dice) and asym (-0.100 Dice) are worse than alone." in both
    assert "nothing is compared" in conclude(make_study(tmp_path, arms=("alone",)), {"own": []})


def test_where_all_arms_are_federated_they_are_compared_with_the_first(tmp_path, monkeypatch):
    monkeypatch.setitem(LEVELS, "asym", 0.6)
    for arms, reference in ((("ffe", "asym"), "ffe"), (("asym", "ffe"), "asym"), (("ffe", "alone"), "alone")):
        study = make_study(tmp_path, arms=arms)
        [one] = find(study, make_scores(study), {}).comparisons["own"]
        assert {one.arm, one.reference} == set(arms)
        assert one.reference == reference
