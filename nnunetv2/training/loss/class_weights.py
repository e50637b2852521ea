"""Give classes weights in the cross entropy of a loss that is built already."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def weigh_classes_(loss: nn.Module, weights: Sequence[float], *, dims: int, device: torch.device) -> int:
    """Set the class weights of every cross entropy in a loss, not of the Dice.

    Args:
        loss: Changed in place.
        weights: One per output of the network. Voxels of a label, or the terms of a region, count that much.
        dims: Spatial axes of the network's output.

    Returns:
        The number of cross entropies that there are.
    """
    per_class = torch.tensor(weights, dtype=torch.float32, device=device)
    found = 0
    for module in loss.modules():
        if isinstance(module, nn.CrossEntropyLoss):
            module.weight = per_class
            found += 1
        elif isinstance(module, nn.BCEWithLogitsLoss):
            module.weight = per_class.reshape(-1, *[1] * dims)
            found += 1
    return found
