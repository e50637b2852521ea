"""What sites do beside plain averaging, as the operator wants it: a killed site ends as an undisturbed one does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_federation import in_threads, wait_until
from federated_sites import run_of, weights_of

from nnunetv2.training.nnUNetTrainer.variants.federated.nnUNetTrainerFedAvg import nnUNetTrainerAsymFedAvg

pytestmark = pytest.mark.slow


class Killed(BaseException):
    pass


class Batches:
    """Endless batches, each made of the site's seed and its number alone: sites are threads of one process."""

    def __init__(self, trainer, kind: int, per_epoch: int):
        self.trainer, self.kind, self.number = trainer, kind, trainer.current_epoch * per_epoch

    def __iter__(self):
        return self

    def __next__(self):
        rng = np.random.default_rng([ord(self.trainer.credential.site), self.kind, self.number])
        self.number += 1
        shape = (self.trainer.batch_size, 1, *self.trainer.configuration_manager.patch_size)
        labels = rng.integers(0, 3, shape).astype(np.int16)
        shift = ord(self.trainer.credential.site) % 3
        data = (labels * (1 + shift) + rng.normal(shift, 0.5, shape)).astype(np.float32)
        return {"data": torch.from_numpy(data), "target": [torch.from_numpy(labels)], "keys": []}


class Seeded(nnUNetTrainerAsymFedAvg):
    """A trainer whose batches do not depend on other threads; it dies in the middle of an epoch."""

    dies_in_epoch = None

    def get_dataloaders(self):
        return (Batches(self, 0, self.num_iterations_per_epoch), Batches(self, 1, self.num_val_iterations_per_epoch))

    def train_step(self, batch):
        result = super().train_step(batch)
        if self.current_epoch == self.dies_in_epoch:
            raise Killed
        return result


Seeded.__name__ = "nnUNetTrainerAsymFedAvg"


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


def assert_same(one, other, name="checkpoint_final.pth"):
    for site in "AB":
        expected, found = weights_of(one[site], name), weights_of(other[site], name)
        for tensor, values in expected.items():
            np.testing.assert_array_equal(values, found[tensor], err_msg=f"{site} {tensor}")


def apart(one, other) -> float:
    """Return how far the models of two trainings are apart."""
    ours, theirs = weights_of(one["A"]), weights_of(other["A"])
    return float(np.sqrt(sum(((ours[name] - theirs[name]) ** 2).sum() for name in ours)))


@pytest.fixture
def plain(make_sites):
    return train(make_sites, "plain")


def test_proximal_trainings_are_the_same_after_a_kill_and_stay_near(make_sites, plain):
    undisturbed = train(make_sites, "undisturbed", proximal=5.0)
    assert_same(undisturbed, train(make_sites, "killed", proximal=5.0, dies_in_epoch=1))
    assert apart(undisturbed, plain) > 1e-4
    norms = [
        np.mean([site["change_norm"] for record in one["records"] for site in record["sites"].values()])
        for one in (undisturbed, plain)
    ]
    assert norms[0] < norms[1]  # updates stay nearer to what their rounds began with
    assert {record["settings"]["proximal"] for record in undisturbed["records"]} == {5.0}
    assert all("proximal" not in record["settings"] for record in plain["records"])
    assert any("Proximal term of strength 5" in line for line in undisturbed["B"].lines)
