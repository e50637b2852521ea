"""Tests of the decision on postprocessing, of its files, and of its commands."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from trained_models import make_dataset_json, make_model_plans, write_label_map

from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder2, load_summary_json
from nnunetv2.postprocessing import remove_connected_components as module
from nnunetv2.postprocessing.decision import group_disjoint
from nnunetv2.postprocessing.decision_files import load_functions
from nnunetv2.utilities import map_cases

KEEP = module.remove_all_but_largest_component_from_segmentation


def draw(*, island_of=None, true_island_of=None):
    """A reference with three blocks, and a prediction of it; islands are far from them."""
    reference = np.zeros((6, 20, 24), dtype=np.uint8)
    reference[1:5, 4:9, 2:8], reference[1:5, 4:9, 8:13], reference[1:5, 4:9, 13:16] = 1, 2, 3
    prediction = reference.copy()
    if island_of is not None:
        prediction[2:4, 15:17, 20:22] = island_of
    if true_island_of is not None:
        reference[1, 17, 2:4] = prediction[1, 17, 2:4] = true_island_of
    return reference, prediction


@pytest.fixture
def folders(tmp_path):
    def make(*pairs, **changes):
        for name in ("references", "predictions"):
            (tmp_path / name).mkdir()
        for number, (reference, prediction) in enumerate(pairs):
            write_label_map(tmp_path / "references" / f"case_{number}.nii.gz", reference)
            write_label_map(tmp_path / "predictions" / f"case_{number}.nii.gz", prediction)
        (tmp_path / "predictions" / "dataset.json").write_text(json.dumps(make_dataset_json(**changes)))
        (tmp_path / "predictions" / "plans.json").write_text(json.dumps(make_model_plans()))
        return str(tmp_path / "predictions"), str(tmp_path / "references")

    return make


def read(folder, name):
    return sitk.GetArrayFromImage(sitk.ReadImage(os.path.join(folder, name)))


def test_an_island_of_foreground_is_removed(folders):
    predictions, references = folders(draw(island_of=1), draw())
    functions, kwargs = module.determine_postprocessing(predictions, references, None, None, 1)
    assert functions == [KEEP] and kwargs == [{"labels_or_regions": [1, 2, 3]}]
    assert np.array_equal(read(predictions, "postprocessed/case_0.nii.gz"), read(references, "case_0.nii.gz"))
    summary = load_summary_json(os.path.join(predictions, "postprocessed", "summary.json"))
    assert summary["foreground_mean"]["Dice"] == 1
    assert load_summary_json(os.path.join(predictions, "summary.json"))["foreground_mean"]["Dice"] < 1


def test_a_class_that_would_suffer_vetoes_the_foreground_but_not_the_other_classes(folders):
    # class 3 truly has an island, class 1 wrongly
    predictions, references = folders(draw(island_of=1, true_island_of=3))
    _, kwargs = module.determine_postprocessing(predictions, references, None, None, 1)
    assert kwargs == [{"labels_or_regions": 1}]
    result = read(predictions, "postprocessed/case_0.nii.gz")
    assert result[1, 17, 2] == 3 and result[2, 15, 20] == 0


def test_nothing_is_removed_of_what_is_not_annotated(folders):
    reference, prediction = draw(island_of=3)
    reference[reference == 3] = 0
    predictions, references = folders((reference, prediction))
    described = make_dataset_json()
    annotated = [name for name, value in described["labels"].items() if value < 3]
    Path(predictions, "dataset.json").write_text(json.dumps({**described, "annotated_labels": annotated}))
    assert module.determine_postprocessing(predictions, references, None, None, 1)[1] == []


def test_what_changes_nothing_is_not_accepted(folders):
    predictions, references = folders(draw(), draw())
    functions, kwargs = module.determine_postprocessing(
        predictions, references, None, None, 1, keep_postprocessed_files=False
    )
    assert functions == [] and kwargs == []
    assert not os.path.exists(os.path.join(predictions, "postprocessed"))  # noqa: PTH110
    assert pickle.loads(open(os.path.join(predictions, "postprocessing.pkl"), "rb").read()) == ([], [])  # noqa: PTH123, SIM115


def test_regions_are_tried_one_inside_the_other(folders):
    reference, prediction = draw()
    prediction[2, 5:7, 3:5] = 2  # an island of the core inside the whole: only the inner region can remove it
    predictions, references = folders((reference, prediction), regions=True)
    _, kwargs = module.determine_postprocessing(predictions, references, None, None, 1)
    assert kwargs == [{"labels_or_regions": (2, 3)}]
    # what is removed becomes background, also where it was inside the whole
    assert read(predictions, "postprocessed/case_0.nii.gz")[2, 5, 3] == 0


def test_decisions_equal_those_of_evaluating_written_files(folders, tmp_path):
    """Each step done the long way: postprocess files, evaluate the folder, compare."""
    rng = np.random.default_rng(4)
    pairs = []
    for _ in range(3):
        reference, prediction = draw()
        prediction = np.where(rng.random(prediction.shape) < 0.03, rng.integers(0, 4, prediction.shape), prediction)
        pairs.append((reference, prediction.astype(np.uint8)))
    predictions, references = folders(*pairs)
    _, kwargs = module.determine_postprocessing(predictions, references, None, None, 1)
    accepted, files = [], [os.path.join(predictions, name) for name in ("dataset.json", "plans.json")]

    def score(entries):
        target = tmp_path / f"trial_{len(list(tmp_path.iterdir()))}"
        module.apply_postprocessing_to_folder(
            predictions,
            str(target),
            [KEEP] * len(entries),
            [{"labels_or_regions": entry} for entry in entries],
            num_processes=1,
        )
        compute_metrics_on_folder2(references, str(target), *files, num_processes=1)
        return load_summary_json(target / "summary.json")

    old, new = score([]), score([[1, 2, 3]])
    if new["foreground_mean"]["Dice"] > old["foreground_mean"]["Dice"] and all(
        new["mean"][which]["Dice"] >= old["mean"][which]["Dice"] for which in (1, 2, 3)
    ):
        accepted.append([1, 2, 3])
    for which in (1, 2, 3):
        if score([*accepted, which])["mean"][which]["Dice"] > score(accepted)["mean"][which]["Dice"]:
            accepted.append(which)
    assert [entry["labels_or_regions"] for entry in kwargs] == accepted and accepted
    final = load_summary_json(os.path.join(predictions, "postprocessed", "summary.json"))
    assert final["mean"] == score(accepted)["mean"]


@pytest.mark.slow
def test_several_processes_decide_alike(folders, monkeypatch):
    predictions, references = folders(draw(island_of=1), draw(island_of=2), draw())
    alone = module.determine_postprocessing(predictions, references, None, None, 1)
    monkeypatch.setattr(map_cases, "PROCESSES_PAY_FROM", 0)
    monkeypatch.setattr(map_cases, "usable_cpu_count", lambda: 2)
    assert module.determine_postprocessing(predictions, references, None, None, 2) == alone


def test_classes_without_common_labels_are_tried_together():
    assert group_disjoint([1, 2, 3]) == [[1, 2, 3]]
    assert group_disjoint([(1, 2, 3), (2, 3), (3,)]) == [[(1, 2, 3)], [(2, 3)], [(3,)]]
    assert group_disjoint([(1, 2), 3, (2, 3), 4]) == [[(1, 2), 3], [(2, 3), 4]]


def test_a_prediction_that_is_no_label_map_is_named(folders):
    predictions, references = folders(draw())
    image = sitk.GetImageFromArray(np.full((6, 20, 24), 0.5, dtype=np.float32))
    sitk.WriteImage(image, os.path.join(predictions, "case_0.nii.gz"))
    with pytest.raises(ValueError, match=r"case_0\.nii\.gz is no label map"):
        module.determine_postprocessing(predictions, references, None, None, 1)


def test_missing_files_are_named(folders):
    predictions, references = folders(draw())
    os.remove(os.path.join(predictions, "plans.json"))  # noqa: PTH107
    with pytest.raises(RuntimeError, match="has no plans.json"):
        module.determine_postprocessing(predictions, references, None, None, 1)
    with pytest.raises(RuntimeError, match="has no plans.json"):
        module.apply_postprocessing_to_folder(predictions, predictions + "_pp", [], [])


class _Attack:
    """Writes a file if it is unpickled by a careless reader."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').write('executed')",)


