"""A loss of one's own, wrapped by hand as in copies of `_build_loss`."""

import numpy as np
import torch
from torch import nn

from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss, get_tp_fp_fn_tn
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.helpers import softmax_helper_dim1


class TverskyLoss(nn.Module):
    def __init__(self, alpha=0.3, beta=0.7):
        super().__init__()
        self.alpha, self.beta = alpha, beta

    def forward(self, x, y, loss_mask=None):
        x = softmax_helper_dim1(x)
        tp, fp, fn, _ = get_tp_fp_fn_tn(x, y, (0, 2, 3, 4), loss_mask, False)
        return 1 - ((tp + 1) / (tp + self.alpha * fp + self.beta * fn + 1))[1:].mean()


class nnUNetTrainerTversky(nnUNetTrainer):
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

    def _build_loss(self):
        if self.label_manager.has_regions:
            base = DC_and_BCE_loss(
                {},
                {
                    "batch_dice": self.configuration_manager.batch_dice,
                    "do_bg": True,
                    "smooth": 1e-5,
                    "ddp": self.is_ddp,
                },
                use_ignore_label=self.label_manager.ignore_label is not None,
                dice_class=MemoryEfficientSoftDiceLoss,
            )
        else:
            base = DC_and_CE_loss(
                {
                    "batch_dice": self.configuration_manager.batch_dice,
                    "smooth": 1e-5,
                    "do_bg": False,
                    "ddp": self.is_ddp,
                },
                {},
                weight_ce=1,
                weight_dice=1,
                ignore_label=self.label_manager.ignore_label,
                dice_class=MemoryEfficientSoftDiceLoss,
            )
        tversky = TverskyLoss()
        base.dc = tversky
        if self._do_i_compile():
            base.dc = torch.compile(base.dc)
        if self.enable_deep_supervision:
            scales = self._get_deep_supervision_scales()
            w = 0.5 ** np.arange(len(scales))
            w[-1] = 1e-6 if self.is_ddp and not self._do_i_compile() else 0
            return DeepSupervisionWrapper(base, w / w.sum())
        return base
