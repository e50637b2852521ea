"""Curves of a training."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nnunetv2.training.logging.nnunet_logger import (
    LocalLogger,
    MetaLogger,
    continue_ema,
    get_cluster_job_id,
    nnUNetLogger,
)


class Listener:
    def __init__(self):
        self.heard = []

    def update_config(self, config):
        self.heard.append(("config", dict(config)))

    def log(self, key, value, step):
        self.heard.append((key, value, step))

    def log_summary(self, key, value):
        self.heard.append(("summary", key, value))


@pytest.fixture
def meta(tmp_path) -> MetaLogger:
    return MetaLogger(tmp_path, False)


def test_a_new_logger_has_the_eight_curves():
    assert set(LocalLogger().my_fantastic_logging) == {
        "mean_fg_dice",
        "ema_fg_dice",
        "dice_per_class_or_region",
        "train_losses",
        "val_losses",
        "lrs",
        "epoch_start_timestamps",
        "epoch_end_timestamps",
    }


def test_a_value_is_appended_or_replaced():
    local = LocalLogger()
    local.log("lrs", 0.1, 0)
    local.log("lrs", 0.2, 1)
    local.log("lrs", 0.3, 1)
    assert local.get_value("lrs", None) == [0.1, 0.3]
    assert local.get_value("lrs", -1) == 0.3


def test_an_epoch_that_is_over_cannot_be_logged():
    local = LocalLogger()
    local.log("lrs", 0.1, 0)
    local.log("lrs", 0.1, 1)
    with pytest.raises(AssertionError, match="epoch 0 is over"):
        local.log("lrs", 0.1, 0)


def test_an_unknown_curve_names_the_remedy():
    local = LocalLogger()
    with pytest.raises(AssertionError, match="register it"):
        local.log("mine", 1, 0)
    local.my_fantastic_logging["mine"] = []
    local.log("mine", 1, 0)


def test_the_moving_average_follows_the_dice(meta):
    for epoch, value in enumerate([0.5, 0.7, 0.2]):
        meta.log("mean_fg_dice", value, epoch)
    assert meta.get_value("ema_fg_dice", None) == pytest.approx([0.5, 0.52, 0.488])


def test_epochs_without_a_dice_leave_the_moving_average_where_it_was(meta):
    for epoch, value in enumerate([math.nan, 0.5, math.nan, 0.7]):
        meta.log("mean_fg_dice", np.float32(value), epoch)
    average = meta.get_value("ema_fg_dice", None)
    assert math.isnan(average[0])
    assert average[1:] == pytest.approx([0.5, 0.5, 0.52])


def test_a_moving_average_that_became_nan_in_an_old_checkpoint_recovers():
    assert continue_ema([0.5, math.nan, math.nan], 0.7) == pytest.approx(0.52)


def test_logging_an_epoch_again_starts_from_the_epoch_before(meta):
    for epoch, value in [(0, 0.5), (1, 0.9), (1, 0.7)]:
        meta.log("mean_fg_dice", value, epoch)
    assert meta.get_value("ema_fg_dice", None) == pytest.approx([0.5, 0.52])


def test_listeners_hear_everything_and_lists_in_parts(meta):
    listener = Listener()
    meta.loggers.append(listener)
    meta.update_config({"fold": 0})
    meta.log("dice_per_class_or_region", [0.1, 0.2], 0)
    meta.log("mean_fg_dice", 0.15, 0)
    meta.log_summary("final", 0.9)
    assert listener.heard == [
        ("config", {"fold": 0}),
        ("dice_per_class_or_region/class_1", 0.1, 0),
        ("dice_per_class_or_region/class_2", 0.2, 0),
        ("mean_fg_dice", 0.15, 0),
        ("ema_fg_dice", 0.15, 0),
        ("summary", "final", 0.9),
    ]
    assert meta.get_value("dice_per_class_or_region", 0) == [0.1, 0.2]


def test_a_checkpoint_holds_the_curves(meta, tmp_path):
    meta.log("lrs", 0.1, 0)
    other = MetaLogger(tmp_path, True)
    other.load_checkpoint(meta.get_checkpoint())
    assert other.my_fantastic_logging["lrs"] == [0.1]


def test_trainers_of_earlier_releases_find_their_logger():
    logger = nnUNetLogger()
    logger.log("mean_fg_dice", 0.5, 0)
    assert logger.my_fantastic_logging["ema_fg_dice"] == [0.5]


@pytest.mark.parametrize(("variable", "value"), [("SLURM_JOB_ID", "7"), ("LSB_JOBID", "8")])
def test_the_job_number_comes_from_the_cluster(monkeypatch, variable, value):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("LSB_JOBID", raising=False)
    assert get_cluster_job_id() is None
    monkeypatch.setenv(variable, value)
    assert get_cluster_job_id() == value


def test_a_strange_switch_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_wandb_enabled", "maybe")
    with pytest.raises(RuntimeError, match="maybe"):
        MetaLogger(tmp_path, False)


def test_a_logger_added_later_hears_the_settings_known_already(meta):
    meta.update_config({"fold": 0})
    meta.update_config({"dataset": "tiny"})
    listener = Listener()
    meta.add_logger(listener)
    meta.log("lrs", 0.1, 0)
    assert listener.heard == [("config", {"fold": 0, "dataset": "tiny"}), ("lrs", 0.1, 0)]


def test_only_the_first_process_adds_loggers(meta, monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    meta.add_logger(Listener())
    assert meta.loggers == []
