"""The default trainer with differential privacy for each patient, without a federation."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.privacy.private_training import PrivateTraining


class nnUNetTrainerDP(PrivateTraining, nnUNetTrainer):
    """Train alone, with differential privacy for each patient."""
