"""Average a network's answers over mirrored copies of its input (test-time augmentation)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from nnunetv2.inference.tile_geometry import mirror_combinations


def mirrored_mean(
    network: Callable[[torch.Tensor], torch.Tensor], tiles: torch.Tensor, axes: Sequence[int], copies_at_once: int = 1
) -> torch.Tensor:
    """Return the mean of `flip(network(flip(tiles)))` over all combinations of axes, as float32.

    Args:
        network: `(b, c, *spatial)` -> `(b, classes, *spatial)`.
        tiles: Batch `(b, c, *spatial)`.
        axes: Spatial axes, counted from 0; none means no mirroring.
        copies_at_once: How many mirrored copies of the batch enter the network together.
    """
    subsets = [tuple(axis + 2 for axis in subset) for subset in mirror_combinations(axes)]
    # The number of subsets is a power of two: with one for the copies, too, all batches have the same shape, which
    # compiled networks and cuDNN's benchmarks prefer.
    at_once = 1 << (min(copies_at_once, len(subsets)).bit_length() - 1)
    total: Any = None
    for first in range(0, len(subsets), at_once):
        group = subsets[first : first + at_once]
        answers = network(_flipped(tiles, group)).float()
        for subset, answer in zip(group, answers.split(len(tiles))):
            answer = torch.flip(answer, subset) if subset else answer
            # The first answer may be the network's own memory (or, for an identity, the input's): sum in a copy.
            total = answer.clone() if total is None else total.add_(answer)
    return total.div_(len(subsets)) if len(subsets) > 1 else total


def _flipped(tiles: torch.Tensor, subsets: Sequence[tuple[int, ...]]) -> torch.Tensor:
    copies = [torch.flip(tiles, subset) if subset else tiles for subset in subsets]
    return copies[0] if len(copies) == 1 else torch.cat(copies)
