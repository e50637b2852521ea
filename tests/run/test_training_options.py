"""Trainings whose settings come from the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from patience import PATIENCE_S
from tiny_dataset import NAME, make_tiny_dataset

from nnunetv2.models.checkpoint_file import load_checkpoint_file
from nnunetv2.run.run_training import build_parser, run_training
from nnunetv2.run.stop_training import stop_training
from nnunetv2.run.training_options import options_from
from nnunetv2.training.folder_lock import training_in
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.federated.settings_of_run import check_against_settings
from nnunetv2.training.options import OptionError, TrainingOptions

CPU = torch.device("cpu")
PROJECT = Path(__file__).resolve().parents[2]
SHORT = {"epochs": 3, "iterations": 2, "val_iterations": 1}


@pytest.fixture
def model(roots, monkeypatch) -> Path:
    """A dataset to train with; the folder of nnUNetTrainer's results."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    make_tiny_dataset(roots["nnUNet_preprocessed"])
    return roots["nnUNet_results"] / NAME / "nnUNetTrainer__nnUNetPlans__3d_fullres"


@pytest.fixture
def fold(model) -> Path:
    return model / "fold_0"


@pytest.fixture
def without_validation(monkeypatch):
    monkeypatch.setattr("nnunetv2.training.validation.validate", lambda *_, **__: None)


def train(trainer="nnUNetTrainer", *, more=None, **options):
    run_training(998, "3d_fullres", 0, trainer, device=CPU, options=TrainingOptions(**options), **(more or {}))


def resume(trainer="nnUNetTrainer", **options):
    train(trainer, more={"continue_training": True}, **options)


def final(fold: Path) -> dict:
    return load_checkpoint_file(fold / "checkpoint_final.pth")


def assert_same_bits(one: dict, other: dict) -> None:
    for name, tensor in one["network_weights"].items():
        assert torch.equal(tensor, other["network_weights"][name]), name


def stop_at(monkeypatch, fold: Path, epoch: int) -> None:
    """Let nnUNetv2_stop be called while an epoch is trained."""
    whole = nnUNetTrainer.on_train_epoch_start

    def begin(trainer):
        whole(trainer)
        if trainer.current_epoch == epoch:
            stop_training(fold)

    monkeypatch.setattr(nnUNetTrainer, "on_train_epoch_start", begin)


# --------------------------------------------------------------------------------------------- what is trained


def test_options_win_over_the_trainer_and_are_kept(model, without_validation, monkeypatch):
    shares, run_epoch = [], nnUNetTrainer._run_epoch

    def look(trainer):
        loader = trainer.dataloader_train.data_loader.loader  # numbered batches of it
        shares.append((loader.batch_size, loader.oversample_foreground_percent, trainer.save_every))
        run_epoch(trainer)

    monkeypatch.setattr(nnUNetTrainer, "_run_epoch", look)
    fold = model.with_name("nnUNetTrainer_5epochs__nnUNetPlans__3d_fullres") / "fold_0"
    options = {
        **SHORT,
        "epochs": 2,
        "initial_lr": 0.02,
        "weight_decay": 1e-4,
        "batch_size": 3,
        "oversample": 1.0,
        "save_every": 7,
        "seed": 3,
    }
    train("nnUNetTrainer_5epochs", **options)
    checkpoint = final(fold)
    assert checkpoint["training_options"] == options and checkpoint["current_epoch"] == 2
    assert checkpoint["logging"]["lrs"] == pytest.approx([0.02, 0.02 * 0.5**0.9])
    assert checkpoint["optimizer_state"]["param_groups"][0]["weight_decay"] == 1e-4
    assert shares == [(3, 1.0, 7)] * 2
    debug = json.loads((fold / "debug.json").read_text())
    assert debug["training_options"].startswith("--epochs 2 --iterations 2") and debug["num_epochs"] == "2"
    assert "Options: --epochs 2" in next(fold.glob("training_log_*.txt")).read_text()


def test_without_options_a_checkpoint_has_what_it_always_had(fold, without_validation, monkeypatch):
    monkeypatch.setattr(nnUNetTrainer, "_run_epoch", lambda trainer: setattr(trainer, "current_epoch", 1000))
    train()
    assert set(final(fold)) == {
        "network_weights",
        "optimizer_state",
        "grad_scaler_state",
        "logging",
        "_best_ema",
        "current_epoch",
        "init_args",
        "trainer_name",
        "inference_allowed_mirroring_axes",
    }


