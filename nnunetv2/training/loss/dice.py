"""Compute soft Dice losses, and counts of hits and misses.

Outputs are `(b, c, *spatial)`. Targets are label maps `(b, 1, *spatial)` or `(b, *spatial)`, or one-hot with the
shape of the output. A mask is `(b, 1, *spatial)` and 1 (or True) where a voxel counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from nnunetv2.utilities.ddp_allgather import AllGatherGrad

SMALLEST_DENOMINATOR = 1e-8


def _one_hot_like(target: Tensor, output: Tensor) -> Tensor:
    """Return the target as one-hot float32 with the shape of `output`; a target of that shape is one-hot already."""
    if target.shape == output.shape:
        return target.to(torch.float32)
    if target.ndim == output.ndim - 1:
        target = target.unsqueeze(1)
    if target.ndim != output.ndim or target.shape[1] != 1 or target.shape[2:] != output.shape[2:]:
        raise ValueError(
            f"target of shape {tuple(target.shape)} does not fit an output of shape {tuple(output.shape)}: "
            f"expected a label map (b, 1, *spatial) or one channel per output channel"
        )
    one_hot = torch.zeros(output.shape, dtype=torch.float32, device=output.device)
    return one_hot.scatter_(1, target.long(), 1.0)


def _probabilities(logits: Tensor, nonlinearity: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Apply the nonlinearity in float32 where autocast would not do so: on a CPU it leaves softmax in bfloat16."""
    if nonlinearity is None:
        return logits
    is_half_on_cpu = logits.device.type == "cpu" and logits.dtype in (torch.bfloat16, torch.float16)
    return nonlinearity(logits.float() if is_half_on_cpu else logits)


def get_tp_fp_fn_tn(
    net_output: Tensor, gt: Tensor, axes: Sequence[int] | None = None, mask: Tensor | None = None, square: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Count TP, FP, FN and TN, softly if the output is soft.

    Args:
        net_output: `(b, c, *spatial)`, probabilities or a one-hot prediction.
        gt: Label map or one-hot.
        axes: Axes that are summed over; all spatial ones if None, none if empty.
        mask: `(b, 1, *spatial)`, weights of the voxels.
        square: Square each voxel's entry before summing.

    Returns:
        Four float32 tensors with the axes that were not summed over.
    """
    wanted = _one_hot_like(gt, net_output)
    with_output, without_output = net_output, 1 - net_output
    not_wanted = 1 - wanted
    products = (with_output * wanted, with_output * not_wanted, without_output * wanted, without_output * not_wanted)
    axes = tuple(range(2, net_output.ndim)) if axes is None else tuple(axes)
    tp, fp, fn, tn = (_sum_voxels(product, axes, mask, square) for product in products)
    return tp, fp, fn, tn


def _sum_voxels(entries: Tensor, axes: tuple[int, ...], mask: Tensor | None, square: bool) -> Tensor:
    """Weight, square and sum entries of all voxels in float32."""
    if mask is not None:
        entries = entries * mask
    if square:
        entries = entries**2
    return entries.sum(axes, dtype=torch.float32) if axes else entries


def _sum_over_ranks(*statistics: Tensor) -> tuple[Tensor, ...]:
    """Add statistics of all processes; gradients flow back to each one's own part."""
    return tuple(AllGatherGrad.apply(values).sum(0) for values in statistics)


class MemoryEfficientSoftDiceLoss(nn.Module):
    """Negate the mean soft Dice, from three sums per class.

    The other implementation keeps four maps of all voxels.

    dc = (2 I + smooth) / (G + P + smooth) with the sums I of p·y, P of p and G of y. The loss is -mean(dc).
    """

    def __init__(
        self,
        apply_nonlin: Callable[[Tensor], Tensor] | None = None,
        batch_dice: bool = False,
        do_bg: bool = True,
        smooth: float = 1.0,
        ddp: bool = True,
    ) -> None:
        super().__init__()
        self.apply_nonlin = apply_nonlin
        self.batch_dice = batch_dice
        self.do_bg = do_bg
        self.smooth = smooth
        self.ddp = ddp

    def forward(self, x: Tensor, y: Tensor, loss_mask: Tensor | None = None) -> Tensor:
        """Return the loss of outputs `x` against `y`, a scalar.

        Voxels where `loss_mask` is 0 do not count.
        """
        p = _probabilities(x, self.apply_nonlin)
        first_class = 0 if self.do_bg else 1
        with torch.no_grad():
            y = _one_hot_like(y, p)[:, first_class:]
            if loss_mask is not None:
                y = y * loss_mask
            wanted = y.flatten(2).sum(2)
        p = p[:, first_class:]
        # y carries the mask already, so the intersection needs it only once
        intersection = (p * y).flatten(2).sum(2, dtype=torch.float32)
        predicted = (p if loss_mask is None else p * loss_mask).flatten(2).sum(2, dtype=torch.float32)
        if self.batch_dice:
            # Sum over the batch first: ranks may hold batches of unequal size, but must gather equal shapes.
            intersection, predicted, wanted = intersection.sum(0), predicted.sum(0), wanted.sum(0)
            if self.ddp:
                intersection, predicted, wanted = _sum_over_ranks(intersection, predicted, wanted)
        denominator = (wanted + predicted + self.smooth).clamp(min=SMALLEST_DENOMINATOR)
        return -((2 * intersection + self.smooth) / denominator).mean()


class SoftDiceLoss(nn.Module):
    """Compute the same value as `MemoryEfficientSoftDiceLoss` from true and false positives and negatives."""

    def __init__(
        self,
        apply_nonlin: Callable[[Tensor], Tensor] | None = None,
        batch_dice: bool = False,
        do_bg: bool = True,
        smooth: float = 1.0,
        ddp: bool = True,
        clip_tp: float | None = None,
    ) -> None:
        super().__init__()
        self.apply_nonlin = apply_nonlin
        self.batch_dice = batch_dice
        self.do_bg = do_bg
        self.smooth = smooth
        self.ddp = ddp
        self.clip_tp = clip_tp

    def forward(self, x: Tensor, y: Tensor, loss_mask: Tensor | None = None) -> Tensor:
        """Return the loss of outputs `x` against `y`, a scalar.

        Voxels where `loss_mask` is 0 do not count.
        """
        p = _probabilities(x, self.apply_nonlin)
        axes = [0, *range(2, p.ndim)] if self.batch_dice else list(range(2, p.ndim))
        hits, false_alarms, misses, _ = get_tp_fp_fn_tn(p, y, axes, loss_mask)
        if self.batch_dice and self.ddp:
            hits, false_alarms, misses = _sum_over_ranks(hits, false_alarms, misses)
        if self.clip_tp is not None:
            hits = hits.clamp(min=self.clip_tp)
        denominator = (2 * hits + false_alarms + misses + self.smooth).clamp(min=SMALLEST_DENOMINATOR)
        dice = (2 * hits + self.smooth) / denominator
        return -(dice if self.do_bg else dice[..., 1:]).mean()
