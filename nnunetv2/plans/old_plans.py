"""Read configurations of before 2.4.

Later plans describe the network by class and arguments.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

_ARCHITECTURES = "dynamic_network_architectures.architectures.unet"
_BLOCKS_KEY = {"PlainConvUNet": "n_conv_per_stage", "ResidualEncoderUNet": "n_blocks_per_stage"}
_REPLACED_KEYS = (
    "UNet_class_name",
    "n_conv_per_stage_encoder",
    "n_conv_per_stage_decoder",
    "UNet_base_num_features",
    "unet_max_num_features",
    "conv_kernel_sizes",
    "pool_op_kernel_sizes",
    "num_pool_per_axis",
)


def is_old_configuration(configuration: Mapping) -> bool:
    """Tell whether a configuration describes its network in the old way.

    As the class name of a U-Net and its sizes.
    """
    return "architecture" not in configuration and "UNet_class_name" in configuration


def add_architecture(configuration: Mapping) -> dict:
    """Return a copy of an old configuration with `architecture`.

    It replaces the keys that described the network.

    Raises:
        RuntimeError: The network is of an unknown class.
        ValueError: A key is missing.
    """
    class_name = configuration["UNet_class_name"]
    if class_name not in _BLOCKS_KEY:
        raise RuntimeError(
            f"old plans with UNet_class_name {class_name!r} cannot be read, only those with "
            f"{' or '.join(_BLOCKS_KEY)}. Plan the dataset again with nnUNetv2_plan_experiment"
        )
    missing = [key for key in (*_REPLACED_KEYS[:-1], "patch_size") if key not in configuration]
    if missing:
        raise ValueError(f"old plans lack {', '.join(missing)}. Plan the dataset again with nnUNetv2_plan_experiment")
    warnings.warn(
        "these plans have the format of nnU-Net before 2.4; the network is derived from them. If a "
        "checkpoint does not fit it, plan the dataset again with nnUNetv2_plan_experiment",
        stacklevel=3,
    )
    kept = {key: value for key, value in configuration.items() if key not in _REPLACED_KEYS}
    return {**kept, "architecture": _build_architecture(configuration, class_name)}


def _build_architecture(configuration: Mapping, class_name: str) -> dict:
    blocks = configuration["n_conv_per_stage_encoder"]
    most_features = configuration["unet_max_num_features"]
    dim = len(configuration["patch_size"])
    return {
        "network_class_name": f"{_ARCHITECTURES}.{class_name}",
        "arch_kwargs": {
            "n_stages": len(blocks),
            "features_per_stage": [
                min(configuration["UNet_base_num_features"] * 2**stage, most_features) for stage in range(len(blocks))
            ],
            "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
            "kernel_sizes": configuration["conv_kernel_sizes"],
            "strides": configuration["pool_op_kernel_sizes"],
            _BLOCKS_KEY[class_name]: blocks,
            "n_conv_per_stage_decoder": configuration["n_conv_per_stage_decoder"],
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            **dict.fromkeys(("dropout_op", "dropout_op_kwargs")),
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
