"""Constructors with further arguments, and with none that are named."""

import torch

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainerWithOptions(nnUNetTrainer):
    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
        dice_weight: float = 0.5,
        **kwargs,
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.dice_weight = dice_weight
        self.num_epochs = 2
        self.num_iterations_per_epoch = self.num_val_iterations_per_epoch = 2

    def _build_loss(self):
        loss = super()._build_loss()
        (loss.loss if self.enable_deep_supervision else loss).weight_dice = self.dice_weight
        return loss


class nnUNetTrainerWithAnything(nnUNetTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_epochs = 2
        self.num_iterations_per_epoch = self.num_val_iterations_per_epoch = 2
        self.configuration_manager.configuration["batch_size"] = 3
        self.configuration_manager.configuration["patch_size"] = [16, 16, 16]
