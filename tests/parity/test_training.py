"""Training steps and checkpoints beside the reference release."""
import numpy as np
import pytest
import torch
from tiny_dataset import make_dataset_json, make_tiny_dataset

from nnunetv2.training.checkpoint import load_checkpoint_file
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

pytestmark = [pytest.mark.parity, pytest.mark.slow]

CPU = torch.device("cpu")
STEPS = 5
CONFIGURATIONS = {3: "3d_fullres", 2: "2d"}
DATASETS = {
    "labels": make_dataset_json(),
    "regions": make_dataset_json(labels={"background": 0, "whole": [1, 2], "core": 2}, regions_class_order=[1, 2]),
    "ignore": make_dataset_json(labels={"background": 0, "blob": 1, "ignore": 2}),
}

# Runs where only the reference is importable: `value` tells configuration, plans and dataset.json.
CONSTRUCT = """
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
trainer = nnUNetTrainer(plans={**value["plans"], "continue_training": False}, configuration=value["configuration"],
                        fold=0, dataset_json=value["dataset_json"], device=torch.device("cpu"))
trainer.initialize()
"""
TRAIN = CONSTRUCT + """
state = trainer.network.state_dict()
trainer.network.load_state_dict({name: torch.from_numpy(inputs["weight." + name]) for name in state})
def batch(i):
    targets = [torch.from_numpy(inputs[f"target.{i}.{k}"]) for k in range(value["scales"])]
    return {"data": torch.from_numpy(inputs[f"data.{i}"]), "target": targets, "keys": []}
trainer.network.train()
outputs["losses"] = np.array([trainer.train_step(batch(i))["loss"] for i in range(value["steps"])])
trainer.network.eval()
with torch.no_grad():
    validated = trainer.validation_step(batch(0))
outputs.update({"val." + name: np.asarray(entry) for name, entry in validated.items()})
outputs.update({"weight." + name: tensor.numpy() for name, tensor in trainer.network.state_dict().items()})
"""


@pytest.fixture
def build(roots, monkeypatch):
    """Return a function that makes a dataset and our trainer for it, and what the reference needs for the same."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_cpu_autocast", "0")

    def make(dims, kind="labels"):
        plans = make_tiny_dataset(roots["nnUNet_preprocessed"], dims=dims, stages=3, dataset_json=DATASETS[kind])
        trainer = nnUNetTrainer(plans, CONFIGURATIONS[dims], 0, DATASETS[kind], CPU)
        trainer.initialize()
        return trainer, {"plans": plans, "configuration": CONFIGURATIONS[dims], "dataset_json": DATASETS[kind],
                         "steps": STEPS, "scales": 2}

    return make


def draw_batches(trainer):
    loader, _ = trainer.get_dataloaders()
    return [next(loader) for _ in range(STEPS)]


def as_arrays(batches):
    arrays = {}
    for i, batch in enumerate(batches):
        arrays[f"data.{i}"] = batch["data"].numpy()
        arrays.update({f"target.{i}.{k}": target.numpy() for k, target in enumerate(batch["target"])})
    return arrays


@pytest.mark.parametrize(("dims", "kind"), [(3, "labels"), (2, "labels"), (3, "regions"), (3, "ignore")])
def test_five_steps_from_the_same_weights_end_at_the_same_weights(build, reference, dims, kind):
    trainer, value = build(dims, kind)
    batches = draw_batches(trainer)
    weights = {f"weight.{name}": tensor.numpy().copy() for name, tensor in trainer.network.state_dict().items()}
    theirs, _ = reference.run(TRAIN, value, **weights, **as_arrays(batches))

    trainer.network.train()
    losses = [trainer.train_step(batch)["loss"] for batch in batches]
    trainer.network.eval()
    with torch.no_grad():
        validated = trainer.validation_step(batches[0])

    np.testing.assert_allclose(losses, theirs["losses"], rtol=1e-4)
    for name in ("loss", "tp_hard", "fp_hard", "fn_hard"):
        np.testing.assert_allclose(validated[name], theirs[f"val.{name}"], rtol=1e-4)
    ours = {name: tensor.numpy() for name, tensor in trainer.network.state_dict().items()}
    moved = max(np.abs(ours[name] - weights[f"weight.{name}"]).max() for name in ours)
    apart = {name: np.abs(ours[name] - theirs[f"weight.{name}"]).max() for name in ours}
    largest = max(float(np.abs(tensor).max()) for tensor in ours.values())
    print(f"{dims}d {kind}: weights moved by {moved:.2e}, differ by {max(apart.values()):.2e} of {largest:.2e}")
    assert max(apart.values()) < 1e-4 * moved


LOAD_OURS = CONSTRUCT + """
trainer.load_checkpoint(value["file"])
answer = {"epoch": trainer.current_epoch, "axes": list(trainer.inference_allowed_mirroring_axes),
          "dice": [float(x) for x in trainer.logger.get_value("mean_fg_dice", step=None)],
          "best": float(trainer._best_ema)}
outputs.update(trainer.network.state_dict())
outputs = {name: np.asarray(tensor) for name, tensor in outputs.items()}
outputs["momentum"] = np.concatenate([state["momentum_buffer"].flatten().numpy()
                                      for state in trainer.optimizer.state.values() if state])
"""
MAKE_THEIRS = CONSTRUCT + """
trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 2, 2
trainer.run_training()
outputs.update({name: np.asarray(tensor) for name, tensor in trainer.network.state_dict().items()})
answer = {"folder": trainer.output_folder, "best": float(trainer._best_ema),
          "dice": [float(x) for x in trainer.logger.get_value("mean_fg_dice", step=None)]}
"""


@pytest.mark.parametrize("dims", [3, 2])
def test_the_reference_continues_our_checkpoints(build, reference, dims):
    trainer, value = build(dims)
    trainer.num_epochs = trainer.num_iterations_per_epoch = trainer.num_val_iterations_per_epoch = 1
    trainer.run_training()
    theirs, answer = reference.run(LOAD_OURS, {**value, "file": f"{trainer.output_folder}/checkpoint_final.pth"})
    dice = trainer.logger.get_value("mean_fg_dice", step=None)
    assert answer == {"epoch": 1, "axes": list(range(dims)), "dice": [float(x) for x in dice],
                      "best": float(trainer._best_ema)}
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
