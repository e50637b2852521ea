"""A trainer whose network has a single output."""
from __future__ import annotations

import torch

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import CUDA, nnUNetTrainer


class nnUNetTrainerNoDeepSupervision(nnUNetTrainer):
    """Compute the loss at full resolution only."""

    def __init__(self, plans: dict, configuration: str, fold: int | str, dataset_json: dict,
                 device: torch.device = CUDA):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False
