"""The command, on datasets whose mistakes are known."""

from __future__ import annotations

import csv
import json
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from chromium import Page, chromium, find_chromium
from scipy.ndimage import binary_erosion
from tiny_models import TinyModel, write_model
from trained_models import NAME, SHAPE, draw_reference, make_trained_models, write_label_map

from nnunetv2.annotation_audit.audit_annotations import main
from nnunetv2.errors import InvalidInputError

CASES = [f"case_{number:02}" for number in range(12)]
WRONG = "case_<b>&03"


@pytest.fixture
def model(roots, monkeypatch) -> Path:
    """A cross-validated model of 12 cases; the label of one of them, whose name is odd, lacks a class and is moved."""
    results = make_trained_models(roots, configurations={"3d_fullres": 0.8}, folds=(0, 1, 2), cases_per_fold=4)
    raw, preprocessed = roots["nnUNet_raw"] / NAME, roots["nnUNet_preprocessed"] / NAME
    folder = results / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    (raw / "labelsTr" / "case_03.nii.gz").rename(raw / "labelsTr" / f"{WRONG}.nii.gz")
    (folder / "fold_0" / "validation" / "case_03.nii.gz").rename(folder / "fold_0" / "validation" / f"{WRONG}.nii.gz")
    cases = [WRONG if case == "case_03" else case for case in CASES]
    (raw / "imagesTr").mkdir()
    rng = np.random.default_rng(1)
    for case in cases:
        write_label_map(raw / "imagesTr" / f"{case}_0000.nii.gz", rng.integers(0, 200, SHAPE))
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(raw / "labelsTr" / f"{WRONG}.nii.gz")))
    labels[labels == 3] = 0
    write_label_map(raw / "labelsTr" / f"{WRONG}.nii.gz", np.roll(labels, 5, axis=2))
    splits = [
        {
            "train": [case for case in cases if case not in cases[4 * fold : 4 * fold + 4]],
            "val": cases[4 * fold : 4 * fold + 4],
        }
        for fold in range(3)
    ]
    (preprocessed / "splits_final.json").write_text(json.dumps(splits))

    def refuse(*_):
        raise AssertionError("an audit opens no connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return folder


def audit(*options, status=0):
    assert main(["-d", "997", "-np", "1", "-device", "cpu", *map(str, options)]) == status


def read_json(folder):
    return json.loads((folder / "audit.json").read_text())


@pytest.mark.slow
def test_the_wrong_label_comes_first_with_its_regions(model, capsys):
    audit()
    found = read_json(model / "annotation_audit")
    first = found["cases"][0]
    assert [case["case"] for case in found["cases"] if case["doubtful"]] == [WRONG] and first["case"] == WRONG
    assert len(found["cases"]) == 12 and found["failed"] == {} and not any(case["seen"] for case in found["cases"])
    assert ("missing", "vessel") in {(region["kind"], region["class"]) for region in first["regions"]}
    assert "1 of 12 cases are doubtful" in capsys.readouterr().out


@pytest.mark.slow
def test_tables_and_page_say_the_same(model):
    audit("-o", model / "there")
    with (model / "there" / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["case"] == WRONG and [row["doubtful"] for row in rows] == ["yes", *["no"] * 11]
    with (model / "there" / "regions.csv").open(newline="") as file:
        regions = list(csv.DictReader(file))
    scores = [float(row["score"]) for row in regions]
    assert scores == sorted(scores, reverse=True) and regions[0]["case"] == WRONG
    page = (model / "there" / "audit.html").read_text()
    assert "case_&lt;b&gt;&amp;03" in page and "case_<b>" not in page
    assert page.count("data:image/png;base64,") >= 3
    assert not re.search(r"https?:|<script|<link|url\(|src='(?!data:)", page)
    assert "default-src 'none'" in page and "color-scheme:light dark" in page


@pytest.mark.slow
@pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed")
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_a_phone_and_loads_nothing(model, tmp_path, dark):
    audit()
    page_file = model / "annotation_audit" / "audit.html"
    with chromium(tmp_path / "browser") as browser:
        page = Page(browser)
        page.look_like(390, 844, dark=dark, phone=True)
        page.open(page_file.as_uri())
        page.wait_for("document.querySelectorAll('img').length >= 3 && [...document.images].every(i => i.complete)")
        assert page.run("document.documentElement.scrollWidth") <= 390
        assert page.run("[...document.images].every(i => i.naturalWidth > 0)")
        assert page.run("document.querySelectorAll('b.missing, b.shifted').length") >= 1
        background = page.run("getComputedStyle(document.querySelector('h3')).color")
        assert (sum(map(int, re.findall(r"\d+", background))) > 380) == dark
        assert page.complaints() == []
        assert all(url.startswith(("file:", "data:")) for url in page.requests())


@pytest.mark.slow
def test_names_are_no_formulas_in_tables(model, roots):
    raw = roots["nnUNet_raw"] / NAME
    odd = "=cmd|x"
    for folder, ending in ((raw / "labelsTr", ".nii.gz"), (raw / "imagesTr", "_0000.nii.gz")):
        (folder / f"case_00{ending}").rename(folder / f"{odd}{ending}")
    validation = model / "fold_0" / "validation"
    (validation / "case_00.nii.gz").rename(validation / f"{odd}.nii.gz")
    splits = roots["nnUNet_preprocessed"] / NAME / "splits_final.json"
    splits.write_text(splits.read_text().replace("case_00", odd))
    audit()
    assert f",'{odd}," in (model / "annotation_audit" / "cases.csv").read_text()


def test_a_case_that_cannot_be_compared_is_reported_and_the_others_are_there(model, roots, capsys):
    raw = roots["nnUNet_raw"] / NAME
    write_label_map(raw / "labelsTr" / "case_05.nii.gz", draw_reference(np.random.default_rng(0))[:, :-1])
    (raw / "labelsTr" / "case_06.nii.gz").write_bytes(b"no image")
    audit(status=1)
    found = read_json(model / "annotation_audit")
    assert set(found["failed"]) == {"case_05", "case_06"} and len(found["cases"]) == 10
    assert "the label map has shape" in found["failed"]["case_05"]
    assert "not compared: case_05" in capsys.readouterr().out


@pytest.mark.slow
def test_more_false_alarms_make_a_longer_list(model):
    audit("--false_alarms", "0.95", "--pictures", "1")
    listed = [case for case in read_json(model / "annotation_audit")["cases"] if case["doubtful"]]
    page = (model / "annotation_audit" / "audit.html").read_text()
    assert len(listed) > 1 and page.count("<article") == len(listed)
    cut = read_json(model / "annotation_audit")["cut"]
    assert page.count("data:image") == 3 * min(3, sum(one["score"] > cut for one in listed[0]["regions"]))


@pytest.mark.slow
def test_a_label_that_is_exactly_as_predicted_stands_out_among_smaller_ones(model, roots, capsys):
    labels = roots["nnUNet_raw"] / NAME / "labelsTr"
    for fold in range(3):
        for file in (model / f"fold_{fold}" / "validation").glob("*.nii.gz"):
            if file.name == "case_00.nii.gz":
                shutil.copy(file, labels)
            else:
                predicted = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
                write_label_map(labels / file.name, np.where(binary_erosion(predicted > 0), predicted, 0))
    audit()
    found = read_json(model / "annotation_audit")["cases"]
    (exact,) = (case for case in found if case["case"] == "case_00")
    assert exact["doubtful"] and exact["regions"] == []
    assert re.search(r"case_00: (organ|lesion|vessel), the label 0\.00 mm too large", capsys.readouterr().out)
    assert "no region of it differs" in (model / "annotation_audit" / "audit.html").read_text()


@pytest.mark.slow
def test_a_doubtful_case_whose_image_is_damaged_is_told_without_pictures(model, roots):
    (roots["nnUNet_raw"] / NAME / "imagesTr" / f"{WRONG}_0000.nii.gz").write_bytes(b"no image")
    audit()
    page = (model / "annotation_audit" / "audit.html").read_text()
    assert "No picture:" in page and "data:image/png" not in page


def test_a_listed_case_without_images_is_named(model, roots):
    file = roots["nnUNet_raw"] / NAME / "dataset.json"
    listed = {"case_00": {"images": [], "label": "labelsTr/case_00.nii.gz"}}
    file.write_text(json.dumps({**json.loads(file.read_text()), "dataset": listed}))
    with pytest.raises(InvalidInputError, match="case_00 has no image"):
        audit()


@pytest.mark.slow
def test_a_copy_of_a_fold_is_no_fold(model):
    shutil.copytree(model / "fold_0", model / "fold_0_before")
    audit()
    assert len(read_json(model / "annotation_audit")["cases"]) == 12


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--false_alarms", "1"], ValueError, "expected a share between 0 and 1"),
        (["--unseen"], ValueError, "name its folder with -m"),
        (["-c", "2d"], InvalidInputError, "2d has no fold with a checkpoint_final.pth: train it"),
        (["-tr", "Other"], InvalidInputError, "has no model of Other with nnUNetPlans"),
        (["-m", "/nowhere"], InvalidInputError, "/nowhere is no model folder"),
    ],
)
def test_requests_that_make_no_sense_are_refused(model, options, error, message):
    with pytest.raises(error, match=message):
        audit(*options)


