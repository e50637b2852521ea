"""Trainings that were interrupted."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tiny_dataset import NAME, make_tiny_dataset

from nnunetv2.models.checkpoint_file import load_checkpoint_file
from nnunetv2.run.run_training import run_training

PROJECT = Path(__file__).resolve().parents[2]
TRAINER = """
    import os, signal
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


    class InterruptedError_(Exception):
        pass


    class FourEpochs(nnUNetTrainer):
        def __init__(self, plans, configuration, fold, dataset_json, device):
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.num_epochs, self.save_every = 4, 1
            self.num_iterations_per_epoch = self.num_val_iterations_per_epoch = 2

        def train_step(self, batch):
            result = super().train_step(batch)
            if os.environ.get("STOP_AT") == str(self.current_epoch):
                raise InterruptedError_
            if os.environ.get("KILL_AT") == str(self.current_epoch):
                self._writer.wait()  # these epochs are shorter than the writing of a checkpoint
                os.kill(os.getpid(), signal.SIGKILL)
            return result
"""


@pytest.fixture
def fold(roots, monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    folder = tmp_path / "trainers"
    folder.mkdir()
    (folder / "four_epochs.py").write_text(textwrap.dedent(TRAINER))
    monkeypatch.setenv("nnUNet_extTrainer", str(folder))
    make_tiny_dataset(roots["nnUNet_preprocessed"])
    return roots["nnUNet_results"] / NAME / "FourEpochs__nnUNetPlans__3d_fullres" / "fold_0"


def train(**options):
    run_training(998, "3d_fullres", 0, "FourEpochs", device=torch.device("cpu"), **options)


def final(fold: Path) -> dict:
    return load_checkpoint_file(fold / "checkpoint_final.pth")


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", ["1", "3"])
def test_a_seeded_training_that_was_interrupted_ends_with_the_same_bits(fold, monkeypatch, stop_at):
    monkeypatch.setenv("nnUNet_seed", "5")
    monkeypatch.setattr("nnunetv2.training.validation.validate", lambda *_, **__: None)
    train()
    undisturbed = final(fold)
    (fold / "checkpoint_final.pth").unlink()
    (fold / "checkpoint_best.pth").unlink()
    monkeypatch.setenv("STOP_AT", stop_at)
    with pytest.raises(Exception, match="^$") as stopped:
        train()
    assert type(stopped.value).__name__ == "InterruptedError_"
    monkeypatch.delenv("STOP_AT")
    train(continue_training=True)
    resumed = final(fold)
    for name, tensor in undisturbed["network_weights"].items():
        assert torch.equal(tensor, resumed["network_weights"][name]), name
    momentum, again = (checkpoint["optimizer_state"]["state"] for checkpoint in (undisturbed, resumed))
    assert all(torch.equal(momentum[i]["momentum_buffer"], again[i]["momentum_buffer"]) for i in momentum)
    assert resumed["logging"]["train_losses"] == undisturbed["logging"]["train_losses"]
    assert resumed["logging"]["dice_per_class_or_region"] == undisturbed["logging"]["dice_per_class_or_region"]


@pytest.mark.slow
def test_a_training_that_was_begun_anew_in_a_finished_fold_goes_on_itself(fold, monkeypatch, capsys):
    monkeypatch.setattr("nnunetv2.training.validation.validate", lambda *_, **__: None)
    train()
    earlier = (fold / "checkpoint_final.pth").read_bytes()

    def start_anew_until(epoch):
        monkeypatch.setenv("STOP_AT", str(epoch))
        with pytest.raises(Exception, match="^$"):
            train()
        monkeypatch.delenv("STOP_AT")
        assert (fold / "checkpoint_final.pth").read_bytes() == earlier

    start_anew_until(0)  # by mistake
    train(continue_training=True)
    assert "Going on from checkpoint_final.pth at epoch 4" in capsys.readouterr().out
    earlier = (fold / "checkpoint_final.pth").read_bytes()
    start_anew_until(2)
    train(continue_training=True)
    printed = capsys.readouterr().out
    assert "passing over checkpoint_final.pth" in printed
    assert "Going on from checkpoint_latest.pth at epoch 2" in printed
    assert (fold / "checkpoint_final.pth").read_bytes() != earlier and final(fold)["current_epoch"] == 4


@pytest.mark.slow
def test_a_training_killed_in_mid_epoch_goes_on_at_its_last_checkpoint(fold):
    command = [
        sys.executable,
        "-m",
        "nnunetv2.run.run_training",
        "998",
        "3d_fullres",
        "0",
        "-tr",
        "FourEpochs",
        "-device",
        "cpu",
    ]
    killed = subprocess.run(command, env={**os.environ, "KILL_AT": "2"}, cwd=PROJECT, capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    (fold / ".partial-killed").mkdir()  # it may also be killed while it writes
    assert load_checkpoint_file(fold / "checkpoint_latest.pth")["current_epoch"] == 2
    subprocess.run([*command, "--c"], check=True, cwd=PROJECT, capture_output=True, timeout=300)
    assert final(fold)["current_epoch"] == 4 and len(final(fold)["logging"]["lrs"]) == 4
    assert (fold / "validation" / "summary.json").is_file() and not (fold / "checkpoint_latest.pth").exists()
    assert not (fold / ".partial-killed").exists()


def test_a_full_disk_ends_the_training_with_a_message(fold, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nnunetv2.models.checkpoint_file.save_checkpoint_file", fail)
    with pytest.raises(RuntimeError, match=r"checkpoint_.*No space left on device.*--c"):
        train()
