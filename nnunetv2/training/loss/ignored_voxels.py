"""Split a target into labels to predict and a mask of voxels."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def hide_label(target: Tensor, ignore_label: int) -> tuple[Tensor, Tensor]:
    """Replace the ignore label by 0, and return the mask of other voxels (bool)."""
    mask = target != ignore_label
    return torch.where(mask, target, 0), mask


def split_off_last_region(target: Tensor) -> tuple[Tensor, Tensor]:
    """Split `(b, regions, *spatial)` into regions and the mask of voxels that count.

    The last region marks those that are ignored.
    """
    ignored = target[:, -1:]
    return target[:, :-1], ~ignored if ignored.dtype == torch.bool else 1 - ignored


class WithoutIgnoredVoxels(nn.Module):
    """Leave ignored voxels out of a loss that takes `loss_mask`, such as the Dice losses.

    Args:
        loss: Called as `loss(output, target, loss_mask=mask)`.
        ignore_label: The label to ignore; None if the last region of the target marks the voxels to ignore.
    """

    def __init__(self, loss: nn.Module, ignore_label: int | None) -> None:
        super().__init__()
        self.loss = loss
        self.ignore_label = ignore_label

    def forward(self, net_output: Tensor, target: Tensor) -> Tensor:
        """Return the loss of the voxels that count, a scalar."""
        if self.ignore_label is None:
            target, mask = split_off_last_region(target)
        else:
            target, mask = hide_label(target, self.ignore_label)
        return self.loss(net_output, target, loss_mask=mask)