def test_several_configurations_are_listed(model):
    shutil.copytree(model, model.parent / "nnUNetTrainer__nnUNetPlans__2d")
    with pytest.raises(InvalidInputError, match=r"name one with -c \(2d, 3d_fullres\)"):
        audit()


def test_a_model_of_other_labels_is_refused(model):
    description = json.loads((model / "dataset.json").read_text())
    description["labels"] = {"background": 0, "other": 1}
    (model / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(InvalidInputError, match="was trained for other labels"):
        audit()


@pytest.mark.parametrize("kind", ["regions", "ignore"])
def test_regions_and_voxels_to_be_ignored_are_understood(roots, kind):
    results = make_trained_models(
        roots, configurations={"3d_fullres": 0.8}, folds=(0,), cases_per_fold=3, **{kind: True}
    )
    raw = roots["nnUNet_raw"] / NAME
    (raw / "imagesTr").mkdir()
    for case in CASES[:3]:
        write_label_map(raw / "imagesTr" / f"{case}_0000.nii.gz", np.ones(SHAPE))
    splits = [{"train": [], "val": CASES[:3]}]
    (roots["nnUNet_preprocessed"] / NAME / "splits_final.json").write_text(json.dumps(splits))
    audit()
    found = read_json(next(results.iterdir()) / "annotation_audit")
    names = {"whole", "core", "tip"} if kind == "regions" else {"organ", "lesion", "vessel"}
    assert [set(case["figures"]) for case in found["cases"]] == [names] * 3


# -------------------------------------------------------------------------------------------------- predictions


@pytest.fixture
def elsewhere(roots, tmp_path) -> Path:
    """A model folder whose network tells intensities apart, and a dataset that it has not been trained on."""
    model = TinyModel(spacing=(3.0, 1.5, 1.0), lessons=30, folds=(0, "all"))
    folder = write_model(tmp_path / "model", model)
    raw = roots["nnUNet_raw"] / NAME
    for name in ("imagesTr", "labelsTr"):
        (raw / name).mkdir(parents=True)
    (raw / "dataset.json").write_text(json.dumps(model.dataset_json()))
    rng = np.random.default_rng(0)
    for case in CASES[:4]:
        labels = np.minimum(draw_reference(rng), 2)
        write_label_map(raw / "imagesTr" / f"{case}_0000.nii.gz", 60 * labels + rng.integers(0, 20, SHAPE))
        write_label_map(raw / "labelsTr" / f"{case}.nii.gz", labels)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("unseen", [False, True])
def test_missing_predictions_are_made(elsewhere, tmp_path, unseen):
    (elsewhere / "fold_0" / "validation").mkdir()
    shutil.copy(elsewhere / "dataset.json", elsewhere / "fold_0" / "validation")
    audit("-m", elsewhere, "-o", tmp_path / "report", *(["--unseen"] if unseen else []))
    found = read_json(tmp_path / "report")
    assert [case["seen"] for case in found["cases"]] == [not unseen] * 4
    predicted = sorted(path.name for path in (tmp_path / "report" / "predictions").glob("*.nii.gz"))
    assert predicted == [f"{case}.nii.gz" for case in CASES[:4]]
    page = (tmp_path / "report" / "audit.html").read_text()
    assert "Fewer than 10 cases" in page and ("seen in training" in page)


def test_a_case_that_cannot_be_predicted_does_not_stop_the_others(elsewhere, roots, tmp_path):
    (roots["nnUNet_raw"] / NAME / "imagesTr" / "case_01_0000.nii.gz").write_bytes(b"no image")
    audit("-m", elsewhere, "-o", tmp_path / "report", status=1)
    found = read_json(tmp_path / "report")
    assert set(found["failed"]) == {"case_01"} and len(found["cases"]) == 3
