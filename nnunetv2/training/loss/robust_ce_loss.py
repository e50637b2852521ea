"""Turn logits and label maps into cross entropies that take the targets our loaders make."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RobustCrossEntropyLoss(nn.CrossEntropyLoss):
    """Accept targets of any number type, with or without an axis for their single channel."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Compare logits `(b, c, *spatial)` with a label map `(b, *spatial)` or `(b, 1, *spatial)`."""
        if target.ndim == input.ndim:
            assert target.shape[1] == 1, f"a label map has one channel, this one has {target.shape[1]}"
            target = target[:, 0]
        return super().forward(input, target.long())


class TopKLoss(RobustCrossEntropyLoss):
    """Average the cross entropy over the hardest `k` percent of voxels.

    That is at least one voxel.

    Voxels with the label `ignore_index` are not counted; without any other voxel the loss is 0.
    """

    def __init__(
        self, weight: Tensor | None = None, ignore_index: int = -100, k: float = 10, label_smoothing: float = 0
    ) -> None:
        super().__init__(weight, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)
        self.k = k

    def forward(self, inp: Tensor, target: Tensor) -> Tensor:
        """Compare logits `(b, c, *spatial)` with a label map `(b, 1, *spatial)` or `(b, *spatial)`."""
        losses = super().forward(inp, target).flatten()
        # The number of counted voxels stays on the device: asking for it would wait for the GPU. Ignored voxels have
        # loss 0, so they come last.
        counted = (target != self.ignore_index).sum()
        hardest = (counted * self.k / 100).floor().clamp(min=1)
        at_most = max(1, int(losses.numel() * self.k / 100))
        largest = torch.topk(losses, at_most).values
        ranks = torch.arange(at_most, device=losses.device)
        return torch.where(ranks < hardest, largest, 0.0).sum() / hardest
