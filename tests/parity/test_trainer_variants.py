"""Trainer variants beside those of the reference release: what they inherit, their numbers, losses and augmentation."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from tiny_dataset import make_dataset_json, make_plans, make_tiny_dataset

sys.path.append(str(Path(__file__).parents[1] / "training" / "variants"))
from variant_table import VARIANTS

# Runs on both sides: `value` tells variants, plans and dataset.json; fills `answer`.
DESCRIBE = """
import importlib, inspect, warnings
import numpy as np
import torch
warnings.simplefilter("ignore")
torch.cuda.is_available = lambda: True
NUMBERS = ("num_epochs", "initial_lr", "weight_decay", "enable_deep_supervision", "probabilistic_oversampling",
           "oversample_foreground_percent", "disable_checkpointing", "num_iterations_per_epoch", "save_every")
LOSS = ("k", "ignore_index", "label_smoothing", "batch_dice", "do_bg", "smooth", "ddp", "weight_ce", "weight_dice",
        "ignore_label", "use_ignore_label", "weight_factors", "reduction")

def construct(kind, plans="plans", labels="labels"):
    configuration = next(iter(value[plans]["configurations"]))
    return kind(plans={**value[plans], "continue_training": False}, configuration=configuration, fold=0,
                dataset_json=value[labels], device=torch.device("cpu"))

def plain(x):
    if isinstance(x, (list, tuple)):
        return [plain(entry) for entry in x]
    if isinstance(x, set):
        return [int(entry) for entry in sorted(x)]
    if isinstance(x, np.ndarray):
        return x.tolist()
    if isinstance(x, (np.generic,)):
        return x.item()
    return x if isinstance(x, (int, float, str, bool, type(None))) else None

def describe_loss(loss):
    if loss is None or not isinstance(loss, torch.nn.Module):
        return None
    told = {name: plain(getattr(loss, name)) for name in LOSS if hasattr(loss, name)}
    told["kind"] = type(loss).__name__
    parts = [name for name in ("loss", "ce", "dc") if hasattr(loss, name)]
    return {**told, **{name: describe_loss(getattr(loss, name)) for name in parts}}

def describe_transform(t):
    # Ours may be faster subclasses of the library's.
    told = {"kind": next(c.__name__ for c in type(t).__mro__ if c.__module__.startswith("batchgeneratorsv2"))}
    for name, entry in vars(t).items():
        if name.startswith("_") or name in ("benchmark", "benchmark_use_fft"):
            continue
        if type(entry).__name__ == "BGContrast":
            told[name] = {k: plain(v) for k, v in vars(entry).items()}
        elif hasattr(entry, "get_parameters"):
            told[name] = describe_transform(entry)
        elif isinstance(entry, (list, tuple)) and entry and hasattr(entry[0], "get_parameters"):
            told[name] = [describe_transform(inner) for inner in entry]
        elif not callable(entry):
            told[name] = plain(entry)
    return told

def transforms_of(trainer, cascaded):
    rotation, dummy, size, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    patch = trainer.configuration_manager.patch_size
    pipeline = trainer.get_training_transforms(
        patch, rotation, [[1.0] * len(patch), [0.5] * len(patch)], axes, dummy, use_mask_for_norm=[True],
        is_cascaded=cascaded, foreground_labels=[1, 2], regions=None, ignore_label=None)
    geometry = [plain(rotation), bool(dummy), [int(x) for x in size], plain(axes),
                plain(trainer.inference_allowed_mirroring_axes)]
    return geometry, [describe_transform(t) for t in pipeline.transforms]

