"""Tests of collecting cross-validation results and choosing the best configuration."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from trained_models import NAME, make_trained_models

from nnunetv2.evaluation import find_best_configuration as module
from nnunetv2.evaluation.accumulate_cv_results import accumulate_cv_results
from nnunetv2.model_selection.inference_instructions import generate_inference_command

CASCADE = {"2d": 2.5, "3d_lowres": 1.0, "3d_cascade_fullres": 0.5}


def model(configuration):
    return {"plans": "nnUNetPlans", "configuration": configuration, "trainer": "nnUNetTrainer"}


def test_all_combinations_trainers_first():
    models = module.dumb_trainer_config_plans_to_trained_models_dict(["t", "u"], ["2d"], ["p", "q"])
    assert [(m["trainer"], m["configuration"], m["plans"]) for m in models] == [
        ("t", "2d", "p"),
        ("t", "2d", "q"),
        ("u", "2d", "p"),
        ("u", "2d", "q"),
    ]
    assert [m["configuration"] for m in module.default_trained_models] == [
        "2d",
        "3d_fullres",
        "3d_lowres",
        "3d_cascade_fullres",
    ]


def test_the_best_of_single_models(roots, capsys):
    results = make_trained_models(roots, configurations={"2d": 3.0, "3d_fullres": 0.3}, planned=["2d", "3d_fullres"])
    # As in the release, `strict` does not ask for configurations that the plans do not have.
    found = module.find_best_configuration(NAME, allow_ensembling=False, num_processes=1, folds=(0, 1), strict=True)
    best = found["best_model_or_ensemble"]
    assert best["selected_model_or_models"] == [
        {"configuration": "3d_fullres", "plans_identifier": "nnUNetPlans", "trainer": "nnUNetTrainer"}
    ]
    assert list(found["all_results"]) == ["nnUNetTrainer__nnUNetPlans__2d", "nnUNetTrainer__nnUNetPlans__3d_fullres"]
    assert best["result_on_crossval_post_pp"] >= best["result_on_crossval_pre_pp"]
    assert json.loads((results / "inference_information.json").read_text()) == found
    text = (results / "inference_instructions.txt").read_text()
    assert text.strip() in capsys.readouterr().out
    assert f"nnUNetv2_predict -d {NAME} -i INPUT_FOLDER -o OUTPUT_FOLDER -f 0 1 -tr nnUNetTrainer -c 3d_fullres" in text
    assert f"-pp_pkl_file {best['postprocessing_file']}" in text and f"-plans_json {best['some_plans_file']}" in text
    assert "nnUNetv2_ensemble" not in text


def test_instructions_for_a_cascade_have_both_stages(roots):
    results = make_trained_models(roots, configurations=CASCADE)
    found = module.find_best_configuration(
        NAME, [model(name) for name in CASCADE], allow_ensembling=False, num_processes=1, folds=(0, 1)
    )
    assert found["best_model_or_ensemble"]["selected_model_or_models"][0]["configuration"] == "3d_cascade_fullres"
    text = (results / "inference_instructions.txt").read_text()
    first, second = [line for line in text.splitlines() if line.startswith("nnUNetv2_predict ")]
    assert "-c 3d_lowres" in first and "-o OUTPUT_FOLDER_PREV_STAGE" in first
    assert "-c 3d_cascade_fullres" in second and "-prev_stage_predictions OUTPUT_FOLDER_PREV_STAGE" in second
    assert "-o OUTPUT_FOLDER " in second


def test_a_cascade_in_an_ensemble_saves_the_probabilities_of_its_last_stage(roots):
    make_trained_models(roots, configurations=CASCADE)
    command = generate_inference_command(
        NAME, "3d_cascade_fullres", folds=("all",), output_folder="OUT_1", save_npz=True
    )
    first, second = command.splitlines()
    assert "--save_probabilities" not in first and "-o OUT_1_PREV_STAGE" in first and "-f all" in first
    assert "--save_probabilities" in second and "-prev_stage_predictions OUT_1_PREV_STAGE" in second
    given = generate_inference_command(NAME, "3d_cascade_fullres", folder_with_segs_from_prev_stage="there")
    assert len(given.splitlines()) == 1 and "-prev_stage_predictions there" in given


def test_planned_models_must_be_trained_and_others_are_left_out(roots):
    make_trained_models(roots, planned=["2d", "3d_fullres"])
    models = module.filter_available_models(module.default_trained_models, NAME)
    assert [m["configuration"] for m in models] == ["2d", "3d_fullres"]
    shutil.rmtree(roots["nnUNet_results"] / NAME / "nnUNetTrainer__nnUNetPlans__2d")
    with pytest.raises(RuntimeError, match="2d has not been trained"):
        module.filter_available_models(module.default_trained_models, NAME)
    with pytest.raises(FileNotFoundError, match=r"other\.json"):
        module.filter_available_models([{**model("2d"), "plans": "other"}], NAME)


def test_accumulating_says_what_is_missing(roots):
    results = make_trained_models(roots)
    folder = results / "nnUNetTrainer__nnUNetPlans__2d"
    with pytest.raises(RuntimeError, match="fold 3 of"):
        accumulate_cv_results(str(folder), str(folder / "merged"), (0, 3), 1)
    shutil.rmtree(folder / "fold_1" / "validation")
    with pytest.raises(RuntimeError, match="no validation predictions"):
        accumulate_cv_results(str(folder), str(folder / "merged"), (0, 1), 1)


def test_a_case_of_two_folds_is_an_error_when_overwriting(roots):
    results = make_trained_models(roots)
    folder = results / "nnUNetTrainer__nnUNetPlans__2d"
    shutil.copy(folder / "fold_0/validation/case_00.nii.gz", folder / "fold_1/validation")
    with pytest.raises(RuntimeError, match=r"case_00\.nii\.gz was predicted in two folds"):
        accumulate_cv_results(str(folder), str(folder / "merged"), (0, 1), 1)
    accumulate_cv_results(str(folder), str(folder / "merged"), (0, 1), 1, overwrite=False)
    assert (folder / "merged" / "summary.json").is_file()


def test_references_are_raw_ones_if_there_are(roots):
    results = make_trained_models(roots)
    folder = results / "nnUNetTrainer__nnUNetPlans__2d"
    for expected in ("labelsTr", "gt_segmentations"):
        accumulate_cv_results(str(folder), str(folder / "merged"), (0, 1), 1)
        summary = json.loads((folder / "merged" / "summary.json").read_text())
        assert f"/{expected}/" in summary["metric_per_case"][0]["reference_file"]
        shutil.rmtree(roots["nnUNet_raw"] / NAME / "labelsTr", ignore_errors=True)


def test_the_accumulating_command_knows_fold_all(roots, monkeypatch, tmp_path, capsys):
    make_trained_models(roots, configurations={"2d": 0.5}, folds=("all",))
    arguments = ["accumulate", NAME, "-c", "2d", "-f", "all"]
    monkeypatch.setattr(sys, "argv", arguments)
    module.accumulate_crossval_results_entry_point()
    assert "crossval_results_folds_all" in capsys.readouterr().out
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    monkeypatch.setattr(sys, "argv", [*arguments, "-o", str(tmp_path / "full")])
    with pytest.raises(SystemExit):
        module.accumulate_crossval_results_entry_point()
    assert "is not empty" in capsys.readouterr().err


def test_the_command_finds_an_ensemble(roots, monkeypatch, capsys):
    make_trained_models(roots)
    monkeypatch.setattr(sys, "argv", ["find", NAME, "-c", "2d", "3d_fullres", "-f", "0", "1", "-np", "1"])
    module.find_best_configuration_entry_point()
    text = capsys.readouterr().out
    assert "nnUNetv2_ensemble -i OUTPUT_FOLDER_MODEL_1 OUTPUT_FOLDER_MODEL_2 -o OUTPUT_FOLDER" in text
    assert text.count("--save_probabilities") == 2
