"""Check that a GPU holds the agreed plans, by the planner's estimate or by trying."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from nnunetv2.experiment_planning.experiment_planners.vram_proxy import RESIDUAL_ENCODER_UNET, count_feature_map_values
from nnunetv2.site_check.findings import Finding

_finding = partial(Finding, area="training")
# GB that training takes for a billion values in the feature maps of a batch, as the planners know of their references:
# 8 GB hold two samples of 560 million values in 3d and twelve of 85 million in 2d (residual: 680 and 135 million).
_GB_PER_BILLION = {(False, 3): 7.2, (False, 2): 7.9, (True, 3): 5.9, (True, 2): 5.0}
START_S = 20.0
"""In which PyTorch and the network are loaded."""
_SMALLER = (
    "Train on a larger GPU, or agree on smaller plans with all sites: -gpu_memory_target, or a preset that fits, and "
    "another -overwrite_plans_name."
)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Some training steps on this machine."""

    device: str
    """Name of the GPU, or "cpu"."""
    step_s: float | None = None
    """Seconds per step; None: none was done in time."""
    peak_gb: float | None = None
    """Most GPU memory in use; None without a GPU."""
    total_gb: float | None = None
    failure: str = ""


def estimate_gb(configuration: Mapping[str, Any], *, num_inputs: int, num_outputs: int) -> float:
    """Estimate the GPU memory that training takes, as planning does."""
    architecture, patch = configuration["architecture"], configuration["patch_size"]
    values = count_feature_map_values(
        patch,
        num_inputs,
        num_outputs,
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
    )
    is_residual = architecture["network_class_name"] == RESIDUAL_ENCODER_UNET
    return _GB_PER_BILLION[is_residual, len(patch)] * values * configuration["batch_size"] / 1e9


def check_given_memory(name: str, needed_gb: float, given_gb: float) -> Finding:
    """Compare the estimate with the memory of a GPU elsewhere."""
    sentence = f"{name} takes about {needed_gb:.1f} GB of GPU memory; {given_gb:g} GB are given."
    if needed_gb > given_gb:
        return _finding(name="gpu_memory", state="problem", sentence=sentence, remedy=_SMALLER)
    return _finding(name="gpu", state="ok", sentence=sentence)


def check_trial(name: str, needed_gb: float, trial: Trial) -> Finding:
    """Judge the steps that were tried on this machine."""
    if trial.peak_gb is None and trial.total_gb is None:
        steps = "no step in the time of this check" if trial.step_s is None else f"{trial.step_s:.1f} s per step"
        sentence = f"There is no GPU that PyTorch can use here; on the processor, {name} does {steps}."
        remedy = (
            f"Train on a machine with a GPU of at least {max(1, math.ceil(needed_gb))} GB; if this one has it, install "
            "its driver and a PyTorch built for it. For a GPU elsewhere, tell its memory: --gpu_memory GB."
        )
        if trial.failure:
            sentence = f"There is no GPU that PyTorch can use here, and on the processor {name} fails: {trial.failure}"
        return _finding(name="no_gpu", state="warning", sentence=sentence, remedy=remedy)
    if trial.failure or trial.step_s is None:
        reason = trial.failure or "no step in the time of this check"
        sentence = f"{name} does not train on {trial.device} ({trial.total_gb or 0:.0f} GB): {reason}"
        return _finding(name="gpu_memory", state="problem", sentence=sentence, remedy=_SMALLER)
    sentence = (
        f"{name} trains on {trial.device}: {trial.peak_gb or 0:.1f} of {trial.total_gb or 0:.0f} GB, "
        f"{trial.step_s:.2f} s per step."
    )
    return _finding(name="gpu", state="ok", sentence=sentence)


def try_steps(
    plans: Mapping[str, Any], dataset_json: Mapping[str, Any], configuration: str, *, device: str, limit_s: float
) -> Trial:
    """Train some steps in a process of its own, which may fail without harm."""
    task = json.dumps(
        {
            "plans": plans,
            "dataset_json": dataset_json,
            "configuration": configuration,
            "device": device,
            "limit_s": limit_s,
        }
    )
    try:
        done = subprocess.run(
            [sys.executable, "-m", "nnunetv2.site_check.trial_steps"],
            input=task,
            capture_output=True,
            text=True,
            timeout=limit_s + START_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Trial(device=device)
    if done.returncode:
        last = (done.stderr.strip() or "it was killed").splitlines()[-1]
        return Trial(device=device, failure=last[:300])
    return Trial(**json.loads(done.stdout.splitlines()[-1]))
