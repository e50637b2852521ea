"""TensorBoard, of which a stand-in is enough; where the package is installed, its files are read back."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.logging.tensorboard_logger import TensorBoardLogger


class FakeWriter:
    def __init__(self, folder, purge_step):
        self.opened, self.scalars, self.texts, self.flushes = (folder, purge_step), [], {}, 0
        Path(folder).mkdir(parents=True, exist_ok=True)
        FakeWriter.latest = self

    def add_scalar(self, key, value, step):
        self.scalars.append((key, value, step))

    def add_text(self, key, text):
        self.texts[key] = text

    def flush(self):
        self.flushes += 1

    def close(self):
        pass


@pytest.fixture
def tensorboard(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=FakeWriter))


@pytest.mark.usefixtures("tensorboard")
def test_a_switched_on_logger_writes_numbers_settings_and_results(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_tensorboard_enabled", "1")
    meta = MetaLogger(tmp_path, False)
    meta.update_config({"fold": 0})
    meta.log("dice_per_class_or_region", [0.5, 0.25], 0)
    meta.update_config({"hparas": {"initial_lr": 0.01}})
    meta.log("train_losses", 1, 0)
    meta.log("train_losses", 0.5, 1)
    meta.log_summary("final_val/foreground_dice", 0.9)
    writer = FakeWriter.latest
    assert writer.opened == (str(tmp_path / "tensorboard"), 0)
    dice = "dice_per_class_or_region/class_"
    assert writer.scalars == [
        (f"{dice}1", 0.5, 0),
        (f"{dice}2", 0.25, 0),
        ("train_losses", 1.0, 0),
        ("train_losses", 0.5, 1),
    ]
    assert writer.texts["settings/fold"] == "    0" and "initial_lr" in writer.texts["settings/hparas"]
    assert writer.texts["summary/final_val/foreground_dice"] == "0.9" and writer.flushes == 2


@pytest.mark.usefixtures("tensorboard")
def test_what_is_no_number_is_left_out(tmp_path):
    logger = TensorBoardLogger(tmp_path, False)
    logger.log("lrs", 0.1, 0)
    logger.log("names", "text", 0)
    assert FakeWriter.latest.scalars == [("lrs", 0.1, 0)]


@pytest.mark.usefixtures("tensorboard")
@pytest.mark.parametrize(("resume", "step", "remains"), [(False, 0, False), (True, 0, True), (True, 7, True)])
def test_a_training_started_anew_replaces_what_is_there(tmp_path, resume, step, remains):
    old = tmp_path / "tensorboard" / "old"
    old.parent.mkdir()
    old.touch()
    logger = TensorBoardLogger(tmp_path, resume)
    assert old.exists()  # constructing is not yet training
    logger.log("lrs", 0.1, step)
    assert old.exists() == remains and FakeWriter.latest.opened[1] == step


@pytest.mark.usefixtures("tensorboard")
def test_a_validation_adds_to_what_is_there(tmp_path):
    old = tmp_path / "tensorboard" / "old"
    old.parent.mkdir()
    old.touch()
    TensorBoardLogger(tmp_path, False).log_summary("dice", 0.9)
    assert old.exists() and FakeWriter.latest.opened[1] is None


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RuntimeError, match="pip install tensorboard"):
        TensorBoardLogger(tmp_path, False)


@pytest.mark.usefixtures("tensorboard")
def test_without_an_output_folder_there_is_nothing_to_write_to():
    with pytest.raises(RuntimeError, match="nnUNet_results"):
        TensorBoardLogger(None, False)


def test_files_are_read_by_tensorboard(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path, False)
    for epoch in range(3):
        logger.log("train_losses", 1 / (epoch + 1), epoch)
    logger.log_summary("dice", 0.9)
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("train_losses")] == pytest.approx([1, 1 / 2, 1 / 3])
