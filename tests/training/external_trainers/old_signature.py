"""A trainer of release 2.2: `unpack_dataset` before the device, and the logger of those days."""

import torch
from batchgenerators.utilities.file_and_folder_operations import isfile, join, save_json

from nnunetv2.training.logging.nnunet_logger import nnUNetLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainerOfOld(nnUNetTrainer):
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
        self.logger = nnUNetLogger()
        self.print_to_log_file("Using this device:", self.device)

    def on_epoch_end(self):
        super().on_epoch_end()
        best = max(self.logger.my_fantastic_logging["mean_fg_dice"])
        save_json({"best": float(best)}, join(self.output_folder, "best.json"))

    def on_train_end(self):
        super().on_train_end()
        assert isfile(join(self.output_folder, "best.json"))


class nnUNetTrainerOfOldByKeyword(nnUNetTrainerOfOld):
    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        unpack_dataset: bool = True,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(
            plans=plans,
            configuration=configuration,
            fold=fold,
            dataset_json=dataset_json,
            unpack_dataset=unpack_dataset,
            device=device,
        )
