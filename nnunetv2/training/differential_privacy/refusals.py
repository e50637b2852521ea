"""Refuse trainings whose differential privacy would be a word only, each with one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nnunetv2.federated.privacy.plans_redaction import STATISTICS

LEAST_PATIENTS = 20
RECORD_FILE = "privacy.json"
"""In the folder of a fold that was trained with differential privacy."""
FINGERPRINTS = ("dataset_fingerprint.json", "dataset_fingerprint_local.json")


class PrivacyRefusedError(ValueError):
    """A training cannot have differential privacy as it is."""


def check_process(*, is_ddp: bool, has_grad_scaler: bool) -> None:
    """Refuse several processes, and gradients that are scaled for float16."""
    if is_ddp:
        raise PrivacyRefusedError(
            "differential privacy with several processes (DDP, -num_gpus) is not offered in this version: train with "
            "one"
        )
    if has_grad_scaler:
        raise PrivacyRefusedError(
            "differential privacy needs bfloat16 or float32: the gradient scaler of float16 skips steps by what is in "
            "the data. Set grad_scaler to None in the trainer"
        )


def check_network(network: nn.Module) -> None:
    """Refuse layers that mix patients."""
    mixing = next((name for name, module in network.named_modules() if isinstance(module, _BatchNorm)), None)
    if mixing is not None:
        raise PrivacyRefusedError(
            f"batch normalization ({mixing}) mixes the patients of a batch, and keeps their means: differential "
            "privacy needs a network with instance normalization"
        )


def check_number(num_patients: int, unit: str, fold: int | str) -> None:
    """Refuse splits in which each patient is too large a part of the whole."""
    if num_patients < LEAST_PATIENTS:
        raise PrivacyRefusedError(
            f"fold {fold} has {num_patients} training {unit}s, and differential privacy needs {LEAST_PATIENTS} or "
            "more: with fewer, noise that hides one of them hides everything"
        )


def check_previous_stage(segmentations: Path | None) -> None:
    """Refuse the second stage of a cascade whose first one was trained without differential privacy.

    Args:
        segmentations: Where the first stage leaves them, `<model>/predicted_next_stage/<configuration>`; None without
            a cascade.
    """
    if segmentations is None:
        return
    model = segmentations.parent.parent
    folds = sorted(folder for folder in model.glob("fold_*") if folder.is_dir())
    open_fold = next((fold for fold in folds if not (fold / RECORD_FILE).is_file()), None)
    if open_fold is not None or not folds:
        raise PrivacyRefusedError(
            f"the previous stage of this cascade, {open_fold or model}, was trained without differential privacy: "
            "train it with the same trainer first"
        )


def are_plans_from(plans: Mapping[str, Any], fingerprints: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the fingerprint that plans have intensities of; None for those of other patients.

    One channel is enough: plans that were moved to a dataset with further channels have those measured there.

    Args:
        fingerprints: File name -> content, of the dataset.
    """
    used = _intensities(plans)
    for name, fingerprint in fingerprints.items():
        measured = _intensities(fingerprint)
        if used == measured or any(used.get(channel) == statistics for channel, statistics in measured.items()):
            return name
    return None


def _intensities(content: Mapping[str, Any]) -> Mapping[str, Any]:
    return next((content[field] for field in STATISTICS if field in content), {})


def check_plans(plans: Mapping[str, Any], fingerprints: Mapping[str, Mapping[str, Any]], *, may_leak: bool) -> bool:
    """Tell whether plans stay uncovered; refuse those of the same patients unless they may.

    Plans that were made here have left their fingerprint beside them.

    Args:
        may_leak: Whether it has.
    """
    found = are_plans_from(plans, fingerprints)
    if found is not None and not may_leak:
        raise PrivacyRefusedError(
            f"the plans were made from these very patients ({found}), which epsilon does not cover: take plans of "
            "another dataset (nnUNetv2_move_plans_between_datasets), or train with --dp_uncovered plans, and every "
            "record says so"
        )
    return found is not None
