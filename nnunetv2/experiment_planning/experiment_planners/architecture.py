"""Describe a network in the words of a plans file.

Its class by a dotted path, its arguments as plain values.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

from nnunetv2.experiment_planning.experiment_planners.network_topology import Topology
from nnunetv2.utilities.trusted_names import PACKAGES_VARIABLE, may_be_named

logger = logging.getLogger(__name__)

CLASSES_AMONG_ARGUMENTS = ("conv_op", "norm_op", "dropout_op", "nonlin")


def class_path(class_or_path: type | str) -> str:
    """Return the dotted path of a class; a path is returned as it is."""
    if isinstance(class_or_path, str):
        return class_or_path
    return f"{class_or_path.__module__}.{class_or_path.__name__}"


def class_to_build(path: str, given: type | str) -> type | str:
    """Return the class of a path that plans may not name, else the path.

    A class can be given where plans need the user's word.
    """
    if isinstance(given, str) or class_path(given) != path or may_be_named(path):
        return path
    _tell_how_to_allow(path)
    return given


@cache
def _tell_how_to_allow(path: str) -> None:
    """Say it once, however many patch sizes are tried."""
    logger.warning(
        "plans that name %s are trained and used only where the environment variable %s names %s",
        path,
        PACKAGES_VARIABLE,
        path.split(".")[0],
    )


def load_class(class_or_path: type | str) -> type:
    """Return the class at a dotted path; a class is returned as it is."""
    if not isinstance(class_or_path, str):
        return class_or_path
    module, _, name = class_or_path.rpartition(".")
    return getattr(import_module(module), name)


def describe_unet(
    network_class: type | str,
    topology: Topology,
    *,
    base_features: int,
    most_features: int,
    encoder_depth_argument: str,
    encoder_depths: Sequence[int],
    decoder_depths: Sequence[int],
) -> dict[str, Any]:
    """Return the entry `architecture` of a configuration for a U-Net of the given topology.

    Args:
        most_features: Where the doubling of feature maps from stage to stage ends.
        encoder_depth_argument: Name under which the network takes `encoder_depths`.
        encoder_depths: Convolutions or blocks per stage, from the top; longer than needed.
        decoder_depths: The same for the decoder.
    """
    num_stages, dim = len(topology.strides), len(topology.patch_size)
    return {
        "network_class_name": class_path(network_class),
        "arch_kwargs": {
            "n_stages": num_stages,
            "features_per_stage": [min(most_features, base_features * 2**stage) for stage in range(num_stages)],
            "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
            "kernel_sizes": topology.kernel_sizes,
            "strides": topology.strides,
            encoder_depth_argument: encoder_depths[:num_stages],
            "n_conv_per_stage_decoder": decoder_depths[: num_stages - 1],
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            **dict.fromkeys(("dropout_op", "dropout_op_kwargs")),
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": CLASSES_AMONG_ARGUMENTS,
    }
