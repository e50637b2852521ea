"""Build networks, and reach them inside their wrappers.

With the builders of trainers of all generations.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnunetv2.models.instance_norm import use_fast_instance_norm_
from nnunetv2.utilities.device import to_fast_memory_format_

if TYPE_CHECKING:
    from nnunetv2.plans.plans_manager import ConfigurationManager, PlansManager


def build_network(
    builder: Callable[..., nn.Module],
    *,
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    dataset_json: dict,
    num_input_channels: int,
    num_output_channels: int,
    enable_deep_supervision: bool,
) -> nn.Module:
    """Call a trainer's `build_network_architecture`, whose parameters tell which generation it is of."""
    names = inspect.signature(builder).parameters
    arguments: tuple[object, ...]
    if "plans_manager" in names and "dataset_json" in names:  # before 2.3; finds the number of outputs by itself
        arguments = (plans_manager, dataset_json, configuration_manager, num_input_channels)
    elif "plans_manager" in names:
        arguments = (plans_manager, configuration_manager, num_input_channels, num_output_channels)
    else:
        warnings.warn(
            "build_network_architecture(architecture_class_name, arch_init_kwargs, ...) is deprecated; use the "
            "signature (plans_manager, configuration_manager, num_input_channels, num_output_channels, "
            "enable_deep_supervision)",
            DeprecationWarning,
            stacklevel=2,
        )
        arguments = (
            configuration_manager.network_arch_class_name,
            configuration_manager.network_arch_init_kwargs,
            configuration_manager.network_arch_init_kwargs_req_import,
            num_input_channels,
            num_output_channels,
        )
    try:  # by name, as release 2.8.1 does to predict
        inspect.signature(builder).bind(*arguments, enable_deep_supervision=enable_deep_supervision)
    except TypeError:  # by position, as it does to train: the parameter has another name
        return builder(*arguments, enable_deep_supervision)
    return builder(*arguments, enable_deep_supervision=enable_deep_supervision)


def bare_network(network: nn.Module) -> nn.Module:
    """Return the network inside the wrappers of DDP and of torch.compile."""
    if isinstance(network, DistributedDataParallel):
        network = network.module
    # Not by class: importing torch._dynamo takes a second, and only compiled networks have loaded it.
    return getattr(network, "_orig_mod", network)


def adapt_weight_names(weights: Mapping[str, torch.Tensor], expected: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """Remove the prefixes of DDP and torch.compile from names of weights.

    Where the bare network does not have them.
    """
    return {name if name in expected else _without_wrappers(name): tensor for name, tensor in weights.items()}


def _without_wrappers(name: str) -> str:
    """Remove the prefixes of wrappers, in whatever order they were put around the network."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def speed_up_on_cpu_(network: nn.Module, device: torch.device | str) -> nn.Module:
    """Choose normalizations and memory layout that are fast on a CPU.

    On other devices nothing happens.
    """
    if torch.device(device).type != "cpu":
        return network
    return to_fast_memory_format_(use_fast_instance_norm_(network), device)


def deep_supervision_scales(strides: Sequence[Sequence[int]]) -> list[list[float]]:
    """Return the size of each output relative to the input, highest resolution first.

    The network has no output at its lowest resolution. [[1, 1], [2, 2], [2, 2]] -> [[1., 1.], [.5, .5]]
    """
    return (1 / np.cumprod(np.vstack(strides), axis=0)).tolist()[:-1]


def is_deeply_supervised(network: nn.Module, *, otherwise: bool) -> bool:
    """Tell whether the network returns the outputs of several resolutions now.

    `otherwise` if it cannot say.
    """
    decoder = getattr(bare_network(network), "decoder", None)
    return getattr(decoder, "deep_supervision", otherwise)
