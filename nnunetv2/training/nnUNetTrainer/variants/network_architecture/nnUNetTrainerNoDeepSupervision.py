"""A trainer whose network has a single output."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.settings import with_settings


@with_settings(enable_deep_supervision=False)
class nnUNetTrainerNoDeepSupervision(nnUNetTrainer):
    """Compute the loss at full resolution only."""
