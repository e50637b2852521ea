"""Trainers in the styles that users publish, found through nnUNet_extTrainer and trained with nnUNetv2_train."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from tiny_dataset import NAME, make_tiny_dataset

from nnunetv2.models.checkpoint_file import load_checkpoint_file
from nnunetv2.run.run_training import main
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

TRAINERS = Path(__file__).parent / "external_trainers"
NAMES = sorted(
    name
    for file in TRAINERS.glob("*.py")
    for name in re.findall(r"^class (nnUNetTrainer\w+)", file.read_text(), flags=re.MULTILINE)
)


@pytest.fixture(scope="module")
def preprocessed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("preprocessed")
    make_tiny_dataset(folder, stages=3, cases=5)
    return folder


@pytest.fixture
def train(preprocessed, tmp_path, monkeypatch):
    """Return a function that runs the command and returns the folder of the fold."""
    monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed))
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setenv("nnUNet_extTrainer", str(TRAINERS))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    monkeypatch.setattr(sys, "path", list(sys.path))
    # Neither drawing nor predicting is what differs between trainers; the command of one of them does all.
    monkeypatch.setattr("nnunetv2.training.logging.progress_plot.draw_progress", lambda *_: None)
    threads = torch.get_num_threads()

    def run(name, *options):
        main([NAME, "3d_fullres", "0", "-tr", name, "-device", "cpu", *options])
        return tmp_path / NAME / f"{name}__nnUNetPlans__3d_fullres" / "fold_0"

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def without_validation(monkeypatch):
    monkeypatch.setattr("nnunetv2.training.validation.validate", lambda *_, **__: None)


def test_there_are_enough_styles():
    assert len(NAMES) >= 15


@pytest.mark.slow
@pytest.mark.usefixtures("without_validation")
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.filterwarnings("ignore:build_network_architecture:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("name", NAMES)
def test_a_trainer_of_a_user_trains_two_epochs(train, name):
    fold = train(name)
    checkpoint = load_checkpoint_file(fold / "checkpoint_final.pth")
    assert checkpoint["current_epoch"] == 2 and checkpoint["trainer_name"] == name
    assert len(checkpoint["logging"]["train_losses"]) == len(checkpoint["logging"]["mean_fg_dice"]) == 2
    assert set(checkpoint["init_args"]) >= {"plans", "configuration", "fold", "dataset_json", "device"}
    assert (fold / "progress.csv").is_file() and list(fold.glob("training_log_*.txt"))
    with torch.no_grad():  # as inference builds it: on the class, without deep supervision
        network = build_for_inference(name, checkpoint)
        network.load_state_dict(checkpoint["network_weights"])
        assert network(torch.zeros(1, 1, 16, 16, 16)).shape == (1, 3, 16, 16, 16)


def build_for_inference(name, checkpoint):
    from nnunetv2.models.networks import build_network
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(checkpoint["init_args"]["plans"])
    return build_network(
        recursive_find_trainer_class_by_name(name).build_network_architecture,
        plans_manager=manager,
        configuration_manager=manager.get_configuration("3d_fullres"),
        dataset_json=checkpoint["init_args"]["dataset_json"],
        num_input_channels=1,
        num_output_channels=3,
        enable_deep_supervision=False,
    )


@pytest.mark.slow
def test_a_network_of_a_user_is_validated_with_the_whole_command(train):
    fold = train("nnUNetTrainerPlainNet")
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    assert set(summary["mean"]) == {"1", "2"}


@pytest.mark.usefixtures("without_validation")
def test_a_trainer_of_a_user_goes_on_with_its_own_checkpoint(train):
    train("nnUNetTrainerStopsEarly")
    checkpoint = load_checkpoint_file(train("nnUNetTrainerStopsEarly", "--c") / "checkpoint_final.pth")
    assert (checkpoint["current_epoch"], checkpoint["patience_used"]) == (3, 0)  # stops early, an epoch later


@pytest.mark.slow
@pytest.mark.usefixtures("without_validation")
def test_what_a_trainer_did_shows(train):
    """Each style has an effect that the base trainer would not have."""
    curves = load_checkpoint_file(train("nnUNetTrainerLogsMore") / "checkpoint_final.pth")["logging"]
    assert len(curves["gradient_norm"]) == 2 and all(norm > 0 for norm in curves["gradient_norm"])
    elastic = load_checkpoint_file(train("nnUNetTrainerElastic") / "checkpoint_final.pth")
    assert elastic["inference_allowed_mirroring_axes"] == (0,)
    mixed = load_checkpoint_file(train("nnUNetTrainerDiceCELoss_noSmooth_NoMirroring_2epochs") / "checkpoint_final.pth")
    assert mixed["inference_allowed_mirroring_axes"] is None
    train("nnUNetTrainerWeightedCases")
    counting = sys.modules["own_sampling"].CountingDataset
    assert len(counting.loaded) > 8
