"""Build the network that plans describe."""
from __future__ import annotations

import os
import pydoc
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

if TYPE_CHECKING:
    from torch import nn


def get_network_from_plans(arch_class_name: str, arch_kwargs: Mapping, arch_kwargs_req_import: Sequence[str],
                           input_channels: int, output_channels: int, allow_init: bool = True,
                           deep_supervision: bool | None = None) -> nn.Module:
    """Build a network from the `architecture` entry of a configuration.

    Args:
        arch_class_name: Dotted path of the class.
        arch_kwargs: What its constructor is given, besides `input_channels` and `num_classes`.
        arch_kwargs_req_import: Those keys of `arch_kwargs` whose values are dotted paths of classes, or None.
        input_channels: Channels of the image, with the one-hot segmentation of a previous stage.
        output_channels: Segmentation heads.
        allow_init: Initialise the weights with the network's own `initialize`, if it has one.
        deep_supervision: Passed on unless None.

    Raises:
        KeyError: A name of `arch_kwargs_req_import` is missing in `arch_kwargs`.
        ImportError: A dotted path leads nowhere.
        ValueError: `arch_class_name` is no torch module.
    """
    kwargs = {**arch_kwargs, **{name: _locate(arch_kwargs[name]) for name in arch_kwargs_req_import
                                if arch_kwargs[name] is not None}}
    if deep_supervision is not None:
        kwargs["deep_supervision"] = deep_supervision
    network_class = find_network_class(arch_class_name)
    network = network_class(input_channels=input_channels, num_classes=output_channels, **kwargs)
    if allow_init and hasattr(network, "initialize"):
        network.apply(network.initialize)
    return network


def find_network_class(arch_class_name: str) -> type[nn.Module]:
    """Return a network class by its dotted path, or by its name in dynamic_network_architectures if that has moved.

    Raises:
        ImportError: Neither exists.
        ValueError: It is no torch module. Plans come from other people: what they name is called, so it must be a
            network, not just any importable callable.
    """
    from torch import nn

    network_class = pydoc.locate(arch_class_name)
    if network_class is None:
        network_class = _find_moved_class(arch_class_name)
    if not (isinstance(network_class, type) and issubclass(network_class, nn.Module)):
        raise ValueError(f"plans name {arch_class_name} as network class, which is no torch.nn.Module: "
                         f"{network_class!r}")
    return network_class


def _find_moved_class(arch_class_name: str) -> object:
    import dynamic_network_architectures

    name = arch_class_name.split(".")[-1]
    package = "dynamic_network_architectures.architectures"
    warnings.warn(f"network class {arch_class_name} not found; searching {package} for {name}", stacklevel=4)
    folder = os.path.join(dynamic_network_architectures.__path__[0], "architectures")
    network_class = recursive_find_python_class(folder, name, package)
    if network_class is None:
        raise ImportError(f"network class {arch_class_name} not found, and {package} has no {name}. Install the "
                          "package that it comes from, or plan the dataset again")
    return network_class


def _locate(dotted_path: object) -> object:
    """Return what a dotted path leads to; anything but text is already what it should be."""
    if not isinstance(dotted_path, str):
        return dotted_path
    found = pydoc.locate(dotted_path)
    if found is None:
        raise ImportError(f"plans name {dotted_path}, which does not exist in the installed packages")
    return found
