"""Build a network from the name of a preset instead of plans.

Pretraining on other data does so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

PRIMUS = ("PrimusS", "PrimusB", "PrimusM", "PrimusL")
PRESETS = ("ResEncL", *PRIMUS)

_FEATURES = (32, 64, 128, 256, 320, 320)
_BLOCKS = (1, 3, 4, 6, 6, 6)
_PRIMUS_TOKEN = (8, 8, 8)


def get_network_from_name(
    arch_class_name: str,
    input_channels: int,
    output_channels: int,
    input_patchsize: Sequence[int] | None = None,
    allow_init: bool = True,
    deep_supervision: bool | None = None,
) -> nn.Module:
    """Build a 3D network of a preset.

    Args:
        arch_class_name: 'ResEncL', or 'PrimusS', 'PrimusB', 'PrimusM' or 'PrimusL'.
        output_channels: Segmentation heads.
        input_patchsize: Patch that the network sees, 3 lengths; needed for Primus, which numbers its positions.
        allow_init: Initialise the weights with the network's own `initialize`, if it has one.
        deep_supervision: Return the outputs of all resolutions; ResEncL only. Default: no.

    Raises:
        ValueError: There is no such preset, or it lacks its patch size.
    """
    if arch_class_name == "ResEncL":
        network = _build_residual_encoder(input_channels, output_channels, bool(deep_supervision))
    elif arch_class_name in PRIMUS:
        if input_patchsize is None:
            raise ValueError(f"{arch_class_name} needs input_patchsize, the patch that it sees")
        from dynamic_network_architectures.architectures import primus

        network = getattr(primus, arch_class_name)(
            input_channels=input_channels,
            output_channels=output_channels,
            patch_embed_size=_PRIMUS_TOKEN,
            input_shape=tuple(input_patchsize),
        )
    else:
        raise ValueError(f"there is no network preset {arch_class_name!r}, only {', '.join(PRESETS)}")
    if allow_init and hasattr(network, "initialize"):
        network.apply(network.initialize)
    return network


def _build_residual_encoder(input_channels: int, output_channels: int, deep_supervision: bool) -> nn.Module:
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
    from torch import nn

    stages = len(_FEATURES)
    return ResidualEncoderUNet(
        input_channels=input_channels,
        n_stages=stages,
        features_per_stage=_FEATURES,
        conv_op=nn.Conv3d,
        kernel_sizes=3,
        strides=[1] + [2] * (stages - 1),
        n_blocks_per_stage=_BLOCKS,
        num_classes=output_channels,
        n_conv_per_stage_decoder=[1] * (stages - 1),
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=deep_supervision,
    )
