"""Run a network over the tiles of an image and blend the answers into one map of logits."""
from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from nnunetv2.inference.forward_budget import ForwardBudget, is_out_of_memory
from nnunetv2.inference.sliding_window_prediction import Slicer
from nnunetv2.utilities.device import to_fast_memory_format_
from nnunetv2.utilities.helpers import empty_cache

logger = logging.getLogger(__name__)


class TileAccumulator:
    """The weighted mean of overlapping tiles, summed in float32 and kept in float16.

    Tiles arrive ordered along the first spatial axis, so a plane is final once a tile starts behind it. Sums are kept
    only for the planes that tiles can still reach; that halves the memory of sums for the whole volume.

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

    @property
    def device(self) -> torch.device:
        """Where sums and results are."""
        return self._logits.device

    def add(self, tile: torch.Tensor, slicer: Slicer, weight: torch.Tensor | float) -> None:
        """Add the logits `(classes, *tile)` of one tile; `weight` has the tile's spatial shape."""
        first, _ = _extent(slicer[1], self._logits.shape[1])
        self._finish_before(first)
        place = _shifted(slicer[1:], self._first)
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
            tensor.to(device) for tensor in (self._logits, self._sums, self._weights))

    def _finish_before(self, plane: int) -> None:
        window = self._weights.shape[0]
        done = min(plane - self._first, window)
        if done > 0:
            # Uncovered voxels have sum 0 and weight 0.
            mean = self._sums[:, :done].div_(self._weights[:done].clamp(min=torch.finfo(torch.float32).tiny))
            part = self._logits[:, self._first:self._first + done]
            part.copy_(mean)
            _require_finite(part)
            self._shift(done, window)
        self._first = max(self._first, plane)

    def _shift(self, done: int, window: int) -> None:
        for planes in (self._weights, *self._sums):  # class by class, so that no copy of all sums is needed
            planes[:window - done] = planes[done:].clone()
            planes[window - done:] = 0


def predict_tiles(predict: Callable[[torch.Tensor], torch.Tensor], image: torch.Tensor, slicers: Sequence[Slicer], *,
                  classes: int, weight: torch.Tensor | float, device: torch.device, results_device: torch.device,
                  tiles_at_once: Callable[[int], int], budget: ForwardBudget,
                  advance: Callable[[int], object]) -> torch.Tensor:
    """Predict all tiles of an image and return the blended logits `(classes, *spatial)` as float16.

    When the memory of a device does not suffice, batches become smaller, then the sums move to main memory; tiles that
    are done stay done.

    Args:
        predict: Batch of tiles `(b, c, *tile)` on `device` -> logits `(b, classes, *tile)`.
        image: `(c, *spatial)`, at least as large as a tile.
        weight: Weight of a tile's voxels, see `compute_gaussian`.
        tiles_at_once: Voxels of a tile -> how many to predict together.
        advance: Called with the number of tiles that have just been done.

    Raises:
        RuntimeError: Logits are not finite, or one tile alone exceeds the memory.
    """
    spatial = image.shape[1:]
    pending = sorted(slicers, key=lambda slicer: _extent(slicer[1], spatial[0]))
    window = max((last - first for first, last in (_extent(slicer[1], spatial[0]) for slicer in pending)), default=1)
    image, accumulator = _allocate(image, lambda where: TileAccumulator(classes, spatial, window, where),
                                   results_device)
    while pending:
        tile_voxels = image[pending[0]][0].numel()
        batch = pending[:tiles_at_once(tile_voxels)]
        answers = _predict_batch(predict, image, batch, device)
        if answers is not None:
            for answer, slicer in zip(answers, batch):
                accumulator.add(answer, slicer, weight)
            del pending[:len(batch)], answers
            advance(len(batch))
        elif budget.voxels > tile_voxels:
            budget.halve()
        elif accumulator.device.type != "cpu":
            logger.warning("out of memory on %s: collecting results in main memory", device)
            accumulator.move_to_(torch.device("cpu"))
            image = image.cpu()
        else:
            raise RuntimeError(f"out of memory on {device}: it does not hold the network and one tile. Use a GPU with "
                               "more memory, or the device cpu")
    return accumulator.finish()


def _allocate(image: torch.Tensor, build: Callable[[torch.device], TileAccumulator],
              device: torch.device) -> tuple[torch.Tensor, TileAccumulator]:
    """Put the image and a new accumulator on a device, or in main memory if the device is too small for them."""
    try:
        return image.to(device), build(device)
    except RuntimeError as error:
        if device.type == "cpu" or not is_out_of_memory(error):
            raise
    logger.warning("out of memory on %s: collecting results in main memory", device)
    empty_cache(device)
    return image.cpu(), build(torch.device("cpu"))


def _predict_batch(predict: Callable[[torch.Tensor], torch.Tensor], image: torch.Tensor, batch: Sequence[Slicer],
                   device: torch.device) -> torch.Tensor | None:
    """Predict tiles together; None if the device's memory did not suffice."""
    try:
        tiles = torch.stack([image[slicer] for slicer in batch]).to(device)
        return predict(to_fast_memory_format_(tiles, device))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Only here, with the traceback gone, is the memory of the failed attempt free.
    empty_cache(device)
    return None


def _extent(index: slice | int, length: int) -> tuple[int, int]:
    """Return the half-open range that an index selects of an axis."""
    if isinstance(index, slice):
        first, last, _ = index.indices(length)
        return first, last
    return int(index), int(index) + 1


def _shifted(place: Slicer, first: int) -> Slicer:
    """Return the place of a tile within sums that begin at plane `first`."""
    along, *across = place
    along = slice(along.start - first, along.stop - first) if isinstance(along, slice) else along - first
    return (along, *across)


def _require_finite(logits: torch.Tensor) -> None:
    if not torch.isfinite(logits).all():
        raise RuntimeError("the network's logits are not finite, or beyond the range of float16 (65504). Check the "
                           "image for NaN and extreme values, and the checkpoint for a training that diverged")
