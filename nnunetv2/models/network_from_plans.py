"""Build the network that plans describe."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nnunetv2.utilities.trusted_names import UntrustedNameError, find_class, locate_argument, locate_network_class

if TYPE_CHECKING:
    from torch import nn


def get_network_from_plans(
    arch_class_name: str | type[nn.Module],
    arch_kwargs: Mapping,
    arch_kwargs_req_import: Sequence[str],
    input_channels: int,
    output_channels: int,
    allow_init: bool = True,
    deep_supervision: bool | None = None,
) -> nn.Module:
    """Build a network from the `architecture` entry of a configuration.

    Args:
        arch_class_name: Dotted path of the class, or the class.
        arch_kwargs: Arguments of its constructor, besides `input_channels` and `num_classes`.
        arch_kwargs_req_import: Those keys of `arch_kwargs` whose values are classes, by their dotted paths, or None.
        input_channels: Channels of the image, with the one-hot segmentation of a previous stage.
        output_channels: Segmentation heads.
        allow_init: Initialise the weights with the network's own `initialize`, if it has one.
        deep_supervision: Passed on unless None.

    Raises:
        KeyError: A name of `arch_kwargs_req_import` is missing in `arch_kwargs`.
        ImportError: A dotted path leads nowhere.
        UntrustedNameError: A dotted path leads to something that a file must not have called; see `trusted_names`.
    """
    if not isinstance(arch_kwargs_req_import, (list, tuple)):
        raise UntrustedNameError(
            f"_kw_requires_import in the plans: expected a list of names of arch_kwargs, got {arch_kwargs_req_import!r}"
        )
    kwargs = {
        **arch_kwargs,
        **{name: _locate(arch_kwargs[name], name) for name in arch_kwargs_req_import if arch_kwargs[name] is not None},
    }
    if deep_supervision is not None:
        kwargs["deep_supervision"] = deep_supervision
    network_class = find_network_class(arch_class_name)
    kwargs = {"input_channels": input_channels, "num_classes": output_channels, **kwargs}
    try:
        inspect.signature(network_class).bind(**kwargs)
    except TypeError as error:
        raise ValueError(
            f"arch_kwargs in the plans do not fit the network {network_class.__name__}: {error}"
        ) from error
    network = network_class(**kwargs)
    if allow_init and hasattr(network, "initialize"):
        network.apply(network.initialize)
    return network


def find_network_class(arch_class_name: str | type[nn.Module]) -> type[nn.Module]:
    """Return a network class by its dotted path.

    Or by its name in dynamic_network_architectures if that has moved.

    Raises:
        ImportError: Neither exists.
        UntrustedNameError: It is no torch module, or of a package that plans may not name.
    """
    network_class = locate_network_class(arch_class_name, "network_class_name")
    return _find_moved_class(arch_class_name) if network_class is None else network_class


def _find_moved_class(arch_class_name: str) -> type[nn.Module]:
    import dynamic_network_architectures
    from torch import nn

    name = arch_class_name.split(".")[-1]
    package = "dynamic_network_architectures.architectures"
    warnings.warn(f"network class {arch_class_name} not found; searching {package} for {name}", stacklevel=4)
    folder = os.path.join(dynamic_network_architectures.__path__[0], "architectures")
    network_class = find_class(
        name, field="network_class_name in the plans", folder=folder, package=package, base=nn.Module
    )
    if network_class is None:
        raise ImportError(
            f"network class {arch_class_name} not found, and {package} has no {name}. Install the "
            "package that it comes from, or plan the dataset again"
        )
    return network_class


def _locate(value: object, argument: str) -> object:
    """Return the object at a dotted path; other values as they are."""
    if not isinstance(value, str):
        return value
    found = locate_argument(value, argument)
    if found is None:
        raise ImportError(f"the plans name {value} as {argument}, which does not exist in the installed packages")
    return found
