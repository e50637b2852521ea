"""Trainings of sites as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from patience import PATIENCE_S
from tiny_dataset import NAME

PROJECT = Path(__file__).resolve().parents[2]
TRAINER = "nnUNetTrainerAsymFedAvg"


def start(
    federation,
    folder: Path,
    site: str,
    configuration: str,
    fold: str,
    *options: str,
    code: str | None = None,
    trainer: str = TRAINER,
) -> subprocess.Popen:
    """Start the training of a fold at a site, as people do, or with other code."""
    federation.credential(site)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "nnUNet_n_proc_DA": "0",
        "nnUNet_def_n_proc": "1",
        "nnUNet_fed_site": str(federation.state.store.folder / f"credential.{site}.json"),
        **{root: str(folder / site / root) for root in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")},
    }
    command = [
        sys.executable,
        *(("-m", "nnunetv2.run.run_training") if code is None else ("-c", code)),
        "998",
        configuration,
        fold,
        "-tr",
        trainer,
        "-device",
        "cpu",
        *options,
    ]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=PROJECT, env=environment
    )


def finish(*processes: subprocess.Popen) -> None:
    """Wait for trainings, which must end without an error."""
    try:
        outputs = [process.communicate(timeout=2 * PATIENCE_S)[0] for process in processes]  # of a whole training
    finally:
        for process in processes:
            process.kill()  # if it hangs, or another one does
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output[-3000:]


def fold_folder(folder: Path, site: str, configuration: str, fold: int | str, trainer: str = TRAINER) -> Path:
    return folder / site / "nnUNet_results" / NAME / f"{trainer}__nnUNetPlans__{configuration}" / f"fold_{fold}"
