"""Add up the weighted logits of overlapping tiles, in the precision that the memory allows.

The original adds in float16: at the corners of an image, where only the rim of one tile reaches, weights are smaller
than float16 can tell apart, and logits are rounded to whole numbers. Here tiles are added in float32 wherever the
memory suffices, and where it does not, in float16 with weights that float16 can hold.

| memory in bytes | float32, a window of the volume    | float16, in place            |
|-----------------|------------------------------------|------------------------------|
| result          | 2 * classes * voxels               | 2 * classes * voxels         |
| besides         | 4 * (classes + 1) * window voxels  | 4 * voxels                   |
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from math import prod

import torch

from nnunetv2.inference.errors import NonFiniteLogitsError
from nnunetv2.inference.forward_budget import free_bytes
from nnunetv2.inference.tile_geometry import Slicer, extent, shifted

logger = logging.getLogger(__name__)

# The network's own memory and the next image's share the device with the sums.
_SHARE_OF_FREE_MEMORY = 0.6
# The smallest weight in float16, as a fraction of the largest: a logit of 0.1 times this keeps eight bits.
_SMALLEST_HALF_WEIGHT = 2.0**-10


class WindowedSums:
    """The weighted mean of overlapping tiles, summed in float32 and kept in float16.

    Tiles arrive ordered along the first spatial axis, so a plane is final once a tile starts behind it. Sums are kept
    only for the planes that tiles can still reach.

               finished, float16          sums and weights, float32
        |----------------------------|--------- window ---------|       not reached yet
        0                          first                  first + window
    """

    def __init__(self, classes: int, spatial: Sequence[int], window: int, device: torch.device) -> None:
        window = min(window, spatial[0])
        self._logits = torch.zeros((classes, *spatial), dtype=torch.float16, device=device)
        self._sums = torch.zeros((classes, window, *spatial[1:]), device=device)
        self._weights = torch.zeros((window, *spatial[1:]), device=device)
        self._first = 0

    @staticmethod
    def num_bytes(classes: int, spatial: Sequence[int], window: int) -> int:
        """Return the memory that sums of this size take."""
        return 2 * classes * prod(spatial) + 4 * (classes + 1) * min(window, spatial[0]) * prod(spatial[1:])

    @property
    def device(self) -> torch.device:
        """Where sums and results are."""
        return self._logits.device

    def add(self, tile: torch.Tensor, slicer: Slicer, weight: torch.Tensor | float) -> None:
        """Add the logits `(classes, *tile)` of one tile; `weight` has the tile's spatial shape."""
        first, _ = extent(slicer[1], self._logits.shape[1])
        self._finish_before(first)
        place = shifted(slicer[1:], self._first)
        tile = tile.to(self.device)
        if isinstance(weight, torch.Tensor):
            weight = weight.to(self.device)
            self._sums[(slice(None), *place)].addcmul_(tile, weight)
        else:
            self._sums[(slice(None), *place)].add_(tile, alpha=weight)
        self._weights[place] += weight

    def finish(self) -> torch.Tensor:
        """Return the blended logits `(classes, *spatial)`, float16. Voxels that no tile covered are 0."""
        self._finish_before(self._logits.shape[1])
        return self._logits

    def move_to_(self, device: torch.device) -> None:
        """Go on collecting on another device."""
        self._logits, self._sums, self._weights = (
            tensor.to(device) for tensor in (self._logits, self._sums, self._weights)
        )

    def _finish_before(self, plane: int) -> None:
        window = self._weights.shape[0]
        done = min(plane - self._first, window)
        if done > 0:
            part = self._logits[:, self._first : self._first + done]
            part.copy_(self._sums[:, :done].div_(_never_zero(self._weights[:done])))
            _require_finite(part)
            self._shift(done, window)
        self._first = max(self._first, plane)

    def _shift(self, done: int, window: int) -> None:
        for planes in (self._weights, *self._sums):  # class by class, so that no copy of all sums is needed
            planes[: window - done] = planes[done:].clone()
            planes[window - done :] = 0


class HalfSums:
    """The weighted mean of overlapping tiles, summed in float16 where the result will be."""

    def __init__(self, classes: int, spatial: Sequence[int], device: torch.device) -> None:
        self._logits = torch.zeros((classes, *spatial), dtype=torch.float16, device=device)
        self._weights = torch.zeros(tuple(spatial), device=device)

    @property
    def device(self) -> torch.device:
        """Where sums and results are."""
        return self._logits.device

    def add(self, tile: torch.Tensor, slicer: Slicer, weight: torch.Tensor | float) -> None:
        """Add the logits `(classes, *tile)` of one tile; `weight` has the tile's spatial shape."""
        if isinstance(weight, torch.Tensor):
            weight = (weight / weight.max()).clamp(min=_SMALLEST_HALF_WEIGHT).to(self.device)
        self._logits[slicer] += tile.to(self.device).float().mul(weight).half()
        self._weights[slicer[1:]] += weight

    def finish(self) -> torch.Tensor:
        """Return the blended logits `(classes, *spatial)`, float16. Voxels that no tile covered are 0."""
        weights = _never_zero(self._weights)
        for channel in self._logits:  # one class at a time is in float32
            channel.copy_(channel.float().div_(weights))
        _require_finite(self._logits)
        return self._logits

    def move_to_(self, device: torch.device) -> None:
        """Go on collecting on another device."""
        self._logits, self._weights = self._logits.to(device), self._weights.to(device)


def allocate_sums(classes: int, spatial: Sequence[int], window: int, device: torch.device) -> WindowedSums | HalfSums:
    """Allocate sums in float32 if the free memory of the device suffices, else in float16.

    Args:
        window: How many planes along the first axis tiles can reach at a time.
    """
    wanted, free = WindowedSums.num_bytes(classes, spatial, window), free_bytes(device)
    if wanted <= _SHARE_OF_FREE_MEMORY * free:
        return WindowedSums(classes, spatial, window, device)
    logger.warning(
        "sums in float32 would take %.1f GB of the %.1f GB free on %s: adding tiles in float16",
        wanted / 1e9,
        free / 1e9,
        device,
    )
    return HalfSums(classes, spatial, device)


def _never_zero(weights: torch.Tensor) -> torch.Tensor:
    """Make weights safe to divide by; voxels that no tile covered have sum 0."""
    return weights.clamp(min=torch.finfo(torch.float32).tiny)


def _require_finite(logits: torch.Tensor) -> None:
    if not torch.isfinite(logits).all():
        raise NonFiniteLogitsError
