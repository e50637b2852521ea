"""Choose the loss of a training from its labels and its configuration."""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper, deep_supervision_weights
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

if TYPE_CHECKING:
    from nnunetv2.utilities.label_handling.label_handling import LabelManager
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager


def build_default_loss(
    label_manager: LabelManager,
    configuration_manager: ConfigurationManager,
    *,
    deep_supervision_scales: Sequence[Sequence[float]] | None,
    is_ddp: bool,
    compile_dice: bool,
) -> nn.Module:
    """Build Dice plus (binary) cross entropy for labels (regions), wrapped for deep supervision.

    Args:
        deep_supervision_scales: One entry per output of the network; None without deep supervision.
        is_ddp: Several processes train together; their Dice statistics are summed if the Dice is per batch.
        compile_dice: Compile the Dice term. The trainer does so exactly when it compiles the network.
    """
    dice = {"batch_dice": configuration_manager.batch_dice, "smooth": 1e-5, "ddp": is_ddp}
    if label_manager.has_regions:
        loss: nn.Module = DC_and_BCE_loss(
            {}, {**dice, "do_bg": True}, use_ignore_label=label_manager.has_ignore_label,
            dice_class=MemoryEfficientSoftDiceLoss,
        )
    else:
        loss = DC_and_CE_loss(
            {**dice, "do_bg": False}, {}, ignore_label=label_manager.ignore_label,
            dice_class=MemoryEfficientSoftDiceLoss,
        )
    if compile_dice:
        loss.dc = torch.compile(loss.dc)
    if deep_supervision_scales is None:
        return loss
    weights = deep_supervision_weights(len(deep_supervision_scales), keep_last_tiny=is_ddp and not compile_dice)
    return DeepSupervisionWrapper(loss, weights)
