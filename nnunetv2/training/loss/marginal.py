"""Train on classes of which only some are annotated: the marginal loss.

Where a class is not annotated, its voxels are background in the labels, so background and all such classes are one
class here. With logits z, annotated classes A and others U, the loss sees

    z'_0 = log(exp z_0 + sum over U of exp z_u)        z'_a = z_a for a in A

and the labels renumbered in the same way. Softmax of z' gives the merged class the sum of the probabilities of its
members, so the loss acts on that sum only (Shi et al., Marginal loss and exclusion loss for partially supervised
multi-organ segmentation, MedIA 70:101979, 2021; Fang and Yan, IEEE TMI 39:3619, 2020).

Any loss of logits and label maps can be wrapped. One that knows the classes by their numbers says so by an attribute
`supports_partial_labels = False`, and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class PartialLabelsError(ValueError):
    """A loss cannot do without the labels of some classes."""


class MarginalLoss(nn.Module):
    """Apply a loss to the annotated classes and all others together.

    Args:
        loss: Called with outputs and targets as `forward` gets them, lists of them with deep supervision. It sees the
            merged class as class 0, and the annotated ones as 1, 2, ... in their order.
        annotated: Channels of the annotated foreground classes, ascending.
        num_outputs: Channels of the network's output, background first.
    """

    merged: Tensor
    kept: Tensor
    number_of: Tensor

    def __init__(self, loss: nn.Module, *, annotated: Sequence[int], num_outputs: int) -> None:
        super().__init__()
        self.loss = loss
        kept = sorted(annotated)
        merged = [channel for channel in range(num_outputs) if channel not in kept]
        numbers = [kept.index(channel) + 1 if channel in kept else 0 for channel in range(num_outputs)]
        for name, values in (("merged", merged), ("kept", kept), ("number_of", numbers)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.long), persistent=False)

    def forward(self, output: Any, target: Any, *further: Any) -> Tensor:
        """Return the loss of logits `(b, c, *spatial)` against label maps `(b, 1, *spatial)`.

        With deep supervision, both are lists.
        """
        return self.loss(_each(self.merge_logits, output), _each(self.renumber, target), *further)

    def merge_logits(self, logits: Tensor) -> Tensor:
        """Return logits `(b, 1 + annotated classes, *spatial)`, in single precision at least."""
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        background = torch.logsumexp(logits.index_select(1, self.merged), 1, keepdim=True)
        return torch.cat([background, logits.index_select(1, self.kept)], 1)

    def renumber(self, target: Tensor) -> Tensor:
        """Return a label map with the numbers that the loss knows.

        The ignore label, behind all classes, stays.
        """
        last = len(self.number_of) - 1
        numbers = self.number_of[target.clamp(0, last).long()].to(target.dtype)
        return torch.where(target > last, target, numbers)


def over_annotated_classes(
    loss: nn.Module, *, annotated: Sequence[int], num_outputs: int, device: torch.device
) -> nn.Module:
    """Return a loss that does without the labels of some classes.

    It is the loss itself, if all are annotated.

    Args:
        loss: Weights of classes in its cross entropies are changed in place to those of the annotated ones.
        annotated: Channels of the annotated foreground classes.
        num_outputs: Channels of the network's output, background first.

    Raises:
        PartialLabelsError: The loss says that it cannot be wrapped.
    """
    if len(set(annotated)) >= num_outputs - 1 or isinstance(loss, MarginalLoss):
        return loss
    for module in loss.modules():
        if not getattr(module, "supports_partial_labels", True):
            raise PartialLabelsError(
                f"{type(module).__name__} knows classes by their numbers, and this site does not annotate all of them: "
                "train with another loss, or annotate the missing classes"
            )
    wrapped = MarginalLoss(loss, annotated=annotated, num_outputs=num_outputs).to(device)
    for module in loss.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.CrossEntropyLoss) and isinstance(weight, Tensor) and len(weight) == num_outputs:
            module.weight = torch.cat([weight[:1], weight[wrapped.kept.to(weight.device)]])
    return wrapped


def _each(function: Any, values: Any) -> Any:
    """Apply a function to a tensor, or to each of a list."""
    return [function(value) for value in values] if isinstance(values, (list, tuple)) else function(values)
