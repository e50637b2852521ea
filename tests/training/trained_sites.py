"""Trainings of two sites in threads of a test, in every way that an operator may choose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from fake_federation import in_threads, wait_until
from federated_sites import run_of
from seeded_sites import Killed, Seeded

from nnunetv2.federated.coordinator.models.checkpoint_reader import write_weights
from nnunetv2.federated.protocol.document import file_digest

FINETUNED = "checkpoint_finetuned.pth"
HEADS = ".seg_layers."


def train(make_sites, folder: str, *, dies_in_epoch=None, **settings) -> dict:
    """Train at A and B, and return the trainers; B dies once, where that is wanted, and goes on with --c."""
    sites = make_sites(folder=folder, **settings)
    trainers = {}
    for number, site in enumerate("AB"):
        torch.manual_seed(number)
        trainers[site] = sites.trainer(site, Seeded)
    trainers["B"].dies_in_epoch = dies_in_epoch

    def train_b():
        try:
            trainers["B"].run_training()
        except Killed:
            wait_until(lambda: not trainers["B"]._writer._thread)
            trainers["B"] = sites.trainer("B", Seeded, go_on=True)
            trainers["B"].run_training()

    assert in_threads(trainers["A"].run_training, train_b) == [None, None]
    trainers["records"] = sites.federation.state.store.load_rounds(run_of(trainers["A"]))
    trainers["folder"] = sites.federation.state.store.folder
    return trainers


def found_with_weights(folder: Path, source) -> dict:
    """Return settings of a federation that starts from the weights of a trainer, and put these where it looks."""
    folder.mkdir(parents=True)
    checkpoint = folder / "weights.pth"
    torch.save({"network_weights": source.network.state_dict(), "current_epoch": np.float64(3)}, checkpoint)
    digest = file_digest(checkpoint)
    target = folder / "federation" / "given" / f"{digest}.safetensors"
    target.parent.mkdir(parents=True)
    write_weights(checkpoint, target)
    return {"initial_weights": digest}
