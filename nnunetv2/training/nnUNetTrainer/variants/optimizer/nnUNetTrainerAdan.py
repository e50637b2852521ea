"""Trainers with Adan, for which the package adan-pytorch must be installed."""

from __future__ import annotations

from typing import Any

import torch

from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.lr_scheduler.warmup import CosineAnnealingLR_offset
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.settings import with_settings


class nnUNetTrainerAdan(nnUNetTrainer):
    """Train with Adan, at the learning rate of the default trainer."""

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """Return this optimizer with the default schedule.

        Raises:
            RuntimeError: adan-pytorch is not installed.
        """
        try:
            from adan_pytorch import Adan
        except ImportError as error:
            raise RuntimeError(
                f"{type(self).__name__} needs a package that is not installed: pip install adan-pytorch"
            ) from error
        optimizer = Adan(self.network.parameters(), lr=self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)


@with_settings(initial_lr=1e-3)
class nnUNetTrainerAdan1en3(nnUNetTrainerAdan):
    """Train with Adan and a learning rate of 1e-3."""


@with_settings(initial_lr=3e-4)
class nnUNetTrainerAdan3en4(nnUNetTrainerAdan):
    """Train with Adan and a learning rate of 3e-4."""


@with_settings(initial_lr=1e-1)
class nnUNetTrainerAdan1en1(nnUNetTrainerAdan):
    """Train with Adan and a learning rate of 0.1."""


class nnUNetTrainerAdanCosAnneal(nnUNetTrainerAdan):
    """Train with Adan and cosine annealing."""

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, CosineAnnealingLR_offset]:
        """Return Adan with this schedule."""
        optimizer, _ = super().configure_optimizers()
        return optimizer, CosineAnnealingLR_offset(optimizer, T_max=self.num_epochs)
