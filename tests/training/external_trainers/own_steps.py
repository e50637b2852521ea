"""`train_step` and `validation_step` as copies with changes: mixup, and figures of one's own."""

import numpy as np
import torch
from torch import autocast

from nnunetv2.training.loss.dice import get_tp_fp_fn_tn
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.collate_outputs import collate_outputs
from nnunetv2.utilities.helpers import dummy_context


class nnUNetTrainerMixup(nnUNetTrainer):
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

    def train_step(self, batch: dict) -> dict:
        images, target = batch["data"], batch["target"]
        assert len(batch["keys"]) == len(images) and images.device.type == "cpu"
        images, target = images.to(self.device), [t.to(self.device) for t in target]
        mixing = np.random.beta(0.2, 0.2)
        order = torch.randperm(len(images))
        images = mixing * images + (1 - mixing) * images[order]
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device.type, enabled=True) if self.device.type == "cuda" else dummy_context():
            output = self.network(images)
            loss = mixing * self.loss(output, target) + (1 - mixing) * self.loss(output, [t[order] for t in target])
        scaler = self.grad_scaler or torch.amp.GradScaler(self.device.type, enabled=False)
        scaler.scale(loss).backward()
        scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_value_(self.network.parameters(), 1)
        scaler.step(self.optimizer)
        scaler.update()
        return {"loss": loss.detach().cpu().numpy(), "mixing": float(mixing), "keys": list(batch["keys"])}

    def on_train_epoch_end(self, train_outputs):
        outputs = collate_outputs(train_outputs)
        assert len(outputs["mixing"]) == 2 and len(outputs["keys"]) == 2 * self.batch_size
        super().on_train_epoch_end(train_outputs)

    def validation_step(self, batch: dict) -> dict:
        images, target = batch["data"].to(self.device), [t.to(self.device) for t in batch["target"]]
        output = self.network(images)
        loss = self.loss(output, target)
        best = output[0]
        predicted = torch.nn.functional.one_hot(best.argmax(1), best.shape[1]).movedim(-1, 1).half()
        counts = get_tp_fp_fn_tn(predicted, target[0], axes=[0, *range(2, best.ndim)], mask=None)
        named = dict(zip(("tp_hard", "fp_hard", "fn_hard"), (count[1:].cpu().numpy() for count in counts)))
        return {"loss": loss.cpu().numpy(), **named}
