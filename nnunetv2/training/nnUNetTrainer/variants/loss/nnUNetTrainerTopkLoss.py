"""Trainers whose cross entropy looks at the hardest tenth of the voxels only."""

from __future__ import annotations

from torch import nn

from nnunetv2.training.loss.compound_losses import DC_and_topk_loss
from nnunetv2.training.loss.default_loss import require_ignore_index
from nnunetv2.training.loss.robust_ce_loss import TopKLoss
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainerTopk10Loss(nnUNetTrainer):
    """Train with the cross entropy of the hardest 10 % of the voxels."""

    def _build_loss(self) -> nn.Module:
        """Return this cross entropy; for labels, not for regions."""
        return self._over_all_outputs(TopKLoss(ignore_index=require_ignore_index(self.label_manager), k=10))


class nnUNetTrainerTopk10LossLS01(nnUNetTrainer):
    """Train with the hardest voxels' cross entropy, against smoothed labels.

    The hardest 10 % of the voxels.
    """

    def _build_loss(self) -> nn.Module:
        """Return this cross entropy; a tenth of each label's weight goes to all labels alike."""
        ignore_index = require_ignore_index(self.label_manager)
        return self._over_all_outputs(TopKLoss(ignore_index=ignore_index, k=10, label_smoothing=0.1))


class nnUNetTrainerDiceTopK10Loss(nnUNetTrainer):
    """Train with Dice plus the cross entropy of the hardest 10 % of the voxels."""

    def _build_loss(self) -> nn.Module:
        """Return this sum; for labels, not for regions."""
        require_ignore_index(self.label_manager)
        return self._over_all_outputs(
            DC_and_topk_loss(
                {
                    "batch_dice": self.configuration_manager.batch_dice,
                    "smooth": 1e-5,
                    "do_bg": False,
                    "ddp": self.is_ddp,
                },
                {"k": 10, "label_smoothing": 0.0},
                weight_ce=1,
                weight_dice=1,
                ignore_label=self.label_manager.ignore_label,
            )
        )
