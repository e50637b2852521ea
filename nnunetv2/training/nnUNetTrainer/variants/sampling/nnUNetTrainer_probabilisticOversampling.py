"""Trainers that decide for each sample by lot whether it must show foreground."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import distributed

from nnunetv2.training.batch_shares import split_batch_size
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.settings import with_settings
from nnunetv2.utilities.plain_text import show


class nnUNetTrainer_probabilisticOversampling(nnUNetTrainer):
    """Draw foreground samples by chance instead of by place in the batch.

    With the probability of their share in a batch of the default trainer.

    The default trainer makes the last samples of a batch show foreground: one of two, so here the probability is 0.5.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.probabilistic_oversampling = True
        batch_size = self.configuration_manager.batch_size
        first_forced = round(batch_size * (1 - self.oversample_foreground_percent))
        self.oversample_foreground_percent = float(np.mean(np.arange(batch_size) >= first_forced))
        self.print_to_log_file(f"Probability of a foreground sample: {self.oversample_foreground_percent}")

    def _set_batch_size_and_oversample(self) -> None:
        """Set the batch size of this process; the probability is the same in all of them."""
        self.batch_size = self.configuration_manager.batch_size
        if self.is_ddp:
            self.batch_size = split_batch_size(self.batch_size, distributed.get_world_size())[self.local_rank]
            show(
                f"Process {self.local_rank}: batch size {self.batch_size}, "
                f"probability of a foreground sample {self.oversample_foreground_percent}"
            )


@with_settings(oversample_foreground_percent=0.33)
class nnUNetTrainer_probabilisticOversampling_033(nnUNetTrainer_probabilisticOversampling):
    """Draw foreground samples with a probability of 0.33."""


@with_settings(oversample_foreground_percent=0.1)
class nnUNetTrainer_probabilisticOversampling_010(nnUNetTrainer_probabilisticOversampling):
    """Draw foreground samples with a probability of 0.1."""