def test_a_pickle_that_means_harm_does_nothing(tmp_path, monkeypatch, capsys):
    evil = tmp_path / "postprocessing.pkl"
    evil.write_bytes(pickle.dumps(([_Attack(tmp_path / "proof")], [{}])))
    with pytest.raises(ValueError, match="can run any program"):
        load_functions(evil)
    folder = str(tmp_path)
    monkeypatch.setattr(sys, "argv", ["apply", "-i", folder, "-o", folder, "-pp_pkl_file", str(evil)])
    with pytest.raises(SystemExit) as stop:
        module.entry_point_apply_postprocessing()
    assert stop.value.code == 1 and "postprocessing.pkl" in capsys.readouterr().err
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    "content",
    [
        {"spacing": [1, 1, 1]},  # the properties of a case
        ([KEEP], []),
        ([KEEP], [{"labels_or_regions": "all"}]),
        ([KEEP], [{"labels_or_regions": 1, "other": 2}]),
        ([len], [{}]),
    ],
)
def test_other_pickles_are_refused(tmp_path, content):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"x\.pkl"):
        load_functions(tmp_path / "x.pkl")


@pytest.mark.parametrize(
    "content", ["{}", "[]", "no json", '{"postprocessing_fns": ["os.system"], "postprocessing_kwargs": [{}]}']
)
def test_other_json_files_are_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"x\.json"):
        load_functions(tmp_path / "x.pkl")


def test_a_pickle_with_numpy_numbers_is_read(tmp_path):
    (tmp_path / "x.pkl").write_bytes(
        pickle.dumps(
            ([KEEP, KEEP], [{"labels_or_regions": [np.int64(1), np.int64(2)]}, {"labels_or_regions": (np.int64(1), 3)}])
        )
    )
    functions, kwargs = load_functions(tmp_path / "x.pkl")
    assert functions == [KEEP, KEEP]
    assert kwargs == [{"labels_or_regions": [1, 2]}, {"labels_or_regions": (1, 3)}]
    assert type(kwargs[0]["labels_or_regions"][0]) is int


def test_the_commands_determine_and_apply(folders, monkeypatch, capsys, tmp_path):
    predictions, references = folders(draw(island_of=1), draw())
    monkeypatch.setattr(
        sys, "argv", ["determine", "-i", predictions, "-ref", references, "-np", "1", "--remove_postprocessed"]
    )
    module.entry_point_determine_postprocessing_folder()
    assert "[1, 2, 3]" in capsys.readouterr().out
    target = tmp_path / "applied"
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "apply",
            "-i",
            predictions,
            "-o",
            str(target),
            "-np",
            "1",
            "-pp_pkl_file",
            os.path.join(predictions, "postprocessing.pkl"),
        ],
    )
    module.entry_point_apply_postprocessing()
    assert sorted(file.name for file in target.iterdir()) == ["case_0.nii.gz", "case_1.nii.gz"]
    assert np.array_equal(read(str(target), "case_0.nii.gz"), read(references, "case_0.nii.gz"))
