"""A trainer that gathers from all processes by itself, and works with one."""

import numpy as np
import torch

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import DDP, OptimizedModule, dist, nnUNetTrainer
from nnunetv2.utilities.collate_outputs import collate_outputs
from nnunetv2.utilities.ddp_allgather import AllGatherGrad, print_if_rank0


class nnUNetTrainerGathers(nnUNetTrainer):
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
        assert AllGatherGrad is not None

    def _unwrap(self):
        module = self.network.module if isinstance(self.network, DDP) else self.network
        return module._orig_mod if isinstance(module, OptimizedModule) else module

    def on_train_epoch_end(self, train_outputs):
        outputs = collate_outputs(train_outputs)
        if self.is_ddp:
            losses_tr = [None for _ in range(dist.get_world_size())]
            dist.all_gather_object(losses_tr, outputs["loss"])
            loss_here = np.vstack(losses_tr).mean()
        else:
            loss_here = np.mean(outputs["loss"])
        self.logger.log("train_losses", loss_here, self.current_epoch)
        if self.local_rank == 0:
            torch.save(self._unwrap().state_dict(), f"{self.output_folder}/weights_only.pth")
        if self.is_ddp:
            dist.barrier()

    def on_validation_epoch_end(self, val_outputs):
        outputs_collated = collate_outputs(val_outputs)
        tp = np.sum(outputs_collated["tp_hard"], 0)
        fp = np.sum(outputs_collated["fp_hard"], 0)
        fn = np.sum(outputs_collated["fn_hard"], 0)
        if self.is_ddp:
            world_size = dist.get_world_size()
            gathered = [None for _ in range(world_size)]
            dist.all_gather_object(gathered, tp)
            tp = np.vstack([i[None] for i in gathered]).sum(0)
        loss_here = np.mean(outputs_collated["loss"])
        global_dc_per_class = [float(2 * i / (2 * i + j + k)) for i, j, k in zip(tp, fp, fn)]
        self.logger.log("mean_fg_dice", np.nanmean(global_dc_per_class), self.current_epoch)
        self.logger.log("dice_per_class_or_region", global_dc_per_class, self.current_epoch)
        self.logger.log("val_losses", loss_here, self.current_epoch)
        print_if_rank0("validated")