def describe(module, name):
    kind = getattr(importlib.import_module("nnunetv2.training.nnUNetTrainer.variants." + module), name)
    told = {"parents": [c.__name__ for c in kind.__mro__ if c.__name__.startswith("nnUNetTrainer")]}
    if "Benchmark" in name:
        told["numbers"] = {n: plain(getattr(construct(kind), n)) for n in NUMBERS}
        return told
    trainer = construct(kind)
    told["numbers"] = {n: plain(getattr(trainer, n)) for n in NUMBERS}
    for labels in ("labels", "regions", "ignore"):
        try:
            told["loss " + labels] = describe_loss(construct(kind, labels=labels)._build_loss())
        except AssertionError:
            told["loss " + labels] = "refused"
    for plans in ("plans", "flat", "thin"):
        for cascaded in (False, True):
            geometry, transforms = transforms_of(construct(kind, plans), cascaded)
            told[f"augmentation {plans} {cascaded}"] = transforms
        told["geometry " + plans] = geometry
    if "Adan" in name:
        return told
    trainer.initialize()
    optimizer = trainer.optimizer
    kind_of_optimizer = next(c.__name__ for c in type(optimizer).__mro__ if not c.__module__.startswith("nnunetv2"))
    told["optimizer"] = [kind_of_optimizer, {k: plain(v) for k, v in optimizer.defaults.items()
                                             if k in ("lr", "weight_decay", "momentum", "nesterov", "amsgrad")}]
    kinds = {next(c.__name__ for c in type(m).__mro__ if c.__module__.startswith("torch."))
             for m in trainer.network.modules()}
    told["norms"] = sorted(kind for kind in kinds if "Norm" in kind)
    told["schedule"] = type(trainer.lr_scheduler).__name__
    rates = []
    for epoch in (0, 1, 2, 3):
        if epoch < trainer.num_epochs:
            trainer.lr_scheduler.step(epoch)
            rates.append(optimizer.param_groups[0]["lr"])
    told["rates"] = rates
    return told

answer = {name: describe(module, name) for module, name in value["variants"]}
"""
OUR_SCHEDULES = {"CosineAnnealingLR_offset": "CosineAnnealingLR"}  # a closed form, as torch's warns of epochs
CHOSEN_DIFFERENCES = (
    "nnUNetTrainerDiceLoss /loss ignore/",  # the reference's fails on the ignore label
    *(f"nnUNetTrainer_{length}epochs_NoMirroring /parents" for length in (250, 2000, 4000, 8000)),
)


def describe_ours(value: dict) -> dict:
    names = {"value": value}
    with redirect_stdout(io.StringIO()):
        exec(DESCRIBE, names)
    return names["answer"]


@pytest.fixture
def value(roots) -> dict:
    thin = make_plans(stages=3)
    thin["configurations"]["3d_fullres"]["patch_size"] = [8, 40, 40]
    plans = make_tiny_dataset(roots["nnUNet_preprocessed"], stages=3)
    regions = make_dataset_json(labels={"background": 0, "whole": [1, 2], "core": 2}, regions_class_order=[1, 2])
    return {
        "plans": plans,
        "flat": make_plans(dims=2, stages=3),
        "thin": thin,
        "labels": make_dataset_json(),
        "regions": regions,
        "ignore": make_dataset_json(labels={"background": 0, "blob": 1, "ignore": 2}),
        "variants": [[variant.module, variant.name] for variant in VARIANTS],
    }


def differences(ours: object, theirs: object, place: str = "") -> list[str]:
    """Name every value that differs; numbers are compared as such."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [
            found
            for key in sorted({*ours, *theirs})
            for found in differences(ours.get(key, "-"), theirs.get(key, "-"), f"{place}/{key}")
        ]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [found for i, (a, b) in enumerate(zip(ours, theirs)) for found in differences(a, b, f"{place}/{i}")]
    if isinstance(ours, (int, float)) and isinstance(theirs, (int, float)):
        return [] if abs(ours - theirs) <= 1e-7 * max(1, abs(theirs)) else [f"{place}: {ours} instead of {theirs}"]
    return [] if ours == theirs else [f"{place}: {ours} instead of {theirs}"]


def test_variants_are_those_of_the_reference(reference, value, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    _, theirs = reference.run(DESCRIBE, value)
    ours = describe_ours(value)
    for told in ours.values():
        if "schedule" in told:
            told["schedule"] = OUR_SCHEDULES.get(told["schedule"], told["schedule"])
    found = [f"{name} {line}" for name in theirs for line in differences(ours[name], theirs[name])]
    assert set(ours) == set(theirs)
    assert [line for line in found if not line.startswith(CHOSEN_DIFFERENCES)] == []


SIGNATURES = """
import inspect
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
answer = {name: list(inspect.signature(getattr(nnUNetTrainer, name)).parameters) for name in value}
"""


def test_hooks_take_the_arguments_of_the_reference(reference):
    sys.path.append(str(Path(__file__).parents[1] / "training"))
    from extension_surface import HOOKS

    _, theirs = reference.run(SIGNATURES, HOOKS.split())
    names = {"value": HOOKS.split()}
    exec(SIGNATURES, names)
    ours = names["answer"]
    different = {name: (ours[name], theirs[name]) for name in theirs if ours[name][: len(theirs[name])] != theirs[name]}
    assert different == {}
