"""Agree on devices and results among the processes of one training."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

Answer = TypeVar("Answer")


def is_distributed() -> bool:
    """Tell whether this process trains together with others."""
    return distributed.is_available() and distributed.is_initialized()


def device_of_process(device: torch.device, rank: int) -> torch.device:
    """Return the GPU of a process; devices of other types are as given.

    With torchrun on several machines, LOCAL_RANK counts the processes of this one.
    """
    if device.type != "cuda":
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)) if is_distributed() else 0)


def distribute(network: nn.Module, device: torch.device, *, has_unused_parameters: bool) -> nn.Module:
    """Wrap a network so that the gradients of all processes are averaged.

    Args:
        has_unused_parameters: Some get no gradient, as the outputs of deep supervision while it is switched off.
    """
    if device.type == "cuda":  # on a CPU there are no common batch statistics
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return DistributedDataParallel(
        network,
        device_ids=[device.index] if device.type == "cuda" else None,
        find_unused_parameters=has_unused_parameters,
    )


def gather(values: np.ndarray) -> list[np.ndarray]:
    """Return the values of all processes, in their order; without others, only the own ones."""
    if not is_distributed():
        return [values]
    gathered: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, values)
    return gathered


def from_first_process(question: Callable[[], Answer]) -> Answer:
    """Return the first process's answer in all processes; others are not asked."""
    if not is_distributed():
        return question()
    box = [question() if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def wait_for_all() -> None:
    """Return when all processes have come here."""
    if is_distributed():
        distributed.barrier()
