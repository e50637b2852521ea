"""Several processes that train one network."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from patience import PATIENCE_S
from tiny_dataset import NAME, make_tiny_dataset

from nnunetv2.run import processes

PROJECT = Path(__file__).resolve().parents[2]
TRAINER = """
    import os
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


    class DdpTrainer(nnUNetTrainer):
        def __init__(self, plans, configuration, fold, dataset_json, device):
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.num_epochs = 2
            self.num_iterations_per_epoch = self.num_val_iterations_per_epoch = 2

        def on_train_epoch_start(self):
            super().on_train_epoch_start()
            if os.environ.get("DIE") and self.current_epoch == 1 and self.local_rank == 1:
                os.kill(os.getpid(), 9)
            if os.environ.get("FAIL") and self.current_epoch == 1 and self.local_rank == 1:
                raise ValueError("rank one is not well")
"""


@pytest.fixture
def fold(roots, monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    folder = tmp_path / "trainers"
    folder.mkdir()
    (folder / "ddp_trainer.py").write_text(textwrap.dedent(TRAINER))
    monkeypatch.setenv("nnUNet_extTrainer", str(folder))
    make_tiny_dataset(roots["nnUNet_preprocessed"])
    return roots["nnUNet_results"] / NAME / "DdpTrainer__nnUNetPlans__3d_fullres" / "fold_0"


def start(launcher: list, *options: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *launcher, "998", "3d_fullres", "0", "-tr", "DdpTrainer", "-device", "cpu", *options]
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


COMMAND = ["-m", "nnunetv2.run.run_training"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *COMMAND]


def assert_is_one_training(fold: Path) -> None:
    assert len(list(fold.glob("training_log_*.txt"))) == 1
    assert {path.name for path in fold.parent.iterdir()} == {
        "fold_0",
        "plans.json",
        "dataset.json",
        "dataset_fingerprint.json",
    }
    assert (fold / "checkpoint_final.pth").is_file() and (fold / "validation" / "summary.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "options"), [(COMMAND, ("-num_gpus", "2")), (TORCHRUN, ())], ids=["num_gpus", "torchrun"]
)
def test_processes_train_together_on_a_cpu(fold, launcher, options):
    done = start(launcher, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_is_one_training(fold)


@pytest.mark.slow
@pytest.mark.parametrize(("cause", "message"), [("DIE", "was killed"), ("FAIL", "rank one is not well")])
def test_a_process_that_ends_ends_all_with_a_message(fold, cause, message):
    done = start(COMMAND, "-num_gpus", "2", **{cause: "1"})
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "process 1 of 2" in last and message in last


def test_several_processes_need_a_device_that_knows_them():
    with pytest.raises(AssertionError, match="cuda or cpu"):
        processes.check_device(torch.device("mps"), 2)
    with pytest.raises(AssertionError, match="at least one"):
        processes.check_device(torch.device("cpu"), 0)
    processes.check_device(torch.device("cpu"), 4)


def test_torchrun_is_recognised_by_its_variables(monkeypatch):
    assert not processes.are_launched_by_torchrun()
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert processes.are_launched_by_torchrun() and processes.torchrun_rank(1) == processes.torchrun_rank(2) == (1, 2)
    with pytest.raises(ValueError, match="leave it out"):
        processes.torchrun_rank(3)
