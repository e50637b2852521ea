"""Trainers with Adam and AdamW."""

from __future__ import annotations

import torch

from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.settings import with_settings


class nnUNetTrainerAdam(nnUNetTrainer):
    """Train with AdamW (amsgrad), at the learning rate of the default trainer."""

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        """Return this optimizer with the default schedule."""
        optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=self.initial_lr, weight_decay=self.weight_decay, amsgrad=True
        )
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)


@with_settings(initial_lr=1e-3)
class nnUNetTrainerAdam1en3(nnUNetTrainerAdam):
    """Train with AdamW and a learning rate of 1e-3."""


@with_settings(initial_lr=3e-4)
class nnUNetTrainerAdam3en4(nnUNetTrainerAdam):
    """Train with AdamW and a learning rate of 3e-4."""


class nnUNetTrainerVanillaAdam(nnUNetTrainer):
    """Train with Adam as first published, at the default learning rate."""

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        """Return this optimizer with the default schedule."""
        optimizer = torch.optim.Adam(self.network.parameters(), lr=self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)


@with_settings(initial_lr=1e-3)
class nnUNetTrainerVanillaAdam1en3(nnUNetTrainerVanillaAdam):
    """Train with Adam and a learning rate of 1e-3."""


@with_settings(initial_lr=3e-4)
class nnUNetTrainerVanillaAdam3en4(nnUNetTrainerVanillaAdam):
    """Train with Adam and a learning rate of 3e-4."""
