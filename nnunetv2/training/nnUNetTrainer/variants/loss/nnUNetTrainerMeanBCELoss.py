"""A trainer for regions with an ignore label and the usual weights of losses.

Those that both losses have without such a label.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainerMeanBCELoss(nnUNetTrainer):
    """Average the binary cross entropy over regions also where an ignore label is used.

    By default it is then their sum, as it always was, so that trainings compare: with many regions it outweighs the
    Dice.
    """

    def _build_loss(self) -> nn.Module:
        """Return the default loss with this average."""
        assert self.label_manager.has_regions, "nnUNetTrainerMeanBCELoss is for regions; this dataset has labels"
        loss: Any = super()._build_loss()
        (loss.loss if self.enable_deep_supervision else loss).average_over_channels = True
        return loss
