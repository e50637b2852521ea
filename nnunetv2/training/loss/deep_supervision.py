"""Add up a loss over the resolutions of a network with deep supervision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn


def deep_supervision_weights(num_scales: int, *, keep_last_tiny: bool) -> np.ndarray:
    """Halve the weight with each lower resolution, and drop the lowest.

    The weights sum to 1.

    Args:
        num_scales: Number of outputs, highest resolution first. A single one has weight 1.
        keep_last_tiny: Give the lowest resolution 1e-6 (before the division by the sum) instead of 0.
            DistributedDataParallel fails on parameters without a gradient, unless the network is compiled.

    Returns:
        `num_scales` weights, float64.
    """
    if num_scales < 1:
        raise ValueError(f"deep supervision needs at least one output, got {num_scales}")
    weights = 0.5 ** np.arange(num_scales)
    if num_scales > 1:
        weights[-1] = 1e-6 if keep_last_tiny else 0
    return weights / weights.sum()


class DeepSupervisionWrapper(nn.Module):
    """Apply `loss` to the outputs and targets of each resolution and sum the results, weighted.

    Args:
        loss: Called as `loss(output, target, ...)`, one entry of each argument of `forward` at a time.
        weight_factors: A weight per resolution; all 1 if None. A resolution of weight 0 is not computed.
    """

    def __init__(self, loss: nn.Module, weight_factors: Sequence[float] | np.ndarray | None = None) -> None:
        super().__init__()
        if weight_factors is not None:
            weight_factors = tuple(weight_factors)
            if not any(weight != 0 for weight in weight_factors):
                raise ValueError(f"at least one weight must differ from 0, got {weight_factors}")
        self.loss = loss
        self.weight_factors = weight_factors

    def forward(self, *args: Sequence[Tensor]) -> Tensor:
        """Take lists of equal order (outputs, targets, ...), highest resolution first; return the weighted sum."""
        if not all(isinstance(argument, (list, tuple)) for argument in args):
            kinds = ", ".join(type(argument).__name__ for argument in args)
            raise TypeError(f"deep supervision takes lists with one entry per resolution, got {kinds}")
        weights = self.weight_factors if self.weight_factors is not None else (1.0,) * len(args[0])
        return sum(weight * self.loss(*entries) for weight, *entries in zip(weights, *args) if weight != 0)
