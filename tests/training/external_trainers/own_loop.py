"""A training loop of one's own that stops early, checkpoints with more in them, and cases split by hand."""

import torch

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainerStopsEarly(nnUNetTrainer):
    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 50
        self.num_iterations_per_epoch = self.num_val_iterations_per_epoch = 2
        self.patience_used = 0

    def do_split(self):
        keys = sorted(self.dataset_class.get_identifiers(self.preprocessed_dataset_folder))
        return keys[1:], keys[:1]

    def run_training(self):
        self.on_train_start()
        while self.current_epoch < self.num_epochs:
            epoch = self.current_epoch
            self.on_epoch_start()
            self.on_train_epoch_start()
            losses = [self.train_step(next(self.dataloader_train)) for _ in range(self.num_iterations_per_epoch)]
            self.on_train_epoch_end(losses)
            self.on_validation_epoch_start()
            with torch.inference_mode():
                results = [
                    self.validation_step(next(self.dataloader_val)) for _ in range(self.num_val_iterations_per_epoch)
                ]
            self.on_validation_epoch_end(results)
            self.on_epoch_end()
            if epoch >= 1:
                self.print_to_log_file("No progress: stopping early")
                break
        self.on_train_end()

    def save_checkpoint(self, filename: str) -> None:
        super().save_checkpoint(filename)
        if self.local_rank == 0 and not self.disable_checkpointing:
            checkpoint = torch.load(filename, map_location="cpu", weights_only=False)
            checkpoint["patience_used"] = self.patience_used
            torch.save(checkpoint, filename)

    def load_checkpoint(self, filename_or_checkpoint):
        if isinstance(filename_or_checkpoint, str):
            filename_or_checkpoint = torch.load(filename_or_checkpoint, map_location=self.device, weights_only=False)
        super().load_checkpoint(filename_or_checkpoint)
        self.patience_used = filename_or_checkpoint.get("patience_used", 0)
