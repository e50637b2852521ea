"""Tests of the command lines of prediction."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from tiny_models import write_model

from nnunetv2.inference.predict_from_raw_data import (
    _getDefaultValue,
    build_model_folder_parser,
    build_parser,
    predict_entry_point,
    predict_entry_point_modelfolder,
)

COMMON = {
    "i": "in",
    "o": "out",
    "f": ["0", "1", "2", "3", "4"],
    "step_size": 0.5,
    "disable_tta": False,
    "verbose": False,
    "save_probabilities": False,
    "continue_prediction": False,
    "chk": "checkpoint_final.pth",
    "npp": 3,
    "nps": 3,
    "prev_stage_predictions": None,
    "device": "cuda",
    "disable_progress_bar": False,
    "not_on_device": False,
}


def run(monkeypatch, entry, *arguments):
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    entry()


def test_defaults_of_predict():
    args = build_parser().parse_args(["-i", "in", "-o", "out", "-d", "4", "-c", "2d"])
    assert vars(args) == {
        **COMMON,
        "d": "4",
        "c": "2d",
        "p": "nnUNetPlans",
        "tr": "nnUNetTrainer",
        "num_parts": 1,
        "part_id": 0,
    }


def test_defaults_of_predict_from_modelfolder():
    args = build_model_folder_parser().parse_args(["-i", "in", "-o", "out", "-m", "model"])
    assert vars(args) == {**COMMON, "m": "model"}


def test_abbreviations_of_options_work():
    args = build_parser().parse_args(["-i", "in", "-o", "out", "-d", "4", "-c", "2d", "--c", "--save"])
    assert args.continue_prediction and args.save_probabilities


def test_worker_numbers_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("nnUNet_npp", "5")
    monkeypatch.setenv("nnUNet_nps", "many")
    args = build_parser().parse_args(["-i", "in", "-o", "out", "-d", "4", "-c", "2d"])
    assert (args.npp, args.nps) == (5, 3)
    args = build_model_folder_parser().parse_args(["-i", "in", "-o", "out", "-m", "model"])
    assert (args.npp, args.nps) == (3, 3)
    assert _getDefaultValue("nnUNet_npp", float, 1.0) == 5.0


@pytest.mark.parametrize("extra", [(), ("-npp", 0, "-nps", 0), ("-npp", 0, "-nps", 1)])
def test_a_model_from_the_results_folder_predicts(monkeypatch, roots, write_images, tmp_path, extra):
    write_model(roots["nnUNet_results"] / "Dataset998_Tiny" / "nnUNetTrainer__nnUNetPlans__3d_fullres", folds=(0, 2))
    run(
        monkeypatch,
        predict_entry_point,
        "-i",
        write_images(["a"]),
        "-o",
        tmp_path / "out",
        "-d",
        998,
        "-c",
        "3d_fullres",
        "-f",
        0,
        2,
        "-device",
        "cpu",
        "--disable_progress_bar",
        *extra,
    )
    assert (tmp_path / "out" / "a.nii.gz").is_file()


def test_a_model_from_any_folder_predicts_what_is_missing(monkeypatch, write_images, tmp_path):
    arguments = (
        "-i",
        write_images(["a", "b"]),
        "-o",
        tmp_path / "out",
        "-m",
        write_model(tmp_path / "model"),
        "-f",
        0,
        "-device",
        "cpu",
        "--disable_progress_bar",
        "--disable_tta",
    )
    run(monkeypatch, predict_entry_point_modelfolder, *arguments)
    (tmp_path / "out" / "a.nii.gz").write_text("kept")
    (tmp_path / "out" / "b.nii.gz").unlink()
    run(monkeypatch, predict_entry_point_modelfolder, *arguments, "--c")
    assert (tmp_path / "out" / "a.nii.gz").read_text() == "kept"
    assert (tmp_path / "out" / "b.nii.gz").is_file()


@pytest.mark.parametrize(
    ("extra", "message"), [(("-f", "one"), "-f takes fold numbers or all, got one"), (("-f", "7"), "fold_7")]
)
def test_mistakes_are_told_in_one_line(monkeypatch, write_images, tmp_path, capsys, extra, message):
    with pytest.raises(SystemExit) as stop:
        run(
            monkeypatch,
            predict_entry_point_modelfolder,
            "-i",
            write_images(["a"]),
            "-o",
            tmp_path / "out",
            "-m",
            write_model(tmp_path / "model"),
            "-device",
            "cpu",
            *extra,
        )
    assert stop.value.code == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert message in errors[0]


STAGES = {"3d_lowres": {"spacing": (3.0, 2.0, 2.0)}, "3d_fullres": {"previous_stage": "3d_lowres"}}


@pytest.fixture
def cascade(tmp_path):
    """Models of both stages, beside each other."""
    for configuration, changes in STAGES.items():
        write_model(tmp_path / f"nnUNetTrainer__nnUNetPlans__{configuration}", **changes)
    return tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres"


def test_the_previous_stage_of_a_cascade_is_predicted_first(monkeypatch, cascade, write_images, tmp_path):
    images = write_images(["a", "b"])
    common = ("-i", images, "-f", 0, "-device", "cpu", "--disable_progress_bar", "--disable_tta")
    run(monkeypatch, predict_entry_point_modelfolder, *common, "-m", cascade, "-o", tmp_path / "out")
    first_stage = tmp_path / "out" / "predicted_3d_lowres"
    assert {path.name for path in first_stage.glob("*.nii.gz")} == {"a.nii.gz", "b.nii.gz"}
    run(
        monkeypatch,
        predict_entry_point_modelfolder,
        *common,
        "-m",
        cascade,
        "-o",
        tmp_path / "by_hand",
        "-prev_stage_predictions",
        first_stage,
    )
    for name in ("a.nii.gz", "b.nii.gz"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "by_hand" / name).read_bytes()


def test_a_case_that_fails_in_the_first_stage_spares_the_others(monkeypatch, cascade, write_images, tmp_path, capsys):
    images, out = write_images(["a", "b", "c"]), tmp_path / "out"
    options = ("-i", images, "-o", out, "-m", cascade, "-f", 0, "-device", "cpu", "--disable_progress_bar")

    def predict(*more):
        run(monkeypatch, predict_entry_point_modelfolder, *options, "--disable_tta", "-npp", 0, "-nps", 0, *more)

    good = (images / "b_0000.nii.gz").read_bytes()
    (images / "b_0000.nii.gz").write_bytes(good[: len(good) // 2])
    stage_1 = out / "predicted_3d_lowres"
    stage_1.mkdir(parents=True)
    (stage_1 / "b.nii.gz").write_bytes(b"of an earlier run, which must not be gone on from")
    for more in ((), ("--continue_prediction",)):
        with pytest.raises(SystemExit) as stop:
            predict(*more)
        assert stop.value.code == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if " error: " in line]
        assert f"1 of {1 if more else 3} cases could not be predicted: b (3d_lowres): " in line
        assert {path.name for path in out.glob("*.nii.gz")} == {"a.nii.gz", "c.nii.gz"}
        assert {path.name for path in stage_1.glob("*.nii.gz")} == {"a.nii.gz", "c.nii.gz"}
    (images / "b_0000.nii.gz").write_bytes(good)
    predict("--continue_prediction")
    assert {path.name for path in out.glob("*.nii.gz")} == {"a.nii.gz", "b.nii.gz", "c.nii.gz"}


def test_a_case_without_a_label_map_of_the_previous_stage_spares_the_others(
    monkeypatch, cascade, write_images, tmp_path, capsys
):
    images, out, stage_1 = write_images(["a", "b"]), tmp_path / "out", tmp_path / "stage_1"
    stage_1.mkdir()
    shutil.copy(images / "a_0000.nii.gz", stage_1 / "a.nii.gz")
    options = ("-i", images, "-o", out, "-m", cascade, "-f", 0, "-device", "cpu", "--disable_progress_bar")
    with pytest.raises(SystemExit):
        run(monkeypatch, predict_entry_point_modelfolder, *options, "--disable_tta", "-prev_stage_predictions", stage_1)
    error = capsys.readouterr().err
    assert "1 of 2 cases could not be predicted: b: FileNotFoundError: there is no prediction" in error
    assert str(stage_1 / "b.nii.gz") in error
    assert {path.name for path in out.glob("*.nii.gz")} == {"a.nii.gz"}


def test_without_a_model_of_the_previous_stage_the_way_out_is_told(
    monkeypatch, cascade, write_images, tmp_path, capsys
):
    (tmp_path / "nnUNetTrainer__nnUNetPlans__3d_lowres" / "fold_0" / "checkpoint_final.pth").unlink()
    with pytest.raises(SystemExit):
        run(
            monkeypatch,
            predict_entry_point_modelfolder,
            "-i",
            write_images(["a"]),
            "-o",
            tmp_path / "out",
            "-m",
            cascade,
            "-f",
            0,
            "-device",
            "cpu",
        )
    error = capsys.readouterr().err
    assert "nnUNetTrainer__nnUNetPlans__3d_lowres" in error
    assert "-c 3d_lowres -o STAGE_1" in error and "-prev_stage_predictions STAGE_1" in error


def test_a_part_that_does_not_exist_is_refused(monkeypatch, roots, capsys):
    with pytest.raises(SystemExit):
        run(
            monkeypatch,
            predict_entry_point,
            "-i",
            "in",
            "-o",
            "out",
            "-d",
            "998",
            "-c",
            "2d",
            "-num_parts",
            "2",
            "-part_id",
            "2",
        )
    assert "part 2 of 2" in capsys.readouterr().err


@pytest.mark.parametrize("entry", ["predict_entry_point", "predict_entry_point_modelfolder"])
def test_help_needs_no_torch(entry):
    code = (
        f"import sys; sys.argv = ['x', '-h']\nfrom nnunetv2.inference.predict_from_raw_data import {entry}\n"
        f"try: {entry}()\nexcept SystemExit: pass\nassert not {{'torch', 'numpy'}} & set(sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "-device" in shown
