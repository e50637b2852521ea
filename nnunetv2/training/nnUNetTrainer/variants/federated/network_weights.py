"""Export and import a network's weights as arrays; share them between processes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import distributed

from nnunetv2.federated.aggregation import matching
from nnunetv2.models.networks import bare_network
from nnunetv2.training.distributed import is_distributed


def export_weights(network: torch.nn.Module) -> dict[str, np.ndarray]:
    """Copy every distinct floating-point tensor: first name -> float32 array."""
    return {
        name: tensor.detach().to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format).numpy()
        for name, tensor in _floating_tensors(network).items()
    }


@torch.no_grad()
def import_weights_(network: torch.nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Write weights into the network in place; aliases follow.

    Raises:
        ValueError: A tensor is not one of the network's, or has another shape, or is not of floating point. Nothing
            was written.
    """
    state = bare_network(network).state_dict()
    for name, values in weights.items():
        held = state.get(name)
        if held is None or tuple(held.shape) != values.shape or not np.issubdtype(values.dtype, np.floating):
            expected = "none of that name" if held is None else f"shape {tuple(held.shape)} in floating point"
            raise ValueError(
                f"tensor {name} has shape {values.shape} and dtype {values.dtype}; the network has {expected}"
            )
    for name, values in weights.items():
        state[name].copy_(torch.from_numpy(np.array(values)))


@torch.no_grad()
def copy_from_first_process_(network: torch.nn.Module) -> None:
    """Overwrite the weights of all processes with the first one's."""
    if not is_distributed():
        return
    for tensor in _floating_tensors(network).values():
        received = tensor.detach().contiguous()  # collectives want plain memory; networks may be channels-last
        distributed.broadcast(received, src=0)
        if received.data_ptr() != tensor.data_ptr():
            tensor.copy_(received)


def _floating_tensors(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    distinct, _ = matching.distinct_tensors(bare_network(network).state_dict())
    return {name: tensor for name, tensor in distinct.items() if tensor.is_floating_point()}
