"""Trainers with the Dice alone as loss, and with a Dice that is not smoothed."""

from __future__ import annotations

import torch
from torch import nn

from nnunetv2.training.loss.default_loss import build_default_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.training.loss.ignored_voxels import WithoutIgnoredVoxels
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.helpers import softmax_helper_dim1


class nnUNetTrainerDiceLoss(nnUNetTrainer):
    """Train with the Dice of all labels but the background, or of all regions."""

    def _build_loss(self) -> nn.Module:
        """Return the soft Dice of all voxels that count."""
        labels = self.label_manager
        loss: nn.Module = MemoryEfficientSoftDiceLoss(
            apply_nonlin=torch.sigmoid if labels.has_regions else softmax_helper_dim1,
            batch_dice=self.configuration_manager.batch_dice,
            do_bg=labels.has_regions,
            smooth=1e-5,
            ddp=self.is_ddp,
        )
        if labels.has_ignore_label:
            loss = WithoutIgnoredVoxels(loss, None if labels.has_regions else labels.ignore_label)
        return self._over_all_outputs(loss)


class nnUNetTrainerDiceCELoss_noSmooth(nnUNetTrainer):
    """Train with the default loss, without smoothing the Dice."""

    def _build_loss(self) -> nn.Module:
        """Return Dice plus cross entropy, not compiled."""
        return self._over_all_outputs(
            build_default_loss(
                self.label_manager, batch_dice=self.configuration_manager.batch_dice, ddp=self.is_ddp, smooth=0
            )
        )
