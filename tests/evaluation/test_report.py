"""Tests of the HTML report."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import SimpleITK as sitk
from trained_models import draw_reference, make_dataset_json, make_model_plans, write_label_map

from nnunetv2.evaluation.box_plots import draw_box_plots
from nnunetv2.evaluation.evaluate_predictions import evaluate_folder_entry_point, load_summary_json
from nnunetv2.evaluation.report import rank_cases


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("references", "predictions", "images"):
        (tmp_path / name).mkdir()
    for number in range(4):
        reference = draw_reference(rng)
        prediction = np.roll(reference, number, axis=2)
        if number == 3:
            prediction[prediction == 2] = 0
        name = f"case_<{number}>"
        write_label_map(tmp_path / "references" / f"{name}.nii.gz", reference)
        write_label_map(tmp_path / "predictions" / f"{name}.nii.gz", prediction)
        image = sitk.GetImageFromArray((reference * 100 + rng.normal(0, 9, reference.shape)).astype(np.float32))
        sitk.WriteImage(image, str(tmp_path / "images" / f"{name}_0000.nii.gz"))
    (tmp_path / "dataset.json").write_text(json.dumps(make_dataset_json()))
    (tmp_path / "plans.json").write_text(json.dumps(make_model_plans()))
    return tmp_path


def run(folders, monkeypatch, *options):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "evaluate",
            str(folders / "references"),
            str(folders / "predictions"),
            "-djfile",
            str(folders / "dataset.json"),
            "-pfile",
            str(folders / "plans.json"),
            "-np",
            "1",
            *options,
        ],
    )
    evaluate_folder_entry_point()
    return folders / "predictions" / "summary.html"


class Balance(HTMLParser):
    """Checks that elements close in order, and collects their names and addresses."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.addresses = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br", "line", "rect", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("line", "rect", "circle"):
            return
        assert self.open.pop() == tag


def test_a_report_needs_no_other_file(folders, monkeypatch, capsys):
    report = run(folders, monkeypatch, "--html", "--surface", "-images", str(folders / "images"))
    text = report.read_text(encoding="utf-8")
    page = Balance()
    page.feed(text)
    assert not page.open and page.seen.count("img") == 4 and page.seen.count("svg") == 4
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "case_&lt;3&gt;" in text and "case_<3>" not in re.sub("<title>.*?</title>", "", text)
    assert "lesion" in text and "HD95 (mm)" in text
    assert str(report) in capsys.readouterr().out


def test_the_summary_beside_it_keeps_its_keys(folders, monkeypatch):
    run(folders, monkeypatch, "--surface", "-tolerance", "2")
    summary = load_summary_json(folders / "predictions" / "summary.json")
    assert summary["surface_tolerance_mm"] == 2
    assert set(summary["mean"][1]) == {
        "Dice",
        "IoU",
        "TP",
        "FP",
        "FN",
        "TN",
        "n_pred",
        "n_ref",
        "HD95",
        "ASSD",
        "SurfaceDice",
    }
    assert not (folders / "predictions" / "summary.html").exists()


def test_the_worst_case_comes_first(folders, monkeypatch):
    run(folders, monkeypatch)
    ranked = rank_cases(load_summary_json(folders / "predictions" / "summary.json"))
    assert "case_<3>" in ranked[0][1]["prediction_file"] and ranked[-1][0] == 1


@pytest.mark.parametrize("options", [["-tolerance", "1"], ["-images", "x"], ["--surface", "-tolerance", "-1"]])
def test_options_that_would_have_no_effect_are_refused(folders, monkeypatch, capsys, options):
    with pytest.raises(SystemExit):
        run(folders, monkeypatch, *options)
    assert "error" in capsys.readouterr().err


def test_box_plots_survive_classes_without_values():
    text = draw_box_plots({"a": [(float("nan"), "x")], "b <": [(0.5, "x"), (float("nan"), "y")], "c": []}, None)
    assert text.count("in no case") == 2 and text.count("<circle") == 1 and "b &lt;" in text
