"""Copy the state of a training.

It can then be written while the training goes on.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from nnunetv2.models import checkpoint_file

Kind = tuple[torch.dtype, tuple[int, ...], int]
Buffers = dict[Kind, torch.Tensor]


class Snapshot:
    """A copy of nested containers.

    Its memory is used again as soon as nobody holds the snapshot any more.
    """

    def __init__(self, state: Any) -> None:
        self.state = state


class SnapshotTaker:
    """Copy states into main memory that is used again for every snapshot.

    Touching fresh memory for the first time takes longer than the copy itself, and the training waits for both.
    """

    def __init__(self) -> None:
        self._free: list[Buffers] = []

    def take(self, state: Any) -> Snapshot:
        """Copy nested dicts, lists and tuples of tensors, arrays and immutable values.

        Tensors arrive on the CPU, contiguous. Tensors that share memory share it in the copy too, as the names of one
        weight do.
        """
        buffers = self._free.pop() if self._free else {}
        snapshot = Snapshot(_map_tensors(state, _Copier(buffers)))
        if _is_cuda_in_use():
            torch.cuda.current_stream().synchronize()  # once, for all tensors
        weakref.finalize(snapshot, self._free.append, buffers)
        return snapshot


def save_snapshot_file(snapshot: Snapshot, path: str | os.PathLike[str]) -> None:
    """Write a checkpoint that was copied from a training."""
    checkpoint_file.save_checkpoint_file(snapshot.state, path)


class _Copier:
    """Copy tensors of one snapshot into buffers, each distinct tensor once."""

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self._copies: dict[tuple, torch.Tensor] = {}
        self._counts: dict[tuple, int] = {}

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()
        identity = tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
        if tensor.numel() == 0:
            return tensor.cpu()
        if identity not in self._copies:
            self._copies[identity] = self._next_buffer(tensor).copy_(tensor, non_blocking=tensor.is_cuda)
        return self._copies[identity]

    def _next_buffer(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a buffer for a tensor; the n-th tensor of a kind always gets the same one."""
        kind = tensor.dtype, tuple(tensor.shape)
        self._counts[kind] = self._counts.get(kind, 0) + 1
        key = *kind, self._counts[kind]
        if key not in self._buffers:
            self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=_is_cuda_in_use())
        return self._buffers[key]


def _is_cuda_in_use() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _map_tensors(state: Any, copy_tensor: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Rebuild containers with their tensors and arrays copied; everything else is taken as it is."""
    if isinstance(state, torch.Tensor):
        return copy_tensor(state)
    if isinstance(state, np.ndarray):
        return state.copy()
    if isinstance(state, dict):
        copied = [(key, _map_tensors(value, copy_tensor)) for key, value in state.items()]
        return type(state)(copied) if type(state).__module__ == "collections" else dict(copied)
    if type(state) in (list, tuple):
        return type(state)(_map_tensors(value, copy_tensor) for value in state)
    return state
