"""Validate the aggregate with the validation steps of a trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from nnunetv2.federated.aggregation.pooled_validation import dice_per_class
from nnunetv2.federated.protocol import messages
from nnunetv2.training.distributed import gather
from nnunetv2.utilities.collate_outputs import collate_outputs

if TYPE_CHECKING:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

COUNTS = ("tp_hard", "fp_hard", "fn_hard")


def validate_network(
    trainer: nnUNetTrainer, counted: Callable[[list[dict]], list[dict]] = lambda outputs: outputs
) -> messages.Validation | None:
    """Take an epoch's validation steps; return the voxel counts of all processes.

    Nothing is logged and no hook but `on_validation_epoch_start` and `validation_step` is called: the curves of the
    trainer are those of its own weights. A trainer whose steps count no voxels gives None.

    Args:
        counted: Returns results of steps with the counts of voxels that are to be sent.
    """
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        outputs = trainer._run_steps(
            "validation of the aggregate",
            trainer.validation_step,
            trainer.dataloader_val,
            trainer.num_val_iterations_per_epoch,
        )
    if not outputs or not {*COUNTS, "loss"} <= outputs[0].keys():
        return None
    collated = collate_outputs(counted(outputs))
    counts = np.stack([np.sum(collated[name], axis=0, dtype=np.float64) for name in COUNTS])
    tp, fp, fn = np.sum(gather(counts), axis=0)
    return messages.Validation(
        tp=tuple(tp.tolist()),
        fp=tuple(fp.tolist()),
        fn=tuple(fn.tolist()),
        loss=float(np.vstack(gather(collated["loss"])).mean()),
    )


def describe_validation(number: int, found: messages.Validation) -> str:
    """Describe in one line the validation of a round's aggregate."""
    dice = [None if value is None else round(value, 4) for value in dice_per_class(found.tp, found.fp, found.fn)]
    loss = "" if found.loss is None else f", val_loss {found.loss:.4f}"
    return f"Aggregate of round {number}: pseudo Dice {dice}{loss}"
