"""Primus trainers beside those of the release: the same names, networks and checkpoints."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from importable_torchvision import MAKE_IMPORTABLE, make_torchvision_importable
from tiny_dataset import NAME, make_dataset_json, make_plans, make_tiny_dataset

from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.nnUNetTrainer.primus import primus_trainers

CPU = torch.device("cpu")
PATCH = [16, 16, 24]

# Runs on both sides. Weights on the device `meta` have a shape and take no memory.
DESCRIBE = """
import inspect
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.primus import primus_trainers as module

def describe(name):
    trainer = getattr(module, name)(plans={**json.loads(json.dumps(value["plans"])), "continue_training": False},
                                    configuration="3d_fullres", fold=0,
                                    dataset_json=value["dataset_json"], device=torch.device("cpu"))
    told = {key: getattr(trainer, key) for key in ("initial_lr", "weight_decay", "num_epochs",
                                                   "enable_deep_supervision")}
    told |= {key: list(np.ravel(trainer.configuration_manager.configuration[key])) for key in ("patch_size",
                                                                                               "batch_size")}
    if name == "AbstractPrimus":
        return told
    with torch.device("meta"):
        network = trainer.build_network_architecture(trainer.plans_manager, trainer.configuration_manager, 2, 3, False)
    told["weights"] = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    told["dropped paths"] = [part.drop_prob for part in network.modules() if hasattr(part, "drop_prob")]
    return told

names = [name for name, kind in vars(module).items() if inspect.isclass(kind) and issubclass(kind, nnUNetTrainer)
         and kind.__module__ == module.__name__]
answer = {name: describe(name) for name in names}
answer = json.loads(json.dumps(answer, default=float))
"""

PREDICT = """
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, perform_everything_on_device=False)
predictor.initialize_from_trained_model_folder(value["model"], (0,), "checkpoint_final.pth")
outputs["logits"] = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(inputs["image"])).float().numpy()
"""

TRAIN = """
import torch
from nnunetv2.run.run_training import get_trainer_from_args
trainer = get_trainer_from_args(value["dataset"], "3d_fullres", 0, value["trainer"], device=torch.device("cpu"))
trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 1, 1
trainer.run_training()
"""

# Loads a checkpoint, tells what the trainer now holds, and writes it anew.
PASS_ON = """
import hashlib
import torch
from nnunetv2.training.nnUNetTrainer.primus import primus_trainers as module
trainer = getattr(module, value["trainer"])(plans=value["plans"], configuration="3d_fullres", fold=0,
                                            dataset_json=value["dataset_json"], device=torch.device("cpu"))
trainer.load_checkpoint(value["file"])
answer = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
          for name, tensor in trainer.network.state_dict().items()}
trainer.save_checkpoint(value["file"])
"""
TRAINERS = [name for name in vars(primus_trainers) if "Primus" in name and name != "AbstractPrimus"]


def test_primus_trainers_are_those_of_the_release(reference, roots):
    make_torchvision_importable()
    value = {"plans": make_plans(stages=3, patch_size=PATCH), "dataset_json": make_dataset_json()}
    _, theirs = reference.run(MAKE_IMPORTABLE + DESCRIBE, value)
    names = {"value": value, "json": __import__("json"), "np": np}
    exec(DESCRIBE, names)
    assert set(theirs) == set(names["answer"]) and len(theirs) == 20
    assert {name: told for name, told in names["answer"].items() if told != theirs[name]} == {}


@pytest.mark.parametrize("name", ["nnUNet_Primus_S_Trainer", "nnUNet_PrimusV2S_Trainer"])
def test_checkpoints_of_primus_pass_between_us_and_the_release(reference, roots, monkeypatch, name):
    make_torchvision_importable()
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_cpu_autocast", "0")
    make_tiny_dataset(roots["nnUNet_preprocessed"], stages=3, cases=5, patch_size=PATCH, batch_size=1)
    image = np.random.default_rng(0).normal(size=(1, *PATCH)).astype(np.float32)
    model = roots["nnUNet_results"] / NAME / f"{name}__nnUNetPlans__3d_fullres"

    def predict_here() -> np.ndarray:
        predictor = nnUNetPredictor(device=CPU, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(model, (0,))
        return predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image)).float().numpy()

    def predict_there() -> np.ndarray:
        outputs, _ = reference.run(MAKE_IMPORTABLE + PREDICT, {"model": str(model)}, image=image)
        return outputs["logits"]

    trainer = get_trainer_from_args(NAME, "3d_fullres", 0, name, device=CPU)
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 1, 1
    trainer.run_training()
    # At the rim of an image the release rounds logits to 0: it weighs tiles in float16.
    inside = (slice(None), *(slice(4, -4),) * 3)
    np.testing.assert_allclose(predict_here()[inside], predict_there()[inside], atol=5e-3)

    shutil.rmtree(model)
    reference.run(MAKE_IMPORTABLE + TRAIN, {"dataset": NAME, "trainer": name})
    np.testing.assert_allclose(predict_here()[inside], predict_there()[inside], atol=5e-3)
    trainer = get_trainer_from_args(NAME, "3d_fullres", 0, name, continue_training=True, device=CPU)
    trainer.load_checkpoint(str(Path(trainer.output_folder, "checkpoint_final.pth")))
    assert trainer.current_epoch == 1 and trainer.training_stage == "warmup_all"
    assert len(trainer.optimizer.state) == len(list(trainer.network.parameters()))
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 2, 1, 1
    trainer.run_training()
    assert trainer.current_epoch == 2


@pytest.mark.skipif(
    not os.environ.get("NNUNET_EVERY_PRIMUS"), reason="takes gigabytes and minutes: set NNUNET_EVERY_PRIMUS=1"
)
@pytest.mark.parametrize("name", TRAINERS)
def test_checkpoints_of_every_primus_in_full_size_load_in_the_release_and_back(reference, roots, tmp_path, name):
    make_torchvision_importable()
    file = str(tmp_path / "checkpoint.pth")
    make_tiny_dataset(roots["nnUNet_preprocessed"], stages=3, cases=5, patch_size=PATCH, batch_size=1)
    value = {
        "plans": make_plans(stages=3, patch_size=PATCH) | {"continue_training": False},
        "dataset_json": make_dataset_json(),
    }

    def new_trainer():
        trainer = getattr(primus_trainers, name)(**value, configuration="3d_fullres", fold=0, device=CPU)
        trainer.initialize()
        return trainer

    def digests(trainer) -> dict[str, str]:
        weights = trainer.network.state_dict()
        return {key: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for key, tensor in weights.items()}

    trainer = new_trainer()
    trainer.save_checkpoint(file)
    ours = digests(trainer)
    del trainer
    _, theirs = reference.run(MAKE_IMPORTABLE + PASS_ON, {**value, "trainer": name, "file": file})
    assert theirs == ours
    trainer = new_trainer()
    assert digests(trainer) != ours
    trainer.load_checkpoint(file)
    assert digests(trainer) == ours
