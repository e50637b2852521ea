"""Tests of reading a model folder."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from patience import PATIENCE_S
from tiny_models import write_model

from nnunetv2.models.checkpoint_file import load_checkpoint_file, save_checkpoint_file
from nnunetv2.models.model_folder import load_model_folder
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

STATE_BYTES = 48 * 2**20

LOAD_AND_MEASURE = r"""
import re, sys
from pathlib import Path
import torch
from nnunetv2.models.model_folder import load_model_folder
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

def load(folder):
    model = load_model_folder(
        folder, None, "checkpoint_final.pth", find_trainer=lambda name: nnUNetTrainer, fallback=lambda: nnUNetTrainer
    )
    return model, 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

(_, before), (model, after) = map(load, sys.argv[1:])
for file in Path(sys.argv[2]).glob("fold_*/checkpoint_final.pth"):
    file.write_bytes(b"")  # in place, as a copy over it begins
total = sum(float(value.double().abs().sum()) for weights in model.parameters for value in weights.values())
print(after - before, total)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells the memory of a process at its peak")
def test_states_of_optimizers_are_not_loaded_and_weights_outlive_their_files(tmp_path):
    small, large = (write_model(tmp_path / name, folds=(0, 1, 2)) for name in ("small", "large"))
    total = 0.0
    for file in large.glob("fold_*/checkpoint_final.pth"):
        checkpoint = load_checkpoint_file(file)
        checkpoint["optimizer_state"] = {"state": torch.ones(STATE_BYTES // 4)}
        save_checkpoint_file(checkpoint, file)
        total += sum(float(value.double().abs().sum()) for value in checkpoint["network_weights"].values())
    run = subprocess.run(
        [sys.executable, "-c", LOAD_AND_MEASURE, str(small), str(large)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert run.returncode == 0, run.stderr
    taken, found = run.stdout.split()
    assert int(taken) < STATE_BYTES
    assert abs(float(found) - total) < 1e-6 * total


def test_names_of_one_tensor_share_one_copy(tmp_path):
    """The networks of nnU-Net name most parameters several times."""
    folder = write_model(tmp_path / "model", folds=(0,))
    model = load_model_folder(
        folder, None, "checkpoint_final.pth", find_trainer=lambda name: nnUNetTrainer, fallback=lambda: nnUNetTrainer
    )
    (weights,) = model.parameters
    places = {value.untyped_storage().data_ptr() for value in weights.values()}
    parameters = {parameter.data_ptr() for parameter in model.network.parameters()}
    assert len(places) == len(parameters) < len(weights)
