"""A trainer that starts with small learning rates."""

from __future__ import annotations

import os
from typing import Any

import torch

from nnunetv2.models.checkpoint_file import load_checkpoint_file
from nnunetv2.training.lr_scheduler.warmup import Lin_incr_LRScheduler, PolyLRScheduler_offset
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.settings import with_settings

WARMUP, TRAIN = "warmup_all", "train"


@with_settings(warmup_duration_whole_net=50, num_epochs=1000, training_stage=None)
class nnUNetTrainer_warmup(nnUNetTrainer):
    """Raise the learning rate over the first `warmup_duration_whole_net` epochs, then let it fall polynomially.

    The first stage (`training_stage`) is 'warmup_all', the second one 'train'; both use the same optimizer.
    """

    warmup_duration_whole_net: int
    training_stage: str | None

    def configure_optimizers(self, stage: str = WARMUP) -> tuple[torch.optim.Optimizer, Any]:
        """Return optimizer and schedule of a stage.

        Those in use if it is the current one.

        Raises:
            ValueError: There is no such stage.
        """
        if stage not in (WARMUP, TRAIN):
            raise ValueError(f"there is no stage {stage!r}, expected {WARMUP!r} or {TRAIN!r}")
        if stage == self.training_stage:
            return self.optimizer, self.lr_scheduler
        goes_on = stage == TRAIN and self.training_stage == WARMUP
        optimizer = self.optimizer if goes_on else self._build_optimizer()
        self.print_to_log_file(f"Learning rate schedule of stage {stage}")
        self.training_stage = stage
        if stage == WARMUP:
            return optimizer, Lin_incr_LRScheduler(optimizer, self.initial_lr, self.warmup_duration_whole_net)
        return optimizer, PolyLRScheduler_offset(
            optimizer, self.initial_lr, self.num_epochs, self.warmup_duration_whole_net
        )

    def _build_optimizer(self) -> torch.optim.Optimizer:
        """Return a new optimizer, whose learning rate the schedules of both stages set."""
        return super().configure_optimizers()[0]

    def on_train_epoch_start(self) -> None:
        """Enter the stage that begins with this epoch, if one does."""
        if self.current_epoch in (0, self.warmup_duration_whole_net):
            self._enter_stage_of(self.current_epoch)
        super().on_train_epoch_start()

    def load_checkpoint(self, filename_or_checkpoint: dict | str | os.PathLike[str]) -> None:
        """Go on from a checkpoint, in the stage of its epoch."""
        checkpoint = filename_or_checkpoint
        if not isinstance(checkpoint, dict):
            checkpoint = load_checkpoint_file(checkpoint, map_location=self.device)
        if not self.was_initialized:
            self.initialize()
        self._enter_stage_of(checkpoint["current_epoch"])  # before its optimizer receives its state
        super().load_checkpoint(checkpoint)

    def _enter_stage_of(self, epoch: int) -> None:
        stage = WARMUP if epoch < self.warmup_duration_whole_net else TRAIN
        self.optimizer, self.lr_scheduler = self.configure_optimizers(stage)
