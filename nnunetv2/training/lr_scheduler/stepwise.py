"""Set the learning rate from the number of the step alone.

A resumed training needs no scheduler state.
"""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import _LRScheduler


class StepwiseLRScheduler(_LRScheduler):
    """Base of schedules that compute the rate from the step.

    A subclass does so in `lr_at`.

    `step(t)` goes to step `t` (trainers pass the epoch); `step()` and `step(-1)` go on from the own counter `ctr`. The
    constructor makes one step already, so the optimizer starts with the learning rate of step 0.

    Args:
        first_step: Where the counter starts.
        last_epoch: As in torch: other than -1 says that the optimizer's groups have their `initial_lr` already.
    """

    def __init__(self, optimizer: Optimizer, first_step: int = 0, last_epoch: int = -1) -> None:
        self.ctr = first_step
        super().__init__(optimizer, last_epoch)

    def lr_at(self, step: int) -> float:
        """Return the learning rate of all parameter groups at a step, counted from 0."""
        raise NotImplementedError

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each parameter group at the step that the counter names."""
        return self.lrs_at(self.ctr)

    def lrs_at(self, step: int) -> list[float | Tensor]:
        """Return the learning rate of each parameter group at a step.

        It is one for all unless a schedule says otherwise.
        """
        return [self.lr_at(step)] * len(self.optimizer.param_groups)

    def step(self, current_step: int | None = None) -> None:
        """Set the learning rates of `current_step`.

        None or -1 stand for the next step.
        """
        if current_step is None or current_step == -1:
            current_step = self.ctr
            self.ctr += 1
        self._last_lr = self.lrs_at(current_step)
        for group, lr in zip(self.optimizer.param_groups, self._last_lr):
            group["lr"] = lr


def polynomial_decay(initial_lr: float, progress: float, exponent: float) -> float:
    """Return `initial_lr` at progress 0, falling to 0 at progress 1 and beyond."""
    return initial_lr * max(0.0, 1 - progress) ** exponent


def require_positive_length(steps: int, name: str) -> None:
    """Refuse a schedule without a single step."""
    if steps <= 0:
        raise ValueError(f"{name} must be above 0, got {steps}")
