"""The closed-form count of values in feature maps."""

import pytest
from dynamic_network_architectures.architectures.unet import PlainConvUNet

from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
from nnunetv2.experiment_planning.experiment_planners.vram_proxy import (
    PLAIN_UNET,
    RESIDUAL_ENCODER_UNET,
    count_feature_map_values,
)

REQUIRES_IMPORT = ("conv_op", "norm_op", "dropout_op", "nonlin")


def describe(spacing, patch, *, residual):
    """Return the arguments of the network the planners would choose for this patch."""
    topology = get_pool_and_conv_props(spacing, patch, 4, 999999)
    dim, stages = len(patch), len(topology.strides)
    blocks = ((1, 3, 4) + (6,) * 10)[:stages]
    encoder = {"n_blocks_per_stage": blocks} if residual else {"n_conv_per_stage": (2,) * stages}
    return {
        "n_stages": stages,
        "features_per_stage": [min(512 if dim == 2 else 320, 32 * 2**i) for i in range(stages)],
        "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
        "kernel_sizes": topology.kernel_sizes,
        "strides": topology.strides,
        **encoder,
        "n_conv_per_stage_decoder": (1 if residual else 2,) * (stages - 1),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        **dict.fromkeys(("dropout_op", "dropout_op_kwargs")),
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


@pytest.mark.parametrize(
    ("spacing", "patch", "plain", "residual"),
    [
        ((1, 1, 1), (128, 128, 128), 456990720, 561614848),
        ((5, 0.8, 0.8), (20, 320, 256), 486592000, 709612800),
        ((1, 1), (512, 448), 72884224, 113799168),
        ((2, 1, 1), (56, 160, 192), 465964800, 637983360),
    ],
)
def test_counts_equal_known_values(spacing, patch, plain, residual):
    for class_name, expected in ((PLAIN_UNET, plain), (RESIDUAL_ENCODER_UNET, residual)):
        arguments = describe(spacing, patch, residual=class_name == RESIDUAL_ENCODER_UNET)
        assert count_feature_map_values(patch, 2, 5, class_name, arguments, REQUIRES_IMPORT) == expected


@pytest.mark.parametrize("class_name", [PLAIN_UNET, RESIDUAL_ENCODER_UNET])
@pytest.mark.parametrize(
    ("spacing", "patch"), [((1, 1), (64, 48)), ((3, 1, 1), (10, 32, 40)), ((1, 1, 1), (24, 16, 32))]
)
def test_formula_agrees_with_the_network(class_name, spacing, patch):
    arguments = describe(spacing, patch, residual=class_name == RESIDUAL_ENCODER_UNET)
    patch = get_pool_and_conv_props(spacing, patch, 4, 999999).patch_size
    by_formula = count_feature_map_values(patch, 1, 3, class_name, arguments, REQUIRES_IMPORT)
    # deep_supervision is no argument that the formula knows, so the network is built
    by_network = count_feature_map_values(
        patch, 1, 3, class_name, {**arguments, "deep_supervision": False}, REQUIRES_IMPORT
    )
    assert by_formula == by_network


class CountingUNet(PlainConvUNet):
    """A network of a user, with a count of its own."""

    def compute_conv_feature_map_size(self, input_size):
        return 4711


def test_other_networks_are_asked(monkeypatch):
    name = f"{CountingUNet.__module__}.{CountingUNet.__name__}"
    monkeypatch.setenv("nnUNet_extPackages", CountingUNet.__module__)
    arguments = describe((1, 1), (16, 16), residual=False)
    for network in (name, CountingUNet):
        assert count_feature_map_values((16, 16), 1, 2, network, arguments, REQUIRES_IMPORT) == 4711
