"""The validation after a training, interrupted and repeated."""

import json
from pathlib import Path

import pytest
import torch
from tiny_dataset import make_dataset_json, make_tiny_dataset

from nnunetv2.preprocessed_data.journal import journal_path
from nnunetv2.training import validation
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.validation_progress import FOLDER, ValidationProgress, fingerprint_of

CPU = torch.device("cpu")


@pytest.fixture
def trainer(roots, monkeypatch) -> nnUNetTrainer:
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    plans = make_tiny_dataset(roots["nnUNet_preprocessed"])
    trainer = nnUNetTrainer(plans, "3d_fullres", "all", make_dataset_json(), CPU)
    trainer.initialize()
    trainer.inference_allowed_mirroring_axes = None
    return trainer


def record_exports(monkeypatch, *, fails=lambda case: False):
    exported, export = [], validation.export_case

    def recording(*arguments):
        case = Path(arguments[5]).name
        if fails(case):
            raise RuntimeError("out of luck")
        exported.append(case)
        return export(*arguments)

    monkeypatch.setattr(validation, "export_case", recording)
    return exported


def test_an_interrupted_validation_goes_on_with_the_cases_it_lacks(trainer, monkeypatch):
    with monkeypatch.context() as context:
        record_exports(context, fails=lambda case: case in ("case_02", "case_05"))
        with pytest.raises(RuntimeError, match="out of luck"):
            trainer.perform_actual_validation()
    exported = record_exports(monkeypatch)
    trainer.perform_actual_validation()
    folder = Path(trainer.output_folder, "validation")
    assert sorted(exported) == ["case_02", "case_05"]
    assert len(json.loads((folder / "summary.json").read_text())["metric_per_case"]) == 6
    assert not (folder / FOLDER).exists()
    exported.clear()
    trainer.perform_actual_validation()
    assert len(exported) == 6  # a complete validation that is repeated predicts everything


def test_other_weights_or_settings_predict_everything_anew(trainer, monkeypatch):
    with monkeypatch.context() as context:
        record_exports(context, fails=lambda case: case == "case_02")
        with pytest.raises(RuntimeError, match="out of luck"):
            trainer.perform_actual_validation()
    with torch.no_grad():
        next(trainer.network.parameters()).add_(0.1)
    exported = record_exports(monkeypatch)
    trainer.perform_actual_validation()
    assert len(exported) == 6


def interrupt(trainer, monkeypatch, at="case_02", **settings):
    """Validate all cases but one."""
    with monkeypatch.context() as context:
        record_exports(context, fails=lambda case: case == at)
        with pytest.raises(RuntimeError, match="out of luck"):
            trainer.perform_actual_validation(**settings)


def test_cases_without_their_files_are_predicted_again(trainer, monkeypatch):
    interrupt(trainer, monkeypatch, save_probabilities=True)
    folder = Path(trainer.output_folder, "validation")
    (folder / "case_00.nii.gz").unlink()
    (folder / "case_03.npz").unlink()
    (folder / "case_04.pkl").unlink()
    exported = record_exports(monkeypatch)
    trainer.perform_actual_validation(save_probabilities=True)
    assert sorted(exported) == ["case_00", "case_02", "case_03", "case_04"]
    assert len(json.loads((folder / "summary.json").read_text())["metric_per_case"]) == 6


def test_a_folder_that_was_emptied_is_filled_again(trainer, monkeypatch):
    interrupt(trainer, monkeypatch)
    folder = Path(trainer.output_folder, "validation")
    for file in folder.glob("[!.]*"):  # as a shell does it with rm validation/*
        file.unlink()
    trainer.perform_actual_validation()
    assert len(json.loads((folder / "summary.json").read_text())["metric_per_case"]) == 6


def test_data_that_were_preprocessed_otherwise_are_predicted_anew(trainer, monkeypatch):
    interrupt(trainer, monkeypatch)
    journal = journal_path(Path(trainer.preprocessed_dataset_folder))
    journal.write_text(json.dumps({"made_from": {"the code": "of another version"}}) + "\n")
    exported = record_exports(monkeypatch)
    trainer.perform_actual_validation()
    assert len(exported) == 6


def test_a_part_of_the_fold_is_not_scored(trainer, monkeypatch):
    monkeypatch.setattr(validation, "export_case", lambda *_: None)
    folder = Path(trainer.output_folder, "validation")
    with pytest.raises(RuntimeError, match="6 of 6 validation cases have no prediction .*case_00, case_01"):
        trainer.perform_actual_validation()
    assert not (folder / "summary.json").exists()


def test_finished_cases_belong_to_a_fingerprint(tmp_path):
    cases = ValidationProgress(tmp_path, [])
    cases.open("a")
    cases.add("case_1")
    cases.open("a")
    assert "case_1" in cases and "case_2" not in cases
    cases.open("b")
    assert "case_1" not in cases
    cases.close()
    assert not list(tmp_path.iterdir())


def test_the_fingerprint_depends_on_weights_and_settings():
    network = torch.nn.BatchNorm1d(2)
    before = fingerprint_of(network, ["npz"])
    assert before == fingerprint_of(network, ["npz"]) != fingerprint_of(network, ["no npz"])
    network.num_batches_tracked += 1
    assert before != fingerprint_of(network, ["npz"])


def test_predictions_of_an_earlier_split_are_not_scored(trainer, monkeypatch, capsys):
    trainer.perform_actual_validation()
    folder = Path(trainer.output_folder, "validation")
    (folder / "case_01.npz").write_bytes(b"probabilities")
    (folder / "archived.nii.gz").symlink_to("/nowhere/archived.nii.gz")
    (folder / "notes.txt").write_text("a user's")
    train, val = trainer.do_split()
    monkeypatch.setattr(trainer, "do_split", lambda: (train[:4], val[4:]))
    trainer.perform_actual_validation()
    scored = json.loads((folder / "summary.json").read_text())["metric_per_case"]
    assert [Path(case["prediction_file"]).name for case in scored] == ["case_04.nii.gz", "case_05.nii.gz"]
    aside = sorted(path.name for path in (folder.parent / validation.ASIDE).iterdir())
    label_maps = ["archived.nii.gz", *(f"case_{number:02}.nii.gz" for number in range(4))]
    assert aside == sorted([*label_maps, "case_01.npz"])
    assert (folder / "notes.txt").read_text() == "a user's"
    assert "archived, case_00, case_01, case_02, case_03" in capsys.readouterr().out
