"""Sites whose trainings are the same bits each time, and one that dies: all are threads of one process."""

from __future__ import annotations

import numpy as np
import torch
from federated_sites import weights_of

from nnunetv2.training.nnUNetTrainer.variants.federated.nnUNetTrainerFedAvg import nnUNetTrainerAsymFedAvg


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
        data = self.trainer.picture(labels, rng).astype(np.float32)
        target = torch.from_numpy(self.trainer.annotate(labels))
        return {"data": torch.from_numpy(data), "target": [target], "keys": []}


class Seeded(nnUNetTrainerAsymFedAvg):
    """A trainer whose batches do not depend on other threads; it dies in the middle of an epoch."""

    dies_in_epoch = None

    def picture(self, labels, rng):
        """Return an image of these labels; each site's scans look otherwise."""
        shift = ord(self.credential.site) % 3
        return labels * (1 + shift) + rng.normal(shift, 0.5, labels.shape)

    def annotate(self, labels):
        """Return what the site annotates of these labels."""
        return labels

    def get_dataloaders(self):
        return (Batches(self, 0, self.num_iterations_per_epoch), Batches(self, 1, self.num_val_iterations_per_epoch))

    def train_step(self, batch):
        result = super().train_step(batch)
        if self.current_epoch == self.dies_in_epoch:
            raise Killed
        return result


Seeded.__name__ = "nnUNetTrainerAsymFedAvg"


def assert_same(one, other, name="checkpoint_final.pth"):
    for site in "AB":
        expected, found = weights_of(one[site], name), weights_of(other[site], name)
        for tensor, values in expected.items():
            np.testing.assert_array_equal(values, found[tensor], err_msg=f"{site} {tensor}")