@pytest.mark.slow
def test_a_seed_gives_the_same_bits_with_and_without_workers(fold, without_validation, monkeypatch):
    monkeypatch.setenv("nnUNet_seed", "8")  # the option wins
    train(**SHORT, seed=5)
    alone = final(fold)
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    train(**SHORT, seed=5)
    assert os.environ["nnUNet_seed"] == "8"
    assert_same_bits(alone, final(fold))
    monkeypatch.delenv("nnUNet_seed")
    train(**{**SHORT, "epochs": 1}, seed=6)
    assert "nnUNet_seed" not in os.environ
    assert not torch.equal(*(next(iter(one["network_weights"].values())) for one in (alone, final(fold))))


def test_classes_get_their_weights_in_the_loss(fold, without_validation, monkeypatch):
    seen = []
    monkeypatch.setattr(nnUNetTrainer, "_run_epoch", lambda trainer: seen.append(trainer.loss.loss.ce.weight) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(**SHORT, class_weights={"core": 4.0})
    assert seen[0].tolist() == [1, 1, 4]


@pytest.mark.parametrize(
    ("trainer", "options", "complaint"),
    [
        ("nnUNetTrainer", {"class_weights": {"tumor": 2}}, "no class tumor; there are background, blob, core"),
        ("nnUNetTrainerDiceLoss", {"class_weights": {"core": 2}}, "the loss of nnUNetTrainerDiceLoss has no cross"),
        ("nnUNetTrainerAsymFedAvg", {"early_stopping": 5}, "--early_stopping does not go with nnUNetTrainerAsymFedAvg"),
        ("nnUNetTrainerAsymFedAvg", {"stop_after_s": 5.0}, "--stop_after does not go with"),
        ("nnUNetTrainerAsymFedAvgOverlapped", {"results_name": "x"}, "--results_name does not go with"),
        ("nnUNetTrainerAsymFedAvg-x", {}, "--results_name does not go with"),
        ("nnUNetTrainerFedAvg", {"batch_size": 5}, "--batch_size does not go with nnUNetTrainerFedAvg"),
    ],
)
def test_a_trainer_obeys_an_option_or_refuses_it_by_name(model, trainer, options, complaint):
    with pytest.raises(OptionError, match=complaint):
        train(trainer, **SHORT, **options)
    assert not list(model.parent.glob("*/fold_0/*.pth"))
    assert not model.exists() or trainer == "nnUNetTrainerDiceLoss"


def test_an_optimizer_that_ignores_an_option_is_told_of(fold, without_validation, monkeypatch):
    def configure(trainer):
        return torch.optim.SGD(trainer.network.parameters(), lr=0.5), None

    monkeypatch.setattr(nnUNetTrainer, "configure_optimizers", configure)
    monkeypatch.setattr(nnUNetTrainer, "run_training", lambda trainer: None)
    train(**SHORT, initial_lr=0.1)
    assert "WARNING: --initial_lr 0.1 seems to have no effect" in next(fold.glob("training_log_*")).read_text()


@pytest.mark.parametrize("name", ["epochs", "iterations", "val_iterations"])
def test_what_the_federation_has_fixed_is_not_changed_at_a_site(name):
    from nnunetv2.federated.protocol.api import FederationSettings

    settings = FederationSettings(
        federation="F", sites=("A", "B"), num_epochs=4, num_iterations_per_epoch=4, num_val_iterations_per_epoch=4
    )
    check_against_settings(TrainingOptions(**{name: 4}, initial_lr=0.1), settings)
    with pytest.raises(OptionError, match=f"--{name} 5 contradicts federation F, whose sites all train with 4"):
        check_against_settings(TrainingOptions(**{name: 5}), settings)
    open_settings = FederationSettings(federation="F", sites=("A", "B"), num_epochs=4)
    check_against_settings(TrainingOptions(iterations=5), open_settings)


# ---------------------------------------------------------------------------------------------------- going on


@pytest.mark.slow
def test_a_stopped_training_is_a_whole_model_and_goes_on_to_the_same_bits(fold, monkeypatch):
    train(**SHORT, seed=5)
    undisturbed = final(fold)
    for file in fold.glob("checkpoint_*.pth"):
        file.unlink()
    (fold / "validation" / "summary.json").unlink()
    with monkeypatch.context() as patched:
        stop_at(patched, fold, 1)
        train(**SHORT, seed=5)
    stopped = final(fold)
    assert stopped["current_epoch"] == 2 and stopped["stopped"] == "nnUNetv2_stop"
    assert (fold / "validation" / "summary.json").is_file() and not (fold / "checkpoint_latest.pth").exists()
    assert not list(fold.glob(".*"))  # neither lock nor request
    resume()
    assert final(fold)["training_options"] == {**SHORT, "seed": 5} and "stopped" not in final(fold)
    assert final(fold)["logging"]["lrs"] == undisturbed["logging"]["lrs"]
    assert_same_bits(undisturbed, final(fold))


def test_options_that_contradict_what_was_trained_are_refused_by_name(fold, without_validation):
    train(**SHORT, seed=1)
    resume(epochs=3, seed=1)  # as before: validates once more
    for options, complaint in (
        ({"epochs": 9}, "finished after 3 epochs, which contradicts --epochs 9 .trained with 3."),
        ({"initial_lr": 0.5, "seed": 2}, "--initial_lr 0.5 .trained with 0.01., --seed 2 .trained with 1."),
        ({"batch_size": 9}, "--batch_size 9 .trained with 2."),
    ):
        with pytest.raises(OptionError, match=complaint):
            resume(**options)
    with pytest.raises(OptionError, match="--val only validates: leave out --epochs, --seed"):
        train(more={"only_run_validation": True}, epochs=3, seed=1)
    assert final(fold)["current_epoch"] == 3


def test_the_schedule_of_an_unfinished_training_may_be_changed(fold, without_validation, monkeypatch):
    with monkeypatch.context() as patched:
        stop_at(patched, fold, 1)
        train(**{**SHORT, "epochs": 100})
    with pytest.raises(OptionError, match="--epochs is 1, but the training has 2 epochs behind it"):
        resume(epochs=1)
    with pytest.raises(OptionError, match="--weight_decay 0.1 cannot be used with --c"):
        resume(weight_decay=0.1)
    resume(epochs=4, initial_lr=1.0)
    assert final(fold)["training_options"] == {**SHORT, "epochs": 4, "initial_lr": 1.0}
    assert final(fold)["logging"]["lrs"][2:] == pytest.approx([0.5**0.9, 0.25**0.9])


def test_a_training_without_progress_ends_and_stays_ended(fold, without_validation, monkeypatch):
    dice = iter([0.5, 0.6, 0.1, 0.1, 0.1])
    monkeypatch.setattr("nnunetv2.training.steps.mean_of_known", lambda _: next(dice))
    options = {**SHORT, "iterations": 1, "epochs": 50, "early_stopping": 2}
    train(**options)
    ended = final(fold)
    assert ended["current_epoch"] == 4 and ended["stopped"].startswith("--early_stopping: 2 epochs")
    assert ended["logging"]["lrs"][-1] == pytest.approx(0.01 * (1 - 3 / 50) ** 0.9)
    resume()
    assert final(fold)["current_epoch"] == 4
    resume(early_stopping=0, epochs=5)
    assert final(fold)["current_epoch"] == 5


def test_time_that_is_over_ends_a_training_after_an_epoch(fold, without_validation):
    train(**SHORT, stop_after_s=0.001)
    assert final(fold)["current_epoch"] == 1 and final(fold)["stopped"].startswith("--stop_after")
    assert final(fold)["training_options"] == SHORT
    resume()
    assert final(fold)["current_epoch"] == 3


# ------------------------------------------------------------------------------------------------- side by side


@pytest.mark.slow
def test_results_of_several_settings_live_side_by_side(model, fold):
    from nnunetv2.utilities.file_path_utilities import get_output_folder

    train(**{**SHORT, "epochs": 1})
    train(**{**SHORT, "epochs": 1}, initial_lr=1e-4, results_name="low_lr")
    beside = Path(get_output_folder(998, "nnUNetTrainer-low_lr"))
    assert beside.parent == model.parent and final(beside / "fold_0")["trainer_name"] == "nnUNetTrainer"
    assert final(beside / "fold_0")["training_options"]["initial_lr"] == 1e-4 != final(fold)["logging"]["lrs"][0]
    assert "results_name" not in json.loads((beside / "plans.json").read_text())
    assert (beside / "fold_0" / "validation" / "summary.json").is_file()
    train("nnUNetTrainer-low_lr", more={"only_run_validation": True})
    resume("nnUNetTrainer-low_lr")
    with pytest.raises(OptionError, match="finished"):
        resume(results_name="low_lr", epochs=7)


def test_a_trainer_with_a_folder_of_its_own_refuses_a_name_for_it(model, monkeypatch):
    whole = nnUNetTrainer._set_folders

    def elsewhere(trainer):
        whole(trainer)
        trainer.output_folder = str(model / "elsewhere")

    monkeypatch.setattr(nnUNetTrainer, "_set_folders", elsewhere)
    with pytest.raises(OptionError, match="--results_name x has no effect"):
        train(**SHORT, results_name="x")


# ------------------------------------------------------------------------------------------------- the commands


def parse(*words):
    return options_from(build_parser().parse_args(["998", "3d_fullres", "0", *words]))


def test_the_command_line_gives_the_same_options():
    words = (
        "--epochs 5 --iterations 6 --val_iterations 7 --initial_lr 1e-3 --weight_decay 0 --batch_size 4 "
        "--oversample 0.5 --class_weights core=2 a=b=0.5 --early_stopping 9 --save_every 10 --seed 0 "
        "--stop_after 1h30m --results_name x"
    )
    assert parse(*words.split()) == TrainingOptions(
        epochs=5,
        iterations=6,
        val_iterations=7,
        initial_lr=1e-3,
        weight_decay=0.0,
        batch_size=4,
        oversample=0.5,
        class_weights={"core": 2.0, "a=b": 0.5},
        early_stopping=9,
        save_every=10,
        seed=0,
        stop_after_s=5400.0,
        results_name="x",
    )
    assert parse() == TrainingOptions()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--stop_after", "90"), "--stop_after: '90' is no duration"),
        (("--class_weights", "core"), "'core' is no NAME=WEIGHT"),
        (("--class_weights", "core=1", "core=2"), "its name came before"),
        (("--class_weights", "core=much"), "'core=much' is no"),
        (("--epochs", "0"), "--epochs is 0"),
    ],
)
def test_words_that_make_no_sense_are_refused(words, complaint):
    with pytest.raises(OptionError, match=complaint):
        parse(*words)


