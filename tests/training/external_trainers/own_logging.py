"""Curves of one's own, a listener, and `on_epoch_end` as a copy."""

from time import time

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import join

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class Listener:
    def __init__(self):
        self.heard = []

    def update_config(self, config):
        self.heard.append(("config", sorted(config)))

    def log(self, key, value, step):
        self.heard.append((key, step))

    def log_summary(self, key, value):
        self.heard.append(("summary", key))


class nnUNetTrainerLogsMore(nnUNetTrainer):
    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 2
        self.num_iterations_per_epoch = self.num_val_iterations_per_epoch = 2
        self.logger.local_logger.my_fantastic_logging["gradient_norm"] = []
        self.listener = Listener()
        self.logger.loggers.append(self.listener)

    def on_train_epoch_end(self, train_outputs):
        super().on_train_epoch_end(train_outputs)
        norms = [p.grad.norm().item() for p in self.network.parameters() if p.grad is not None]
        self.logger.log("gradient_norm", float(np.sum(norms)), self.current_epoch)

    def on_epoch_end(self):
        self.logger.log("epoch_end_timestamps", time(), self.current_epoch)
        self.print_to_log_file("train_loss", np.round(self.logger.get_value("train_losses", step=-1), decimals=4))
        self.print_to_log_file("val_loss", np.round(self.logger.get_value("val_losses", step=-1), decimals=4))
        self.print_to_log_file(
            "Pseudo dice", [np.round(i, decimals=4) for i in self.logger.get_value("dice_per_class_or_region", step=-1)]
        )
        self.print_to_log_file(
            "gradient norm",
            self.logger.get_value("gradient_norm", step=-1),
            also_print_to_console=False,
            add_timestamp=False,
        )
        current_epoch = self.current_epoch
        if (current_epoch + 1) % self.save_every == 0 and current_epoch != (self.num_epochs - 1):
            self.save_checkpoint(join(self.output_folder, "checkpoint_latest.pth"))
        if self._best_ema is None or self.logger.get_value("ema_fg_dice", step=-1) > self._best_ema:
            self._best_ema = self.logger.get_value("ema_fg_dice", step=-1)
            self.print_to_log_file(f"Yayy! New best EMA pseudo Dice: {np.round(self._best_ema, decimals=4)}")
            self.save_checkpoint(join(self.output_folder, "checkpoint_best.pth"))
        if self.local_rank == 0:
            self.logger.plot_progress_png(self.output_folder)
        self.current_epoch += 1
