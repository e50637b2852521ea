"""The arithmetic of one step: move a batch, update the weights, count hits and misses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from nnunetv2.training.step_results import PendingArray, as_result
from nnunetv2.utilities.device import to_fast_memory_format_

if TYPE_CHECKING:
    from nnunetv2.plans.label_manager import LabelManager

TensorOrList = torch.Tensor | list[torch.Tensor]

MAX_GRADIENT_NORM = 12
"""The norm to which nnU-Net has always clipped the gradient."""


def move_batch(batch: dict, device: torch.device) -> tuple[torch.Tensor, TensorOrList]:
    """Return data and target of a batch on the device.

    The target has an entry per resolution or is one tensor.
    """
    data, target = batch["data"], batch["target"]
    data = to_fast_memory_format_(data.to(device, non_blocking=True), device)
    if isinstance(target, (list, tuple)):
        return data, [entry.to(device, non_blocking=True) for entry in target]
    return data, target.to(device, non_blocking=True)


def as_loss_input(output: TensorOrList) -> TensorOrList:
    """Return outputs of a network on the CPU in float32.

    Bfloat16 is too coarse for the logarithms of the loss.

    On CUDA, autocast runs these operations in float32 by itself.
    """
    if isinstance(output, (list, tuple)):
        return [as_loss_input(entry) for entry in output]
    return output.float() if output.device.type == "cpu" else output


def update_weights_(
    loss: torch.Tensor,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    grad_scaler: torch.amp.GradScaler | None,
    max_norm: float = MAX_GRADIENT_NORM,
) -> None:
    """Go one step down the gradient of the loss, with its norm clipped."""
    if grad_scaler is None:
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), max_norm)
        optimizer.step()
        return
    grad_scaler.scale(loss).backward()
    grad_scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(network.parameters(), max_norm)
    grad_scaler.step(optimizer)
    grad_scaler.update()


def count_hits(
    output: torch.Tensor, target: torch.Tensor, label_manager: LabelManager
) -> tuple[np.ndarray | PendingArray, ...]:
    """Count voxels of hard predictions over a batch, without voxels to be ignored.

    Args:
        output: Logits `(b, c, *spatial)`.
        target: Labels `(b, 1, *spatial)`; for regions a map each `(b, regions [+ ignored], *spatial)`.

    Returns:
        True positives, false positives and false negatives per foreground class or region, float64. On a GPU they are
        arrays that wait for it when they are looked at.
    """
    if label_manager.has_regions:
        counts = _count_region_hits(output, target, label_manager.has_ignore_label)
    else:
        counts = _count_label_hits(output, target, label_manager.ignore_label)
    return tuple(as_result((count if count.is_cuda else count.cpu()).double()) for count in counts)


def dice_from_counts(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray) -> list[np.float32]:
    """Return a Dice per class, NaN for a class that is neither predicted nor there."""
    occupied = 2 * tp + fp + fn
    dice = np.divide(2 * tp, occupied, out=np.full(len(tp), np.nan), where=occupied > 0)
    return list(dice.astype(np.float32))


def mean_of_known(values: Sequence[Any]) -> float:
    """Return the mean of the values that are not NaN; NaN if there are none."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _count_label_hits(output: torch.Tensor, target: torch.Tensor, ignore_label: int | None) -> tuple[torch.Tensor, ...]:
    num_classes = output.shape[1]
    predicted, wanted = output.argmax(1).flatten(), target[:, 0].long().flatten()
    # One pass over the voxels gives the confusion matrix, rows: wanted, columns: predicted. One entry more takes those
    # to be ignored.
    index = wanted * num_classes + predicted
    if ignore_label is not None:
        index = torch.where(wanted == ignore_label, num_classes**2, index)
    confusion = _histogram(index, num_classes**2 + 1)[:-1].reshape(num_classes, num_classes)
    tp = confusion.diagonal()
    return tp[1:], (confusion.sum(0) - tp)[1:], (confusion.sum(1) - tp)[1:]


def _histogram(index: torch.Tensor, length: int) -> torch.Tensor:
    """Count how often each number below `length` occurs."""
    if not index.is_cuda:
        return torch.bincount(index, minlength=length)
    # On a GPU bincount would make the program wait, to look for the largest number.
    return torch.zeros(length, dtype=torch.int64, device=index.device).scatter_add_(0, index, torch.ones_like(index))


def _count_region_hits(output: torch.Tensor, target: torch.Tensor, has_ignore_label: bool) -> tuple[torch.Tensor, ...]:
    predicted, wanted = output > 0, target.bool()  # sigmoid(0) = 0.5
    if has_ignore_label:
        known = ~wanted[:, -1:]
        predicted, wanted = predicted & known, wanted[:, :-1] & known
    axes = [axis for axis in range(output.ndim) if axis != 1]
    return (predicted & wanted).sum(axes), (predicted & ~wanted).sum(axes), (~predicted & wanted).sum(axes)
