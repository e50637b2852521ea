"""Tests of scores, summaries and their commands."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
from tiny_models import TinyModel

from nnunetv2.evaluation import evaluate_predictions
from nnunetv2.evaluation.confusion import compute_confusion
from nnunetv2.evaluation.evaluate_predictions import (
    compute_metrics,
    compute_metrics_on_folder,
    compute_metrics_on_folder2,
    compute_metrics_on_folder_simple,
    compute_tp_fp_fn_tn,
    evaluate_folder_entry_point,
    evaluate_simple_entry_point,
    key_to_label_or_region,
    label_or_region_to_key,
    labels_to_list_of_regions,
    load_summary_json,
    region_or_label_to_mask,
    save_summary_json,
)


class FakeReader:
    """Finds 'files' in a dict."""

    def __init__(self, **files):
        self.files = files

    def read_seg(self, name):
        return np.array(self.files[name], dtype=np.float32)[None], {}


REFERENCE = [[[0, 0, 1, 1], [2, 2, 3, 9]]]
PREDICTION = [[[0, 1, 1, 2], [2, 2, 0, 1]]]


def score(classes, reference=REFERENCE, prediction=PREDICTION, **options):
    return compute_metrics("ref", "pred", FakeReader(ref=reference, pred=prediction), classes, **options)["metrics"]


def test_scores_of_single_labels():
    scores = score([1, 2])
    assert scores[1] == {"Dice": 2 / 5, "IoU": 1 / 4, "FP": 2, "TP": 1, "FN": 1, "TN": 4, "n_pred": 3, "n_ref": 2}
    assert scores[2] == {"Dice": 4 / 5, "IoU": 2 / 3, "FP": 1, "TP": 2, "FN": 0, "TN": 5, "n_pred": 3, "n_ref": 2}


def test_a_region_is_the_union_of_its_labels():
    scores = score([(1, 2, 3)])[(1, 2, 3)]
    assert (scores["TP"], scores["FP"], scores["FN"], scores["TN"]) == (4, 2, 1, 1)


def test_ignored_voxels_do_not_count():
    scores = score([1], ignore_label=9)[1]
    assert (scores["TP"], scores["FP"], scores["FN"], scores["TN"]) == (1, 1, 1, 4)


def test_a_class_that_is_nowhere_has_no_dice():
    scores = score([7])[7]
    assert math.isnan(scores["Dice"]) and math.isnan(scores["IoU"])
    assert (scores["TP"], scores["FP"], scores["FN"], scores["TN"]) == (0, 0, 0, 8)


def test_a_mismatch_of_shapes_names_both_files():
    reader = FakeReader(ref=REFERENCE, pred=[[[1, 2]]])
    with pytest.raises(ValueError, match=r"pred has shape \(1, 1, 2\).*ref has \(1, 2, 4\)"):
        compute_metrics("ref", "pred", reader, [1])


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (np.uint8, (0, 1, 255)),
        (np.int16, (-30000, 0, 30000)),
        (np.int64, (-1, 0, 255)),
        (np.float32, (-1, 0, 1)),
        (np.float32, (0, 3, 70000)),
        (np.float32, (0, 0.5, 1)),
    ],
)
def test_counts_equal_those_of_masks(values, dtype):
    reference, prediction = np.random.default_rng(0).choice(np.array(values, dtype=dtype), (2, 3, 70, 40, 41))
    confusion = compute_confusion(reference, prediction)
    for label in {int(value) for value in values}:
        masks = reference == label, prediction == label
        expected = [
            int(np.sum(a & b))
            for a, b in ((masks[0], masks[1]), (~masks[0], masks[1]), (masks[0], ~masks[1]), (~masks[0], ~masks[1]))
        ]
        assert list(confusion.of_class([label])) == expected


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (np.uint8, (0, 1, 2, 3, 250)),
        (np.int32, (-1, 0, 1, 3, 4, 250, 100_000)),
        (np.float32, (0, 1, 2, 3)),
        (np.float32, (-1, 0, 0.5, 1, 3, 250, math.nan, 100_000)),
    ],
)
def test_values_that_nobody_asks_for_are_counted_together(dtype, values):
    reference, prediction = np.random.default_rng(0).choice(np.array(values, dtype=dtype), (2, 30, 40, 41))
    every, wanted = compute_confusion(reference, prediction), compute_confusion(reference, prediction, [1, 3, 250])
    assert wanted.counts.shape == (5, 5)
    for region in ([1], [3], [250], [1, 3]):
        assert wanted.of_class(region) == every.of_class(region)
        assert wanted.without_reference(3).of_class(region) == every.without_reference(3).of_class(region)


def test_maps_of_many_instances_need_little_memory():
    instances = np.arange(70_000, dtype=np.int32).reshape(1, 7, 100, 100)
    results = compute_metrics("ref", "pred", FakeReader(ref=instances, pred=instances[:, ::-1]), [1, (2, 3)])
    assert results["metrics"][1]["n_ref"] == 1 and results["metrics"][2, 3]["n_pred"] == 2


def test_an_intensity_image_is_told_from_a_label_map(caplog):
    intensities = np.random.default_rng(0).normal(size=(1, 20, 30, 40)).astype(np.float32)
    labels = (intensities > 0).astype(np.uint8)
    results = compute_metrics("ref", "pred", FakeReader(ref=labels, pred=intensities), [1])
    assert results["metrics"][1]["Dice"] == 0
    assert "pred is no label map" in caplog.text and "ref is no label map" not in caplog.text


def test_masks_are_counted_outside_of_ignored_voxels():
    reference, prediction = np.array([1, 1, 0, 0, 1], bool), np.array([1, 0, 1, 0, 0], bool)
    assert compute_tp_fp_fn_tn(reference, prediction) == (1, 1, 2, 1)
    assert compute_tp_fp_fn_tn(reference, prediction, np.array([0, 0, 0, 0, 1], bool)) == (1, 1, 1, 1)


def test_masks_of_labels_and_regions():
    labels = np.array([[0, 1], [2, 3]])
    assert region_or_label_to_mask(labels, 1).tolist() == [[False, True], [False, False]]
    assert region_or_label_to_mask(labels, (1, 3)).tolist() == [[False, True], [False, True]]
    assert labels_to_list_of_regions([1, 2]) == [(1,), (2,)]


@pytest.mark.parametrize(
    ("which", "key"),
    [(1, "1"), (np.int64(2), "2"), ((1, 2, 3), "(1, 2, 3)"), ((1,), "(1,)"), ((np.int64(1), np.int64(2)), "(1, 2)")],
)
def test_keys_of_classes_come_back(which, key):
    assert label_or_region_to_key(which) == key
    assert key_to_label_or_region(key) == which


@pytest.fixture
def folders(tmp_path):
    """Write three references and predictions as NIfTI; class 3 is nowhere, class 2 is missing in case b."""
    import SimpleITK as sitk

    rng = np.random.default_rng(0)
    for folder in ("references", "predictions"):
        (tmp_path / folder).mkdir()
        for name, highest in (("a", 2), ("b", 1), ("c", 2)):
            image = sitk.GetImageFromArray(rng.integers(0, highest + 1, (4, 5, 6)).astype(np.uint8))
            sitk.WriteImage(image, str(tmp_path / folder / f"{name}.nii.gz"))
    return tmp_path


def score_folders(folders, classes=(1, 2, 3), output=None, **options):
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    return compute_metrics_on_folder(
        str(folders / "references"),
        str(folders / "predictions"),
        output,
        SimpleITKIO(),
        ".nii.gz",
        list(classes),
        **options,
    )


def test_means_leave_out_what_is_not_defined(folders, caplog):
    results = score_folders(folders)
    cases = results["metric_per_case"]
    assert [case["prediction_file"][-8:] for case in cases] == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
    assert math.isnan(cases[1]["metrics"][2]["Dice"])
    assert results["mean"][2]["Dice"] == np.mean([cases[0]["metrics"][2]["Dice"], cases[2]["metrics"][2]["Dice"]])
    assert results["mean"][2]["TP"] == np.mean([case["metrics"][2]["TP"] for case in cases])
    assert math.isnan(results["mean"][3]["Dice"])
    assert results["foreground_mean"]["Dice"] == np.mean([results["mean"][label]["Dice"] for label in (1, 2)])
    assert results["foreground_mean"]["TN"] == np.mean([results["mean"][label]["TN"] for label in (1, 2, 3)])
    assert "class 3" in caplog.text


def test_background_is_no_part_of_the_foreground_mean(folders):
    results = score_folders(folders, [0, 1])
    assert results["foreground_mean"] == results["mean"][1]


def test_summaries_are_written_with_sorted_keys_and_come_back(folders, tmp_path):
    results = score_folders(folders, [1, (1, 2), np.int64(3)], str(tmp_path / "summary.json"))
    text = (tmp_path / "summary.json").read_text()
    assert "NaN" in text
    assert list(json.loads(text)) == ["foreground_mean", "mean", "metric_per_case"]
    assert list(json.loads(text)["mean"]) == ["(1, 2)", "1", "3"]
    assert list(json.loads(text)["mean"]["1"]) == ["Dice", "FN", "FP", "IoU", "TN", "TP", "n_pred", "n_ref"]
    loaded = load_summary_json(tmp_path / "summary.json")
    assert set(loaded["mean"]) == set(results["mean"]) == {1, (1, 2), 3}
    save_summary_json(loaded, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == text


def test_saving_leaves_results_alone(folders, tmp_path):
    results = score_folders(folders)
    save_summary_json(results, tmp_path / "summary.json")
    assert set(results["mean"]) == {1, 2, 3}


def test_missing_predictions_are_named_unless_that_is_fine(folders):
    (folders / "predictions" / "b.nii.gz").unlink()
    with pytest.raises(AssertionError, match=r"1 of 3 references.*b\.nii\.gz"):
        score_folders(folders, chill=False)
    assert len(score_folders(folders, [1, 2])["metric_per_case"]) == 2


def test_predictions_without_reference_are_named(folders):
    (folders / "references" / "c.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 predictions.*c\.nii\.gz"):
        score_folders(folders)


def test_an_empty_folder_is_named(folders, tmp_path):
    for file in (folders / "predictions").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match="no prediction found in"):
        score_folders(folders)


def test_results_go_to_json_files_only(folders):
    with pytest.raises(AssertionError, match="must end in .json"):
        score_folders(folders, output="summary.txt")


def write_json_files(folder, **changes):
    model = TinyModel(**changes)
    (folder / "dataset.json").write_text(json.dumps(model.dataset_json()))
    (folder / "plans.json").write_text(json.dumps(model.plans()))
    return str(folder / "dataset.json"), str(folder / "plans.json")


def test_a_dataset_says_which_classes_to_score(folders):
    files = write_json_files(
        folders, labels={"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}, regions_class_order=(1, 2)
    )
    assert compute_metrics_on_folder2(str(folders / "references"), str(folders / "predictions"), *files) is None
    assert set(load_summary_json(folders / "predictions" / "summary.json")["mean"]) == {(1, 2), (2,)}


def test_what_is_not_annotated_is_not_scored(folders):
    dataset_json, plans = write_json_files(folders, labels={"background": 0, "one": 1, "two": 2})
    described = json.loads((folders / "dataset.json").read_text())
    (folders / "dataset.json").write_text(json.dumps({**described, "annotated_labels": ["background", "two"]}))
    compute_metrics_on_folder2(str(folders / "references"), str(folders / "predictions"), dataset_json, plans)
    assert list(load_summary_json(folders / "predictions" / "summary.json")["mean"]) == [2]


def test_simple_scores_find_the_format_among_other_files(folders):
    (folders / "references" / "a_notes.txt").write_text("not an image")
    (folders / "predictions" / "a.gz").write_text("not an image")
    compute_metrics_on_folder_simple(str(folders / "references"), str(folders / "predictions"), [1, 2])
    summary = load_summary_json(folders / "predictions" / "summary.json")
    assert len(summary["metric_per_case"]) == 3


def test_simple_scores_need_references(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no reference found"):
        compute_metrics_on_folder_simple(str(tmp_path / "empty"), str(folders / "predictions"), [1])


def test_the_command_for_datasets(folders, monkeypatch, capsys):
    dataset_json, plans = write_json_files(folders)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "nnUNetv2_evaluate_folder",
            str(folders / "references"),
            str(folders / "predictions"),
            "-djfile",
            dataset_json,
            "-pfile",
            plans,
            "-o",
            str(folders / "scores.json"),
            "-np",
            "2",
        ],
    )
    evaluate_folder_entry_point()
    dice = load_summary_json(folders / "scores.json")["foreground_mean"]["Dice"]
    assert f"{dice:.4f}" in capsys.readouterr().out


def test_the_command_for_labels(folders, monkeypatch, capsys):
    (folders / "predictions" / "b.nii.gz").unlink()
    arguments = [
        "nnUNetv2_evaluate_simple",
        str(folders / "references"),
        str(folders / "predictions"),
        "-l",
        "1",
        "2",
        "-il",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        evaluate_simple_entry_point()
    assert stop.value.code == 1
    assert "b.nii.gz" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*arguments, "--chill"])
    evaluate_simple_entry_point()
    assert len(load_summary_json(folders / "predictions" / "summary.json")["metric_per_case"]) == 2


def test_default_options():
    args = evaluate_predictions.build_simple_parser().parse_args(["ref", "pred", "-l", "1", "2"])
    assert vars(args) == {
        "gt_folder": "ref",
        "pred_folder": "pred",
        "l": [1, 2],
        "il": None,
        "o": None,
        "np": 8,
        "chill": False,
        "surface": False,
        "tolerance": None,
        "html": False,
        "images": None,
    }
