"""`train_step` and `validation_step` as copies with changes: mixup, and figures of one's own."""
import numpy as np
import torch
from torch import autocast

from nnunetv2.training.loss.dice import get_tp_fp_fn_tn
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.collate_outputs import collate_outputs
from nnunetv2.utilities.helpers import dummy_context


class nnUNetTrainerMixup(nnUNetTrainer):
    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device("cuda")):  # noqa: B008
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 2
        self.num_iterations_per_epoch = self.num_val_iterations_per_epoch = 2

    def train_step(self, batch: dict) -> dict:
        data = batch["data"]
        target = batch["target"]
        assert len(batch["keys"]) == len(data) and data.device.type == "cpu"
        data = data.to(self.device, non_blocking=True)
        if isinstance(target, list):
            target = [i.to(self.device, non_blocking=True) for i in target]
        else:
            target = target.to(self.device, non_blocking=True)
        mixing = np.random.beta(0.2, 0.2)
        order = torch.randperm(len(data))
        data = mixing * data + (1 - mixing) * data[order]
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device.type, enabled=True) if self.device.type == "cuda" else dummy_context():
            output = self.network(data)
            loss = mixing * self.loss(output, target) + (1 - mixing) * self.loss(output, [t[order] for t in target])
        if self.grad_scaler is not None:
            self.grad_scaler.scale(loss).backward()
            self.grad_scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), 12)
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), 12)
            self.optimizer.step()
        return {"loss": loss.detach().cpu().numpy(), "mixing": float(mixing), "keys": list(batch["keys"])}

    def on_train_epoch_end(self, train_outputs):
        outputs = collate_outputs(train_outputs)
        assert len(outputs["mixing"]) == 2 and len(outputs["keys"]) == 2 * self.batch_size
        super().on_train_epoch_end(train_outputs)

    def validation_step(self, batch: dict) -> dict:
        data = batch["data"].to(self.device, non_blocking=True)
        target = [i.to(self.device, non_blocking=True) for i in batch["target"]]
        with autocast(self.device.type, enabled=True) if self.device.type == "cuda" else dummy_context():
            output = self.network(data)
            loss = self.loss(output, target)
        output, target = output[0], target[0]
        axes = [0] + list(range(2, output.ndim))
        output_seg = output.argmax(1)[:, None]
        predicted = torch.zeros(output.shape, device=output.device, dtype=torch.float16)
        predicted.scatter_(1, output_seg, 1)
        tp, fp, fn, _ = get_tp_fp_fn_tn(predicted, target, axes=axes, mask=None)
        return {"loss": loss.detach().cpu().numpy(), "tp_hard": tp.detach().cpu().numpy()[1:],
                "fp_hard": fp.detach().cpu().numpy()[1:], "fn_hard": fn.detach().cpu().numpy()[1:]}
