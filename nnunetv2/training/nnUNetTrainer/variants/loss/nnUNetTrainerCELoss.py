"""Trainers with the cross entropy alone as loss."""

from __future__ import annotations

from torch import nn

from nnunetv2.training.loss.default_loss import require_ignore_index
from nnunetv2.training.loss.robust_ce_loss import RobustCrossEntropyLoss
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.settings import with_settings


class nnUNetTrainerCELoss(nnUNetTrainer):
    """Train with cross entropy; for labels, not for regions."""

    def _build_loss(self) -> nn.Module:
        """Return the cross entropy of all voxels with a label."""
        ignore_index = require_ignore_index(self.label_manager)
        return self._over_all_outputs(RobustCrossEntropyLoss(weight=None, ignore_index=ignore_index))


@with_settings(num_epochs=5)
class nnUNetTrainerCELoss_5epochs(nnUNetTrainerCELoss):
    """Train for 5 epochs with cross entropy."""