def test_only_a_running_training_is_stopped(tmp_path, fold):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        stop_training(tmp_path / "missing")
    (tmp_path / "model" / "fold_1").mkdir(parents=True)
    with pytest.raises(RuntimeError, match="no training is running in .*name the folder of a fold, fold_1"):
        stop_training(tmp_path / "model")
    (tmp_path / "model" / "fold_1" / ".training.lock").write_text("process 1 on nowhere\n\n")  # it was killed
    with pytest.raises(RuntimeError, match="no training is running"):
        stop_training(tmp_path / "model" / "fold_1")
    why = "nnUNetv2_fed_leave takes it out"
    with (
        training_in(tmp_path / "model" / "fold_1", refuses_to_stop=why),
        pytest.raises(RuntimeError, match=f"is not stopped: {why}"),
    ):
        stop_training(tmp_path / "model" / "fold_1")
    assert not list((tmp_path / "model" / "fold_1").glob(".stop*"))


def wait_until(is_true, process):
    deadline = time.monotonic() + PATIENCE_S
    while not is_true():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["signal to several processes", "nnUNetv2_stop"])
def test_a_command_that_is_asked_to_stop_leaves_a_validated_model(fold, way):
    options = ["-device", "cpu", "--epochs", "100000", "--iterations", "1", "--val_iterations", "1"]
    options += ["-num_gpus", "2"] if "several" in way else []
    process = subprocess.Popen(
        [sys.executable, "-m", "nnunetv2.run.run_training", "998", "3d_fullres", "0", *options],
        cwd=PROJECT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        wait_until(lambda: (fold / "progress.json").is_file(), process)
        if "signal" in way:
            process.send_signal(signal.SIGUSR1)
        else:
            stop_training(fold)
        output, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert 1 <= final(fold)["current_epoch"] < 100_000
    assert final(fold)["stopped"] == ("SIGUSR1" if "signal" in way else "nnUNetv2_stop")
    assert (fold / "validation" / "summary.json").is_file() and "Mean Validation Dice" in output
