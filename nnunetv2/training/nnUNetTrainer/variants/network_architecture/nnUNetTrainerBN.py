"""A trainer whose network normalises over the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

if TYPE_CHECKING:
    from torch import nn

    from nnunetv2.plans.plans_manager import ConfigurationManager, PlansManager


class nnUNetTrainerBN(nnUNetTrainer):
    """Use batch normalization where the plans have another one."""

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Build the configuration's network with batch normalization.

        The configuration shows it from then on.

        Raises:
            RuntimeError: The network of the plans has no choice of normalization.
        """
        options = configuration_manager.network_arch_init_kwargs
        if "norm_op" not in options:
            raise RuntimeError(
                f"{configuration_manager.network_arch_class_name} has no argument norm_op in the plans: "
                "nnUNetTrainerBN does not know where to put batch normalization"
            )
        options["norm_op"] = _batch_norm_beside(options["conv_op"])
        options["norm_op_kwargs"] = {"eps": 1e-5, "affine": True}
        return nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )


def _batch_norm_beside(conv_op: str | type) -> str:
    """Return the dotted name of the batch normalization with as many dimensions as a convolution."""
    name = conv_op if isinstance(conv_op, str) else conv_op.__name__
    return f"torch.nn.modules.batchnorm.BatchNorm{name[-2]}d"
