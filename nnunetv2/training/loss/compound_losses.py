"""Add a soft Dice loss to a cross entropy, without ignored voxels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss, SoftDiceLoss
from nnunetv2.training.loss.ignored_voxels import hide_label, split_off_last_region
from nnunetv2.training.loss.robust_ce_loss import RobustCrossEntropyLoss, TopKLoss
from nnunetv2.utilities.helpers import softmax_helper_dim1


class _LabelMapLoss(nn.Module):
    """Weigh a cross entropy `ce` and a Dice loss `dc` against one label map. A term of weight 0 is not computed."""

    def __init__(
        self, ce: nn.Module, dc: nn.Module, weight_ce: float, weight_dice: float, ignore_label: int | None
    ) -> None:
        super().__init__()
        self.ce = ce
        self.dc = dc
        self.weight_ce = weight_ce
        self.weight_dice = weight_dice
        self.ignore_label = ignore_label

    def forward(self, net_output: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits `(b, c, *spatial)` against a label map `(b, 1, *spatial)`, a scalar."""
        if target.shape[1] != 1:
            raise ValueError(f"expected a label map of 1 channel, got {target.shape[1]} (regions need DC_and_BCE_loss)")
        mask, dice_target = None, target
        if self.ignore_label is not None:
            dice_target, mask = hide_label(target, self.ignore_label)
        loss: Any = 0
        if self.weight_dice != 0:
            loss = loss + self.weight_dice * self.dc(net_output, dice_target, loss_mask=mask)
        if self.weight_ce != 0:
            ce = self.ce(net_output, self._cross_entropy_target(target))
            # Without any voxel the mean is NaN. Chosen on the device: asking for `mask.any()` would wait for the GPU.
            loss = loss + self.weight_ce * (ce if mask is None else torch.where(mask.any(), ce, 0.0))
        return loss

    def _cross_entropy_target(self, target: Tensor) -> Tensor:
        return target[:, 0]


def _with_ignore_index(ce_kwargs: Mapping[str, Any], ignore_label: int | None) -> dict[str, Any]:
    """Tell the cross entropy about the ignore label without touching the caller's dict."""
    return dict(ce_kwargs) if ignore_label is None else {**ce_kwargs, "ignore_index": ignore_label}


class DC_and_CE_loss(_LabelMapLoss):
    """Softmax Dice plus cross entropy, the default for label maps."""

    def __init__(
        self,
        soft_dice_kwargs: Mapping[str, Any],
        ce_kwargs: Mapping[str, Any],
        weight_ce: float = 1,
        weight_dice: float = 1,
        ignore_label: int | None = None,
        dice_class: type[nn.Module] = SoftDiceLoss,
    ) -> None:
        super().__init__(
            RobustCrossEntropyLoss(**_with_ignore_index(ce_kwargs, ignore_label)),
            dice_class(apply_nonlin=softmax_helper_dim1, **soft_dice_kwargs),
            weight_ce,
            weight_dice,
            ignore_label,
        )


class DC_and_topk_loss(_LabelMapLoss):
    """Softmax Dice plus the cross entropy of the hardest voxels."""

    def __init__(
        self,
        soft_dice_kwargs: Mapping[str, Any],
        ce_kwargs: Mapping[str, Any],
        weight_ce: float = 1,
        weight_dice: float = 1,
        ignore_label: int | None = None,
    ) -> None:
        super().__init__(
            TopKLoss(**_with_ignore_index(ce_kwargs, ignore_label)),
            SoftDiceLoss(apply_nonlin=softmax_helper_dim1, **soft_dice_kwargs),
            weight_ce,
            weight_dice,
            ignore_label,
        )

    def _cross_entropy_target(self, target: Tensor) -> Tensor:
        return target  # with its channel axis, which a replacement for `ce` may rely on


class DC_and_BCE_loss(nn.Module):
    """Sigmoid Dice plus binary cross entropy, the default for regions, which may overlap.

    Args:
        use_ignore_label: The last channel of the target marks the voxels that do not count.
        average_over_channels: With an ignore label, average the binary cross entropy over channels too. By default
            it is their sum, as it has been in nnU-Net, so that the losses of old and new trainings compare.
    """

    def __init__(
        self,
        bce_kwargs: Mapping[str, Any],
        soft_dice_kwargs: Mapping[str, Any],
        weight_ce: float = 1,
        weight_dice: float = 1,
        use_ignore_label: bool = False,
        dice_class: type[nn.Module] = MemoryEfficientSoftDiceLoss,
        *,
        average_over_channels: bool = False,
    ) -> None:
        super().__init__()
        self.weight_ce = weight_ce
        self.weight_dice = weight_dice
        self.use_ignore_label = use_ignore_label
        self.average_over_channels = average_over_channels
        self.ce = nn.BCEWithLogitsLoss(**{**bce_kwargs, "reduction": "none"} if use_ignore_label else bce_kwargs)
        self.dc = dice_class(apply_nonlin=torch.sigmoid, **soft_dice_kwargs)

    def forward(self, net_output: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits `(b, regions, *spatial)`, a scalar.

        The target is `(b, regions (+1 ignore), *spatial)`.
        """
        mask = None
        if self.use_ignore_label:
            target, mask = split_off_last_region(target)
        bce = self.ce(net_output, target.float())
        if mask is not None:
            bce = self._mean_where_counted(bce, mask)
        return self.weight_ce * bce + self.weight_dice * self.dc(net_output, target, loss_mask=mask)

    def _mean_where_counted(self, bce: Tensor, mask: Tensor) -> Tensor:
        mean = (bce * mask).sum() / mask.sum().clamp(min=1e-8)
        return mean / bce.shape[1] if self.average_over_channels else mean
