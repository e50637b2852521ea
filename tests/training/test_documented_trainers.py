"""The examples of the pages on extending and fine-tuning nnU-Net: each trains."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_dataset import NAME, make_tiny_dataset

from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

DOCUMENTATION = Path(__file__).parents[2] / "documentation"
PAGES = ("extending-nnunet.md", "fine-tuning.md")


def examples(page: str) -> dict[str, str]:
    """Return the modules of a page: file name, from the comment in the first line -> source."""
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCUMENTATION / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    return {block.splitlines()[0].removeprefix("# "): block for block in blocks}


def trainers_in(source: str) -> list[str]:
    return re.findall(r"^class (nnUNetTrainer\w+)", source, flags=re.MULTILINE)


TRAINERS = [name for page in PAGES for source in examples(page).values() for name in trainers_in(source)]


@pytest.fixture(scope="module")
def preprocessed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("preprocessed")
    make_tiny_dataset(folder, stages=3, cases=5)
    return folder


@pytest.fixture
def documented(preprocessed, tmp_path, monkeypatch):
    """Save the examples as the pages say, and return a function that makes a trainer short enough to test."""
    folder = tmp_path / "my_trainers"
    folder.mkdir()
    for page in PAGES:
        for name, source in examples(page).items():
            (folder / name).write_text(source)
    monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setenv("nnUNet_extTrainer", str(folder))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("nnunetv2.training.logging.progress_plot.draw_progress", lambda *_: None)

    def make(name):
        trainer = get_trainer_from_args(NAME, "3d_fullres", 0, name, device=torch.device("cpu"))
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 2, 1
        return trainer

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_a_documented_trainer_trains(documented, name):
    trainer = documented(name)
    trainer.run_training()
    assert np.isfinite(trainer.logger.get_value("train_losses", 0))
    if name == "nnUNetTrainerJsonLines":
        lines = [json.loads(line) for line in Path(trainer.output_folder, "figures.jsonl").read_text().splitlines()]
        assert lines[0] == {"settings": ["configuration", "dataset", "fold", "plans"]}
        assert {"train_losses", "weight_norm", "ema_fg_dice"} <= {line.get("key") for line in lines}


def test_pretrained_weights_are_loaded_and_a_frozen_encoder_stays(documented):
    first = documented("nnUNetTrainerShort")
    first.run_training()
    second = documented("nnUNetTrainerFineTune")
    second.freeze_patterns = ("encoder",)
    second.initialize()
    load_pretrained_weights(second.network, f"{first.output_folder}/checkpoint_final.pth")
    pretrained = {name: weights.clone() for name, weights in second.network.state_dict().items()}
    for name, weights in first.network.state_dict().items():
        assert torch.equal(pretrained[name], weights) or ".seg_layers." in name
    second.run_training()
    after = second.network.state_dict()
    assert all(torch.equal(after[name], weights) for name, weights in pretrained.items() if name.startswith("encoder."))
    assert any(not torch.equal(after[name], weights) for name, weights in pretrained.items() if "transpconvs" in name)


def test_documented_attributes_have_their_documented_defaults(documented):
    trainer = documented("nnUNetTrainerShort")
    assert (trainer.initial_lr, trainer.save_every) == (5e-3, 10)
    trainer_class = recursive_find_trainer_class_by_name("nnUNetTrainerNoSmoothNoMirroring250")
    assert [parent.__name__ for parent in trainer_class.__mro__[1:4]] == [
        "nnUNetTrainerDiceCELoss_noSmooth",
        "nnUNetTrainerNoMirroring",
        "nnUNetTrainer_250epochs",
    ]


def test_trainers_of_the_last_table_exist():
    text = (DOCUMENTATION / "extending-nnunet.md").read_text().split("## Trainers that come with the package")[1]
    for name in re.findall(r"`(nnUNetTrainer\w+)`", text):
        assert recursive_find_trainer_class_by_name(name).__name__ == name
