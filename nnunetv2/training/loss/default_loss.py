"""Choose the loss of a training, and its ignored label, from labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

if TYPE_CHECKING:
    from nnunetv2.plans.label_manager import LabelManager


def build_default_loss(
    label_manager: LabelManager, *, batch_dice: bool, ddp: bool, smooth: float = 1e-5
) -> DC_and_CE_loss | DC_and_BCE_loss:
    """Build Dice plus cross entropy for a single output.

    Binary cross entropy for regions.

    Args:
        batch_dice: Compute one Dice for the whole batch instead of one per sample.
        ddp: Several processes train together: sum their Dice statistics if the Dice is per batch.
        smooth: Added to numerator and denominator of the Dice.
    """
    dice = {"batch_dice": batch_dice, "smooth": smooth, "ddp": ddp}
    if label_manager.has_regions:
        return DC_and_BCE_loss(
            {},
            {**dice, "do_bg": True},
            use_ignore_label=label_manager.has_ignore_label,
            dice_class=MemoryEfficientSoftDiceLoss,
        )
    return DC_and_CE_loss(
        {**dice, "do_bg": False}, {}, ignore_label=label_manager.ignore_label, dice_class=MemoryEfficientSoftDiceLoss
    )


def require_ignore_index(label_manager: LabelManager) -> int:
    """Return the label that a cross entropy shall ignore.

    -100, which nothing has, if there is none.

    Raises:
        AssertionError: The dataset has regions, which overlap: no voxel has one label.
    """
    assert not label_manager.has_regions, (
        "this loss compares each voxel with one label and cannot train regions; choose a trainer with a Dice loss or "
        "with the default loss"
    )
    return label_manager.ignore_label if label_manager.has_ignore_label else -100
