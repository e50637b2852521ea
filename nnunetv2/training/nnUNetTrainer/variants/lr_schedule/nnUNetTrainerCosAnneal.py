"""A trainer whose learning rate falls along half a cosine."""

from __future__ import annotations

import torch

from nnunetv2.training.lr_scheduler.warmup import CosineAnnealingLR_offset
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainerCosAnneal(nnUNetTrainer):
    """Train with cosine annealing."""

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, CosineAnnealingLR_offset]:
        """Return the default optimizer with another schedule."""
        optimizer, _ = super().configure_optimizers()
        return optimizer, CosineAnnealingLR_offset(optimizer, T_max=self.num_epochs)
