"""Train Primus, transformers that segment volumes (Wald, Roy, Isensee et al., arXiv:2503.01835, 2025).

For 3D configurations. The networks come with dynamic_network_architectures and need timm, which needs torchvision; both
are imported when a network is built, so that other trainers do without them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.primus.networks import PATCH_EMBED_SIZE, find_primus, require_fitting_patch
from nnunetv2.training.nnUNetTrainer.settings import Trainer, with_batch_size, with_plans, with_settings
from nnunetv2.training.nnUNetTrainer.variants.lr_schedule.nnUNetTrainer_warmup import nnUNetTrainer_warmup
from nnunetv2.training.optimization import build_adamw

if TYPE_CHECKING:
    from torch import nn

    from nnunetv2.plans.plans_manager import ConfigurationManager, PlansManager

_REGULARIZATION = {"drop_path_rate": 0.2, "scale_attn_inner": True, "init_values": 0.1}


@with_settings(initial_lr=3e-4, weight_decay=5e-2, enable_deep_supervision=False)
class AbstractPrimus(nnUNetTrainer_warmup):
    """Train a network with AdamW and a warm-up; subclasses say which."""

    max_gradient_norm = 1

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Return the network; each subclass has its own."""
        raise NotImplementedError(
            "AbstractPrimus has no network: choose one of its subclasses, or override build_network_architecture"
        )

    def _build_optimizer(self) -> torch.optim.AdamW:
        return build_adamw(
            self.network,
            initial_lr=self.initial_lr,
            weight_decay=self.weight_decay,
            betas=(0.9, 0.98),
            device=self.device,
        )

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        """Train in float32 except on CUDA, as these networks have always been trained.

        In bfloat16 on a CPU they fail: oneDNN (torch 2.13, AVX512-BF16) leaves parts of the weight gradients of 3x3x3
        convolutions uninitialised where the first axis of the input is 2 long.
        """
        return super()._autocast() if self.device.type == "cuda" else contextlib.nullcontext()

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Do nothing: there is a single output."""


def _with_network(class_name: str, **shape: int) -> Callable[[Trainer], Trainer]:
    """Let the decorated trainer build a Primus network.

    Args:
        class_name: Of the network.
        shape: Arguments of the first generation, a single class for all sizes: width, depth, heads.
    """

    def decorate(trainer_class: Trainer) -> Trainer:
        def build_network_architecture(
            plans_manager: PlansManager,
            configuration_manager: ConfigurationManager,
            num_input_channels: int,
            num_output_channels: int,
            enable_deep_supervision: bool = True,
        ) -> nn.Module:
            """Return the network, with weights drawn anew; it has a single output."""
            patch_size = configuration_manager.patch_size
            require_fitting_patch(patch_size, trainer_class.__name__)
            outputs: dict[str, Any] = {"num_classes" if shape else "output_channels": num_output_channels}
            return find_primus(class_name)(
                input_channels=num_input_channels,
                patch_embed_size=PATCH_EMBED_SIZE,
                input_shape=tuple(patch_size),
                **outputs,
                **shape,
                **_REGULARIZATION,
            )

        trainer_class.build_network_architecture = staticmethod(build_network_architecture)
        return trainer_class

    return decorate


@_with_network("Primus", embed_dim=396, eva_depth=12, eva_numheads=6)
class nnUNet_Primus_S_Trainer(AbstractPrimus):
    """Train Primus-S."""


@_with_network("Primus", embed_dim=792, eva_depth=12, eva_numheads=12)
class nnUNet_Primus_B_Trainer(AbstractPrimus):
    """Train Primus-B."""


@_with_network("Primus", embed_dim=864, eva_depth=16, eva_numheads=12)
class nnUNet_Primus_M_Trainer(AbstractPrimus):
    """Train Primus-M."""


@_with_network("Primus", embed_dim=1056, eva_depth=24, eva_numheads=16)
class nnUNet_Primus_L_Trainer(AbstractPrimus):
    """Train Primus-L."""


@_with_network("PrimusV2S")
class nnUNet_PrimusV2S_Trainer(AbstractPrimus):
    """Train Primus-S of the second generation, which embeds patches with more layers."""


@_with_network("PrimusV2B")
class nnUNet_PrimusV2B_Trainer(AbstractPrimus):
    """Train Primus-B of the second generation."""


@_with_network("PrimusV2M")
class nnUNet_PrimusV2M_Trainer(AbstractPrimus):
    """Train Primus-M of the second generation."""


@_with_network("PrimusV2L")
class nnUNet_PrimusV2L_Trainer(AbstractPrimus):
    """Train Primus-L of the second generation."""


@_with_network("PrimusV3S")
class nnUNet_PrimusV3S_Trainer(AbstractPrimus):
    """Train Primus-S of the third generation."""


@_with_network("PrimusV3B")
class nnUNet_PrimusV3B_Trainer(AbstractPrimus):
    """Train Primus-B of the third generation."""


@_with_network("PrimusV3M")
class nnUNet_PrimusV3M_Trainer(AbstractPrimus):
    """Train Primus-M of the third generation."""


@_with_network("PrimusV3L")
class nnUNet_PrimusV3L_Trainer(AbstractPrimus):
    """Train Primus-L of the third generation."""


@with_batch_size(8)
class nnUNet_Primus_M_Trainer_BS8(nnUNet_Primus_M_Trainer):
    """Train Primus-M with batches of 8."""


@with_settings(initial_lr=2e-4)
class nnUNet_Primus_M_Trainer_BS8_2e4(nnUNet_Primus_M_Trainer_BS8):
    """Train Primus-M with batches of 8 and a learning rate of 2e-4."""


@with_batch_size(8)
class nnUNet_Trainer_BS8(nnUNetTrainer):
    """Train the network of the plans with batches of 8, for comparison."""


@with_plans(patch_size=[96, 96, 96], batch_size=1)
class _Primus_S_96_BS1(nnUNet_Primus_S_Trainer):
    """Train Primus-S with single small patches, to try things out."""


@with_plans(patch_size=[96, 96, 96], batch_size=1)
class _Primus_B_96_BS1(nnUNet_Primus_B_Trainer):
    """Train Primus-B with single small patches, to try things out."""


@with_plans(patch_size=[96, 96, 96], batch_size=1)
class _Primus_M_96_BS1(nnUNet_Primus_M_Trainer):
    """Train Primus-M with single small patches, to try things out."""


@with_plans(patch_size=[48, 48, 48], batch_size=1)
class _Primus_L_48_BS1(nnUNet_Primus_L_Trainer):
    """Train Primus-L with single small patches, to try things out."""
