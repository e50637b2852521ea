"""Start a network from the weights of another one of the same architecture."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from nnunetv2.models.checkpoint_file import CheckpointError, load_checkpoint_file
from nnunetv2.models.networks import adapt_weight_names, bare_network
from nnunetv2.models.weight_transfer import SEGMENTATION_LAYERS
from nnunetv2.utilities.plain_text import show


def load_pretrained_weights(network: nn.Module, fname: str | os.PathLike[str], verbose: bool = False) -> None:
    """Copy a checkpoint's weights into a network, but those of its output layers.

    Args:
        network: Changed in place; may be wrapped by DDP or torch.compile.
        fname: A checkpoint of a network of the same architecture, perhaps with other labels.
        verbose: Print the name and shape of each tensor.

    Raises:
        AssertionError: A tensor is missing in the checkpoint, or has another shape.
        CheckpointError: The file holds no weights of a network.
    """
    copy_pretrained_weights_(network, read_pretrained_checkpoint(fname)["network_weights"], fname, verbose=verbose)


def copy_pretrained_weights_(
    network: nn.Module, weights: Mapping[str, Any], fname: str | os.PathLike[str], *, verbose: bool = False
) -> None:
    """Do the same with weights that were read from the file already."""
    network = bare_network(network)
    current = network.state_dict()
    pretrained = adapt_weight_names(weights, current)
    wanted = [name for name in current if SEGMENTATION_LAYERS not in name]
    for name in wanted:
        assert name in pretrained, (
            f"pretrained weights {fname} have no tensor {name}; they must come from a network of the same architecture"
        )
        assert pretrained[name].shape == current[name].shape, (
            f"pretrained weights {fname}: {name} has shape {tuple(pretrained[name].shape)}, the network needs "
            f"{tuple(current[name].shape)}; train with the plans that the weights were trained with"
        )
    network.load_state_dict({**current, **{name: pretrained[name] for name in wanted}})
    show(f"Loaded {len(wanted)} of {len(current)} tensors from {fname}; the layers that output classes start anew")
    if verbose:
        for name in wanted:
            show(f"  {name} {tuple(current[name].shape)}")


def read_pretrained_checkpoint(fname: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint that a training may start from.

    Raises:
        CheckpointError: It cannot be read, or holds no weights of a network.
    """
    import torch

    checkpoint = load_checkpoint_file(fname)
    weights = checkpoint.get("network_weights")
    if not isinstance(weights, Mapping) or not all(isinstance(one, torch.Tensor) for one in weights.values()):
        raise CheckpointError(
            f"{fname} holds no weights of a network: expected a checkpoint that a training of nnU-Net has written, "
            "with a dict of tensors under 'network_weights'"
        )
    return checkpoint
