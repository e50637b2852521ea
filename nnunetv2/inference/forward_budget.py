"""Decide how many tiles and mirrored copies go through the network together."""

from __future__ import annotations

import logging

import torch

from nnunetv2.utilities.free_memory import free_memory_bytes

logger = logging.getLogger(__name__)

# Small tiles cost more in calls than in arithmetic: 20 times less CPU time for 2D tiles of 64 x 64 voxels (measured).
# Batches beyond this only take memory.
_CPU_VOXELS = 2**18
# More does not raise the throughput of a GPU.
_GPU_VOXELS = 2**24
# Activations of a U-Net in half precision: about ten feature maps of 32 channels at full resolution are alive at once.
_BYTES_PER_VOXEL = 1024
_BYTES_PER_VOXEL_AND_CLASS = 8
# Of its allocators on GPUs, and in main memory on Linux and Windows.
_WORDS_OF_TORCH = ("out of memory", "can't allocate memory", "not enough memory")


class ForwardBudget:
    """Largest number of voxels per batch; halved when memory runs out."""

    def __init__(self, voxels: int) -> None:
        self.voxels = voxels
        self._was_announced = False

    def items(self, voxels_per_item: int) -> int:
        """Return how many tiles of this size fit into a batch: at least 1."""
        return max(1, self.voxels // max(1, voxels_per_item))

    def halve(self) -> None:
        """Make batches smaller, because one did not fit."""
        self.voxels //= 2
        if not self._was_announced:
            logger.warning("out of memory on the device: continuing with smaller batches")
        self._was_announced = True


def budget_for(device: torch.device, num_classes: int) -> ForwardBudget:
    """Return a budget that suits a device's cores and free memory."""
    if device.type not in ("cpu", "cuda"):
        return ForwardBudget(0)
    useful = _CPU_VOXELS if device.type == "cpu" else _GPU_VOXELS
    per_voxel = _BYTES_PER_VOXEL + _BYTES_PER_VOXEL_AND_CLASS * num_classes
    return ForwardBudget(min(useful, free_bytes(device) // 2 // per_voxel))


def free_bytes(device: torch.device) -> int:
    """Return the memory that torch can still give on a CUDA device, or the machine's."""
    if device.type != "cuda":
        return free_memory_bytes()
    # Torch uses the cached memory of earlier cases again, or returns it where it does not fit. If that did not count as
    # free, the precision of a case would depend on the cases before it.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def is_out_of_memory(error: BaseException) -> bool:
    """Tell a failed allocation, on a device or in main memory, from every other failure."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS_OF_TORCH)
    )
