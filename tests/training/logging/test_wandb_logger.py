"""Weights & Biases, of which a stand-in is enough."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from nnunetv2.training.logging.nnunet_logger import MetaLogger, WandbLogger


class FakeRun:
    def __init__(self):
        self.config = SimpleNamespace(update=lambda config, allow_val_change: self.settings.update(config))
        self.settings, self.summary, self.logged, self.step = {}, {}, [], 0

    def log(self, values, step):
        self.logged.append((values, step))


@pytest.fixture
def wandb(monkeypatch):
    run, calls = FakeRun(), []
    module = SimpleNamespace(init=lambda **options: calls.append(options) or run, run=run, calls=calls)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("LSB_JOBID", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    return module


def test_a_switched_on_logger_starts_a_run(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_wandb_enabled", "True")
    monkeypatch.setenv("nnUNet_wandb_project", "liver")
    meta = MetaLogger(tmp_path, False)
    meta.log("lrs", 0.1, 0)
    meta.log_summary("dice", 0.9)
    assert wandb.calls == [{"project": "liver", "mode": "online", "dir": str(tmp_path), "id": None, "resume": "never"}]
    assert wandb.run.settings == {"JobID": "12"}
    assert wandb.run.logged == [({"lrs": 0.1}, 0)]
    assert wandb.run.summary == {"current_epoch": 0, "dice": 0.9}


def write_run(folder):
    latest = folder / "wandb" / "latest-run"
    latest.mkdir(parents=True)
    (latest / "run-abc-1.wandb").touch()


def test_a_resumed_training_goes_on_with_its_run_where_that_stopped(wandb, tmp_path):
    write_run(tmp_path)
    logger = WandbLogger(tmp_path, True)
    assert (wandb.calls[0]["id"], wandb.calls[0]["resume"]) == ("abc-1", "allow")
    wandb.run.step = 5
    logger.log("lrs", 0.1, 4)
    logger.log("lrs", 0.1, 5)
    assert wandb.run.logged == [({"lrs": 0.1}, 5)]


def test_a_training_started_anew_drops_the_old_run(wandb, tmp_path):
    write_run(tmp_path)
    WandbLogger(tmp_path, False)
    assert not (tmp_path / "wandb").exists()


def test_only_the_first_process_starts_a_run(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    assert MetaLogger(tmp_path, False).loggers == []
    assert wandb.calls == []


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RuntimeError, match="pip install wandb"):
        WandbLogger(tmp_path, False)
