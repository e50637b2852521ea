"""Trainers of several sites with one coordinator, all in one process: sites are threads, the network is tiny."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_federation import make_settings, outcomes_in_threads, served
from patience import PATIENCE_S
from tiny_dataset import NAME, make_dataset_json, make_plans, make_tiny_dataset

from nnunetv2.federated.coordinator.members import Member
from nnunetv2.federated.protocol import keys
from nnunetv2.federated.protocol.api import RunAction
from nnunetv2.federated.site.transports.http import HttpTransport
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.variants.federated.nnUNetTrainerFedAvg import nnUNetTrainerAsymFedAvg

OPERATOR = Member("boss", "operator")


class Sites:
    """Trainers of the sites of one federation."""

    def __init__(self, federation, folder: Path, monkeypatch) -> None:
        self.federation, self.folder, self.monkeypatch = federation, folder, monkeypatch

    def trainer(
        self,
        site: str,
        trainer_class=nnUNetTrainerAsymFedAvg,
        *,
        go_on=False,
        plans=None,
        dataset_json=None,
        **client_options,
    ):
        """Construct the trainer of a site, with folders of its own, and with plans of its own where they are given."""
        for root in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            self.monkeypatch.setenv(root, str(self.folder / site / root))
        preprocessed = self.folder / site / "nnUNet_preprocessed"
        if not preprocessed.exists():
            make_tiny_dataset(preprocessed, cases=3)
            splits = [{"train": ["case_00", "case_01"], "val": ["case_02"]}]
            (preprocessed / NAME / "splits_final.json").write_text(json.dumps(splits))
        trainer = trainer_class(
            {**(plans or make_plans()), "continue_training": go_on},
            "3d_fullres",
            0,
            dataset_json or make_dataset_json(),
            torch.device("cpu"),
        )
        trainer.credential = self.federation.credential(site)
        trainer.lines = []
        log = trainer.print_to_log_file
        trainer.print_to_log_file = lambda *words, **options: (
            trainer.lines.append(" ".join(map(str, words))),
            log(*words, **options),
        )
        options = {"pause_s": 0.05, "give_up_after_s": PATIENCE_S, **client_options}
        trainer.make_transport = lambda credential, report: HttpTransport(credential, report=report, **options)
        trainer.initialize()  # before the environment is another site's
        if go_on:
            maybe_load_checkpoint(trainer, True, False)
        return trainer

    def run(self, *trainers) -> list:
        return outcomes_in_threads(*(trainer.run_training for trainer in trainers))

    def act(self, action: str, run: str) -> None:
        self.federation.coordinator.act(run, RunAction(action=action), OPERATOR)


@pytest.fixture
def make_sites(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_cpu_autocast", "0")
    stack = []

    def make(*, folder="", **settings) -> Sites:
        """Serve a federation with these settings; several need folders of their own."""
        settings = {"num_epochs": 3, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1, **settings}
        context = served(tmp_path / folder / "federation", make_settings(**settings))
        stack.append(context)
        return Sites(context.__enter__(), tmp_path / folder, monkeypatch)

    yield make
    for context in stack:
        context.__exit__(None, None, None)


def weights_of(trainer, name="checkpoint_final.pth") -> dict[str, np.ndarray]:
    path = Path(trainer.output_folder, name)
    content = torch.load(path, weights_only=False)
    return {name: tensor.numpy() for name, tensor in content["network_weights"].items()}


def assert_equal_weights(*trainers) -> None:
    first, *others = map(weights_of, trainers)
    for other in others:
        for name, values in first.items():
            np.testing.assert_array_equal(values, other[name], err_msg=name)


def run_of(trainer) -> str:
    return keys.run_name("3d_fullres", 0, type(trainer).__name__)
