"""Run a network over the tiles of an image and blend the logits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from nnunetv2.inference.forward_budget import ForwardBudget, is_out_of_memory
from nnunetv2.inference.logit_sums import HalfSums, WindowedSums, allocate_sums
from nnunetv2.inference.tile_geometry import Slicer, extent
from nnunetv2.utilities.device import to_fast_memory_format_
from nnunetv2.utilities.helpers import empty_cache

logger = logging.getLogger(__name__)

Predict = Callable[[torch.Tensor], torch.Tensor]
"""A batch of tiles `(b, c, *tile)` -> their logits `(b, classes, *tile)`."""

_MAIN_MEMORY = torch.device("cpu")


def predict_tiles(
    predict: Predict,
    image: torch.Tensor,
    slicers: Sequence[Slicer],
    *,
    classes: int,
    weight: torch.Tensor | float,
    device: torch.device,
    results_device: torch.device,
    tiles_at_once: Callable[[int], int],
    budget: ForwardBudget,
    leave_device: Callable[[], Predict],
    advance: Callable[[int], object],
) -> torch.Tensor:
    """Predict all tiles of an image and return the blended logits `(classes, *spatial)` as float16.

    When the memory of a device does not suffice, batches become smaller, then the sums move to main memory, then the
    network does; tiles that are done stay done. `logit_sums` describes the precision of the sums.

    Args:
        predict: Predicts tiles on `device`.
        image: `(c, *spatial)`, at least as large as a tile.
        weight: Weight of a tile's voxels, see `compute_gaussian`.
        tiles_at_once: Voxels of a tile -> how many to predict together.
        leave_device: Moves the network to main memory and returns the function that predicts tiles there.
        advance: Called with the number of tiles that have just been done.

    Raises:
        RuntimeError: Logits are not finite, or one tile alone exceeds the main memory.
    """
    spatial = image.shape[1:]
    pending = sorted(slicers, key=lambda slicer: extent(slicer[1], spatial[0]))
    window = max((last - first for first, last in (extent(slicer[1], spatial[0]) for slicer in pending)), default=1)
    image, sums = _allocate(image, classes, window, results_device)
    while pending:
        tile_voxels = image[pending[0]][0].numel()
        batch = pending[: tiles_at_once(tile_voxels)]
        answers = _predict_batch(predict, image, batch, device)
        if answers is not None:
            for answer, slicer in zip(answers, batch):
                sums.add(answer, slicer, weight)
            del pending[: len(batch)], answers
            advance(len(batch))
        elif budget.voxels > tile_voxels:
            budget.halve()
        elif sums.device.type != "cpu":
            logger.warning("out of memory on %s: collecting results in main memory", device)
            sums.move_to_(_MAIN_MEMORY)
            image = image.cpu()
        elif device.type != "cpu":
            logger.warning("out of memory on %s: going on with this case on the CPU, which is slower", device)
            predict = leave_device()
            empty_cache(device)
            device = _MAIN_MEMORY
        else:
            raise RuntimeError(
                "out of memory: one tile alone is too large for what is free of the main memory. End "
                "other programs, or use a machine with more memory"
            )
    return sums.finish()


def _allocate(
    image: torch.Tensor, classes: int, window: int, device: torch.device
) -> tuple[torch.Tensor, WindowedSums | HalfSums]:
    """Put the image and new sums on a device, or in main memory if the device is too small for them."""
    try:
        return image.to(device), allocate_sums(classes, image.shape[1:], window, device)
    except RuntimeError as error:
        if device.type == "cpu" or not is_out_of_memory(error):
            raise
    logger.warning("out of memory on %s: collecting results in main memory", device)
    empty_cache(device)
    return image.cpu(), allocate_sums(classes, image.shape[1:], window, _MAIN_MEMORY)


def _predict_batch(
    predict: Predict, image: torch.Tensor, batch: Sequence[Slicer], device: torch.device
) -> torch.Tensor | None:
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
