"""Networks built with the signatures of releases 2.3 to 2.6, and of releases before 2.3."""

from typing import List, Tuple, Union  # noqa: UP035

import torch
from torch import nn

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans


class nnUNetTrainerLegacyNet(nnUNetTrainer):
    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        unpack_dataset: bool = True,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, unpack_dataset, device)
        self.num_epochs = 2
        self.num_iterations_per_epoch = self.num_val_iterations_per_epoch = 2

    @staticmethod
    def build_network_architecture(
        architecture_class_name: str,
        arch_init_kwargs: dict,
        arch_init_kwargs_req_import: Union[List[str], Tuple[str, ...]],  # noqa: UP006, UP007
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        return get_network_from_plans(
            architecture_class_name,
            {**arch_init_kwargs, "features_per_stage": [4, 6, 6]},
            arch_init_kwargs_req_import,
            num_input_channels,
            num_output_channels,
            allow_init=True,
            deep_supervision=enable_deep_supervision,
        )


class nnUNetTrainerAncientNet(nnUNetTrainer):
    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        unpack_dataset: bool = True,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, unpack_dataset, device)
        self.num_epochs = 2
        self.num_iterations_per_epoch = self.num_val_iterations_per_epoch = 2

    @staticmethod
    def build_network_architecture(
        plans_manager, dataset_json, configuration_manager, num_input_channels, enable_deep_supervision: bool = True
    ) -> nn.Module:
        from dynamic_network_architectures.architectures.unet import PlainConvUNet

        heads = plans_manager.get_label_manager(dataset_json).num_segmentation_heads
        return PlainConvUNet(
            num_input_channels,
            3,
            [4, 6, 6],
            nn.Conv3d,
            3,
            [1, 2, 2],
            1,
            heads,
            1,
            norm_op=nn.InstanceNorm3d,
            nonlin=nn.LeakyReLU,
            deep_supervision=enable_deep_supervision,
        )
