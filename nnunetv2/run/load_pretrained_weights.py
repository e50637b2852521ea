"""Start a training from the weights of another one."""

from __future__ import annotations

import os

from torch import nn

from nnunetv2.models.checkpoint_file import load_checkpoint_file
from nnunetv2.models.networks import adapt_weight_names, bare_network
from nnunetv2.utilities.plain_text import show

SEGMENTATION_LAYERS = ".seg_layers."


def load_pretrained_weights(network: nn.Module, fname: str | os.PathLike[str], verbose: bool = False) -> None:
    """Copy a checkpoint's weights into a network, but those of its output layers.

    Args:
        network: Changed in place; may be wrapped by DDP or torch.compile.
        fname: A checkpoint of a network of the same architecture, perhaps with other labels.
        verbose: Print the name and shape of each tensor.

    Raises:
        AssertionError: A tensor is missing in the checkpoint, or has another shape.
    """
    network = bare_network(network)
    current = network.state_dict()
    pretrained = adapt_weight_names(load_checkpoint_file(fname)["network_weights"], current)
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
