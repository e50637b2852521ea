"""Let the learning rate fall to 0 along a polynomial, the default schedule."""

from __future__ import annotations

from torch.optim import Optimizer

from nnunetv2.training.lr_scheduler.stepwise import StepwiseLRScheduler, polynomial_decay, require_positive_length


class PolyLRScheduler(StepwiseLRScheduler):
    """Decay as lr(t) = initial_lr (1 - t / max_steps) ** exponent.

    For all parameter groups; 0 from max_steps on.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        initial_lr: float,
        max_steps: int,
        exponent: float = 0.9,
        current_step: int | None = None,
    ) -> None:
        require_positive_length(max_steps, "max_steps")
        self.initial_lr = initial_lr
        self.max_steps = max_steps
        self.exponent = exponent
        super().__init__(optimizer, current_step or 0)

    def lr_at(self, step: int) -> float:
        """Return the learning rate at a step, counted from 0."""
        return polynomial_decay(self.initial_lr, step / self.max_steps, self.exponent)
