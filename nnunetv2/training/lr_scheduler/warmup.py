"""Raise the learning rate in a warm-up, and let it fall afterwards."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import Optimizer

from nnunetv2.training.lr_scheduler.stepwise import StepwiseLRScheduler, polynomial_decay, require_positive_length


class Lin_incr_offset_LRScheduler(StepwiseLRScheduler):
    """Climb in a line from step `start_step` on.

    lr(t) = max_lr (1 + t - start_step) / max_steps.
    """

    def __init__(
        self, optimizer: Optimizer, max_lr: float, max_steps: int, start_step: int, current_step: int | None = None
    ) -> None:
        require_positive_length(max_steps, "max_steps")
        self.max_lr = max_lr
        self.max_steps = max_steps
        self.start_step = start_step
        super().__init__(optimizer, current_step or 0)

    def lr_at(self, step: int) -> float:
        """Return the learning rate at a step, counted from 0."""
        return self.max_lr / self.max_steps * (1 + step - self.start_step)


class Lin_incr_LRScheduler(Lin_incr_offset_LRScheduler):
    """Climb in a line that reaches max_lr at step `max_steps` - 1.

    It is the special case of a start at step 0.
    """

    def __init__(self, optimizer: Optimizer, max_lr: float, max_steps: int, current_step: int | None = None) -> None:
        super().__init__(optimizer, max_lr, max_steps, start_step=0, current_step=current_step)


class PolyLRScheduler_offset(StepwiseLRScheduler):
    """Stay at initial_lr until `start_step`, then fall to 0 at `max_steps` along a polynomial."""

    def __init__(
        self,
        optimizer: Optimizer,
        initial_lr: float,
        max_steps: int,
        start_step: int,
        exponent: float = 0.9,
        current_step: int | None = None,
    ) -> None:
        require_positive_length(max_steps - start_step, "max_steps - start_step")
        self.initial_lr = initial_lr
        self.max_steps = max_steps
        self.start_step = start_step
        self.exponent = exponent
        super().__init__(optimizer, current_step or 0)

    def lr_at(self, step: int) -> float:
        """Return the learning rate at a step, counted from 0."""
        steps_after_start = max(0, step - self.start_step)
        return polynomial_decay(self.initial_lr, steps_after_start / (self.max_steps - self.start_step), self.exponent)


class CosineAnnealingLR_offset(StepwiseLRScheduler):
    """Decay each group's learning rate to eta_min along half a cosine.

    From step `offset` to step `T_max`.

    `verbose` is accepted for old callers and does nothing.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        T_max: int,
        eta_min: float = 0,
        last_epoch: int = -1,
        verbose: object = "deprecated",
        offset: int = 0,
    ) -> None:
        require_positive_length(T_max - offset, "T_max - offset")
        self.T_max = T_max
        self.eta_min = eta_min
        self.offset = offset
        super().__init__(optimizer, last_epoch + 1, last_epoch)

    def step(self, epoch: int | None = None) -> None:
        """Set the learning rates of `epoch`.

        None or -1 stand for the next one.
        """
        super().step(epoch)

    def lrs_at(self, step: int) -> list[float | Tensor]:
        """Return the learning rate of each parameter group at a step, counted from 0."""
        share = (1 + math.cos(math.pi * (step - self.offset) / (self.T_max - self.offset))) / 2
        return [self.eta_min + (base_lr - self.eta_min) * share for base_lr in self.base_lrs]
