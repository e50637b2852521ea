"""Count the numbers in a network's feature maps.

They are the planner's stand-in for GPU memory.

One training sample, all feature maps that convolutions produce, without deep supervision. The number of input
channels does not matter. For the two standard networks the count is a sum over stages and needs no network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PLAIN_UNET = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
RESIDUAL_ENCODER_UNET = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"

# The formulas hold for these arguments; others (bottleneck blocks, another stem) change the feature maps.
_COVERED_ARGUMENTS = frozenset(
    {
        "n_stages",
        "features_per_stage",
        "conv_op",
        "kernel_sizes",
        "strides",
        "n_conv_per_stage",
        "n_blocks_per_stage",
        "n_conv_per_stage_decoder",
        "conv_bias",
        "norm_op",
        "norm_op_kwargs",
        "dropout_op",
        "dropout_op_kwargs",
        "nonlin",
        "nonlin_kwargs",
    }
)


def count_feature_map_values(
    patch_size: Sequence[int],
    input_channels: int,
    output_channels: int,
    arch_class_name: str | type,
    arch_kwargs: Mapping[str, Any],
    arch_kwargs_req_import: Sequence[str],
) -> int:
    """Count the values in a network's feature maps.

    The network is given as a plans file describes it, or with its class.

    A network other than the two standard ones is built and asked: its class needs a method
    `compute_conv_feature_map_size(input_size)`.
    """
    if set(arch_kwargs) <= _COVERED_ARGUMENTS:
        if arch_class_name == PLAIN_UNET:
            return count_plain_unet(patch_size, output_channels, arch_kwargs)
        if arch_class_name == RESIDUAL_ENCODER_UNET:
            return count_residual_encoder_unet(patch_size, output_channels, arch_kwargs)
    from nnunetv2.models.network_from_plans import get_network_from_plans

    network = get_network_from_plans(
        arch_class_name, dict(arch_kwargs), arch_kwargs_req_import, input_channels, output_channels, allow_init=False
    )
    return network.compute_conv_feature_map_size(patch_size)


def count_plain_unet(patch_size: Sequence[int], output_channels: int, arch_kwargs: Mapping[str, Any]) -> int:
    """Count for a PlainConvUNet.

    Each convolution of a stage leaves one feature map of the stage's size.
    """
    maps = _values_per_map(patch_size, arch_kwargs)
    encoder = sum(n * values for n, values in zip(arch_kwargs["n_conv_per_stage"], maps))
    return encoder + _count_decoder(maps, output_channels, arch_kwargs)


def count_residual_encoder_unet(patch_size: Sequence[int], output_channels: int, arch_kwargs: Mapping[str, Any]) -> int:
    """Count for a ResidualEncoderUNet of basic blocks.

    Two feature maps a block, one for the stem, and one for the projection in the first block of a stage that changes
    the number of channels or the size.
    """
    maps = _values_per_map(patch_size, arch_kwargs)
    features, strides = arch_kwargs["features_per_stage"], arch_kwargs["strides"]
    stem = features[0] * int(np.prod(patch_size, dtype=np.int64))
    encoder = 0
    for stage, (num_blocks, values) in enumerate(zip(arch_kwargs["n_blocks_per_stage"], maps)):
        before = features[max(stage - 1, 0)]
        has_projection = features[stage] != before or any(stride != 1 for stride in strides[stage])
        encoder += (2 * num_blocks + has_projection) * values
    return stem + encoder + _count_decoder(maps, output_channels, arch_kwargs)


def _count_decoder(maps: Sequence[int], output_channels: int, arch_kwargs: Mapping[str, Any]) -> int:
    """A decoder stage holds its upsampled input and its convolutions; the last one also the logits."""
    num_convs_top_down = list(arch_kwargs["n_conv_per_stage_decoder"])[::-1]
    stages = sum((num_convs + 1) * values for num_convs, values in zip(num_convs_top_down, maps))
    top_voxels = maps[0] // arch_kwargs["features_per_stage"][0]
    return stages + output_channels * top_voxels


def _values_per_map(patch_size: Sequence[int], arch_kwargs: Mapping[str, Any]) -> list[int]:
    """Return features times voxels of one feature map, per stage."""
    size, values = [int(length) for length in patch_size], []
    for features, stride in zip(arch_kwargs["features_per_stage"], arch_kwargs["strides"]):
        size = [length // step for length, step in zip(size, stride)]
        values.append(int(features) * int(np.prod(size, dtype=np.int64)))
    return values
