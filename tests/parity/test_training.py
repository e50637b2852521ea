"""Training steps and checkpoints beside the reference release."""

import os
import signal
import subprocess
import sys
import textwrap
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_dataset import NAME, PATCH, make_configuration, make_dataset_json, make_plans, make_tiny_dataset

from nnunetv2.models.checkpoint_file import load_checkpoint_file
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

CPU = torch.device("cpu")
STEPS = 20
SEEDS = (0, 1, 2)
"""Starting points of each training. From some, twenty steps magnify a change of the weights by 1e-7, the rounding of
float32, to more than 1e-4 of the weights in one and the same package, from others not at all. So one of three must
agree to 1e-4, which no error in the arithmetic would let happen, and all to 1e-2."""
CONFIGURATIONS = {3: "3d_fullres", 2: "2d"}
REGIONS = {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
DATASETS = {
    "labels": make_dataset_json(),
    "regions": make_dataset_json(**REGIONS),
    "ignore": make_dataset_json(labels={"background": 0, "blob": 1, "ignore": 2}),
    "cascade": make_dataset_json(),
}
CASES = [
    (dims, kind, supervised)
    for dims in (3, 2)
    for kind in DATASETS
    for supervised in (True, False)
    if dims == 3 or kind in ("labels", "regions")
]

# Runs where only the reference is importable: `value` tells configuration, plans and dataset.json.
CONSTRUCT = """
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
def construct(value):
    trainer = nnUNetTrainer(plans={**value["plans"], "continue_training": False}, configuration=value["configuration"],
                            fold=0, dataset_json=value["dataset_json"], device=torch.device("cpu"))
    trainer.enable_deep_supervision = value.get("supervised", True)
    trainer.initialize()
    return trainer
if "plans" in value:
    trainer = construct(value)
"""
TRAIN = (
    CONSTRUCT
    + """
torch.set_num_threads(1)
for name, case in value["cases"].items():
    trainer = construct(case)
    state = trainer.network.state_dict()
    trainer.network.load_state_dict({key: torch.from_numpy(inputs[f"{name}.weight.{key}"]) for key in state})
    def batch(i):
        targets = [torch.from_numpy(inputs[f"{name}.target.{i}.{k}"]) for k in range(2 if case["supervised"] else 1)]
        return {"data": torch.from_numpy(inputs[f"{name}.data.{i}"]), "keys": [],
                "target": targets if case["supervised"] else targets[0]}
    trainer.network.train()
    outputs[f"{name}.losses"] = np.array([trainer.train_step(batch(i))["loss"] for i in range(value["steps"])])
    trainer.network.eval()
    with torch.no_grad():
        validated = trainer.validation_step(batch(0))
    outputs.update({f"{name}.val.{key}": np.asarray(entry) for key, entry in validated.items()})
    outputs.update({f"{name}.weight.{key}": tensor.numpy() for key, tensor in trainer.network.state_dict().items()})
"""
)


@pytest.fixture
def build(roots, monkeypatch):
    """Return a function that makes a dataset and our trainer for it, and what the reference needs for the same."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_cpu_autocast", "0")

    def make(dims, kind="labels"):
        plans = make_tiny_dataset(roots["nnUNet_preprocessed"], dims=dims, stages=3, dataset_json=DATASETS[kind])
        trainer = nnUNetTrainer(plans, CONFIGURATIONS[dims], 0, DATASETS[kind], CPU)
        trainer.initialize()
        return trainer, {"plans": plans, "configuration": CONFIGURATIONS[dims], "dataset_json": DATASETS[kind]}

    return make


def make_cascade(plans):
    """Turn the configuration of plans into the first of two stages; both use its preprocessed data."""
    (low,) = plans["configurations"].values()
    return {
        **plans,
        "configurations": {
            "3d_lowres": {**low, "next_stage": "3d_cascade_fullres"},
            "3d_cascade_fullres": {"inherits_from": "3d_lowres", "previous_stage": "3d_lowres"},
        },
    }


def make_batch(rng, dims, kind, supervised):
    """Draw blobs of two labels, the image that shows them, and the targets of a training of this kind."""
    shape = (2, 1, *PATCH[dims])
    field = rng.normal(size=shape)
    for axis in range(2, 2 + dims):
        field = sum(np.roll(field, shift, axis) for shift in (-1, 0, 1))
    labels = (field > 1).astype(np.int16) + (field > 5)
    data = (labels + rng.normal(0, 0.5, shape)).astype(np.float32)
    if kind == "cascade":
        earlier = np.roll(labels, 1, axis=2)
        data = np.concatenate([data, *(earlier == label for label in (1, 2))], axis=1).astype(np.float32)
    target = np.concatenate([labels > 0, labels == 2], axis=1) if kind == "regions" else labels.astype(np.int16)
    halves = (slice(None), slice(None), *[slice(None, None, 2)] * dims)
    return data, [target, target[halves].copy()] if supervised else [target]


def test_twenty_steps_from_the_same_weights_end_at_the_same_weights(roots, reference, monkeypatch):
    monkeypatch.setenv("nnUNet_cpu_autocast", "0")
    rng = np.random.default_rng(0)
    trainers, batches, arrays = {}, {}, {}
    descriptions = {}
    preprocessed = roots["nnUNet_preprocessed"]
    for dims in (3, 2):
        (preprocessed / NAME).mkdir(exist_ok=True)
        folder = preprocessed / NAME / make_configuration(dims=dims)["data_identifier"]
        folder.mkdir()
        (folder / "case.b2nd").touch()  # the trainers look at the ending only
    for (dims, kind, supervised), seed in product(CASES, SEEDS):
        name = f"{dims}d {kind} {'with' if supervised else 'without'} deep supervision, seed {seed}"
        torch.manual_seed(seed)
        plans, configuration = make_plans(dims=dims, stages=3), CONFIGURATIONS[dims]
        if kind == "cascade":
            plans, configuration = make_cascade(plans), "3d_cascade_fullres"
        trainer = nnUNetTrainer(plans, configuration, 0, DATASETS[kind], CPU)
        trainer.enable_deep_supervision = supervised
        trainer.initialize()
        trainers[name], batches[name] = trainer, [make_batch(rng, dims, kind, supervised) for _ in range(STEPS)]
        descriptions[name] = {
            "plans": plans,
            "configuration": configuration,
            "dataset_json": DATASETS[kind],
            "supervised": supervised,
        }
        arrays.update(
            {f"{name}.weight.{key}": tensor.numpy().copy() for key, tensor in trainer.network.state_dict().items()}
        )
        for i, (data, targets) in enumerate(batches[name]):
            arrays[f"{name}.data.{i}"] = data
            arrays.update({f"{name}.target.{i}.{k}": target for k, target in enumerate(targets)})
    theirs, _ = reference.run(TRAIN, {"cases": descriptions, "steps": STEPS}, **arrays)

    apart = {
        name: compare(
            name,
            trainer,
            [as_batch(*batch, is_list=descriptions[name]["supervised"]) for batch in batches[name]],
            theirs,
        )
        for name, trainer in trainers.items()
    }
    for first in range(0, len(apart), len(SEEDS)):
        of_case = dict(list(apart.items())[first : first + len(SEEDS)])
        assert min(of_case.values()) < 1e-4 and max(of_case.values()) < 1e-2, of_case


def as_batch(data, targets, *, is_list):
    targets = [torch.from_numpy(target) for target in targets]
    return {"data": torch.from_numpy(data), "target": targets if is_list else targets[0], "keys": []}


def compare(name, trainer, batches, theirs):
    """Train with batches; compare the first losses with the reference's, and return how far the weights are apart."""
    trainer.network.train()
    losses = [trainer.train_step(batch)["loss"] for batch in batches]
    trainer.network.eval()
    with torch.no_grad():
        validated = trainer.validation_step(batches[0])
    np.testing.assert_allclose(losses[:5], theirs[f"{name}.losses"][:5], rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(losses, theirs[f"{name}.losses"], rtol=1e-2, atol=1e-3, err_msg=name)
    for key in ("loss", "tp_hard", "fp_hard", "fn_hard"):
        np.testing.assert_allclose(validated[key], theirs[f"{name}.val.{key}"], rtol=0.02, atol=8, err_msg=name)
    ours = {key: tensor.numpy() for key, tensor in trainer.network.state_dict().items()}
    apart = np.sqrt(sum(np.sum((ours[key] - theirs[f"{name}.weight.{key}"]) ** 2.0) for key in ours))
    size = np.sqrt(sum(np.sum(values.astype(np.float64) ** 2) for values in ours.values()))
    print(f"{name}: losses {losses[0]:.4f} to {losses[-1]:.4f}, weights differ by {apart / size:.1e} of their norm")
    return apart / size


LOAD_OURS = (
    CONSTRUCT
    + """
trainer.load_checkpoint(value["file"])
answer = {"epoch": trainer.current_epoch, "axes": list(trainer.inference_allowed_mirroring_axes),
          "dice": [float(x) for x in trainer.logger.get_value("mean_fg_dice", step=None)],
          "best": float(trainer._best_ema)}
outputs.update(trainer.network.state_dict())
outputs = {name: np.asarray(tensor) for name, tensor in outputs.items()}
outputs["momentum"] = np.concatenate([state["momentum_buffer"].flatten().numpy()
                                      for state in trainer.optimizer.state.values() if state])
"""
)
MAKE_THEIRS = (
    CONSTRUCT
    + """
trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 2, 2
trainer.run_training()
outputs.update({name: np.asarray(tensor) for name, tensor in trainer.network.state_dict().items()})
answer = {"folder": trainer.output_folder, "best": float(trainer._best_ema),
          "dice": [float(x) for x in trainer.logger.get_value("mean_fg_dice", step=None)]}
"""
)


@pytest.mark.parametrize("dims", [3, 2])
def test_the_reference_continues_our_checkpoints(build, reference, dims):
    trainer, value = build(dims)
    trainer.num_epochs = trainer.num_iterations_per_epoch = trainer.num_val_iterations_per_epoch = 1
    trainer.run_training()
    theirs, answer = reference.run(LOAD_OURS, {**value, "file": f"{trainer.output_folder}/checkpoint_final.pth"})
    dice = trainer.logger.get_value("mean_fg_dice", step=None)
    assert answer == {
        "epoch": 1,
        "axes": list(range(dims)),
        "dice": [float(x) for x in dice],
        "best": float(trainer._best_ema),
    }
    for name, tensor in trainer.network.state_dict().items():
        np.testing.assert_array_equal(theirs[name], tensor.numpy())
    momentum = [state["momentum_buffer"].flatten() for state in trainer.optimizer.state.values()]
    np.testing.assert_array_equal(theirs["momentum"], torch.cat(momentum).numpy())


@pytest.mark.parametrize("dims", [3, 2])
def test_checkpoints_of_the_reference_are_continued(build, reference, dims):
    trainer, value = build(dims)
    theirs, answer = reference.run(MAKE_THEIRS, value)
    for name in ("checkpoint_best.pth", "checkpoint_final.pth"):
        checkpoint = load_checkpoint_file(f"{answer['folder']}/{name}")  # without running code from the file
        assert checkpoint["trainer_name"] == "nnUNetTrainer" and checkpoint["current_epoch"] == 1
    trainer.load_checkpoint(f"{answer['folder']}/checkpoint_final.pth")
    assert trainer.current_epoch == 1 and float(trainer._best_ema) == answer["best"]
    assert [float(x) for x in trainer.logger.get_value("mean_fg_dice", step=None)] == answer["dice"]
    for name, tensor in trainer.network.state_dict().items():
        np.testing.assert_array_equal(theirs[name], tensor.numpy())
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 2, 1, 1
    trainer.run_training()
    assert len(trainer.logger.get_value("lrs", step=None)) == 2


SHORT_TRAINER = """
    import os, signal
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


    class FourEpochs(nnUNetTrainer):
        def __init__(self, plans, configuration, fold, dataset_json, device):
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.num_epochs, self.save_every = 4, 1
            self.num_iterations_per_epoch = self.num_val_iterations_per_epoch = 2

        def on_train_epoch_start(self):
            super().on_train_epoch_start()
            if os.environ.get("KILL_AT") == str(self.current_epoch):
                if hasattr(self, "_writer"):
                    self._writer.wait()
                os.kill(os.getpid(), signal.SIGKILL)
"""


# The command with its search for trainers replaced: in the reference it imports all trainers, with all they need.
COMMAND = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import nnunetv2.run.run_training as command
import nnunetv2.utilities.find_objects as objects
from four_epochs import FourEpochs
command.recursive_find_trainer_class_by_name = objects.recursive_find_trainer_class_by_name = lambda *_: FourEpochs
command.run_training_entry()
"""


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_a_killed_training_is_continued_by_the_other_package(roots, reference, tmp_path, monkeypatch, first):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    folder = tmp_path / "trainers"
    folder.mkdir()
    (folder / "four_epochs.py").write_text(textwrap.dedent(SHORT_TRAINER))
    make_tiny_dataset(roots["nnUNet_preprocessed"], stages=3)
    pythons = {"ours": sys.executable, "theirs": str(reference.python)}
    homes = {"ours": Path(__file__).resolve().parents[2], "theirs": tmp_path}
    environment = {**os.environ, **reference.environment}
    environment.pop("PYTHONPATH", None)

    def train(who, *options, **more):
        return subprocess.run(
            [
                pythons[who],
                "-c",
                COMMAND,
                str(folder),
                "998",
                "3d_fullres",
                "0",
                "-tr",
                "FourEpochs",
                "-device",
                "cpu",
                *options,
            ],
            env={**environment, **more},
            cwd=homes[who],
            capture_output=True,
            text=True,
            timeout=600,
        )

    assert train(first, KILL_AT="2").returncode == -signal.SIGKILL
    fold = roots["nnUNet_results"] / NAME / "FourEpochs__nnUNetPlans__3d_fullres" / "fold_0"
    before = load_checkpoint_file(fold / "checkpoint_latest.pth")
    assert before["current_epoch"] == 2
    done = train("theirs" if first == "ours" else "ours", "--c")
    assert done.returncode == 0, done.stderr[-3000:]
    after = load_checkpoint_file(fold / "checkpoint_final.pth")
    assert after["current_epoch"] == 4 and after["logging"]["train_losses"][:2] == before["logging"]["train_losses"]
    assert len(after["logging"]["train_losses"]) == 4
    assert (fold / "validation" / "summary.json").is_file()  # all validation cases were predicted
