"""Exchange tensors between the processes of a distributed training."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed

from nnunetv2.utilities.plain_text import show


def print_if_rank0(*args: object) -> None:
    """Print in one process only; the same as print without distributed training."""
    if not _is_distributed() or distributed.get_rank() == 0:
        show(*" ".join(map(str, args)).split("\n"))


class AllGatherGrad(torch.autograd.Function):
    """Gather tensors of one shape from all processes, with gradients.

    `(...)` becomes `(processes, ...)`.
    """

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any = None) -> torch.Tensor:
        ctx.group = group
        shares = [torch.empty_like(tensor) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(shares, tensor.contiguous(), group=group)
        return torch.stack(shares)

    @staticmethod
    def backward(ctx: Any, *grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        # Every process has its own loss of all shares, so a share's gradient is the sum over processes.
        (gradient,) = grad_output
        gradient = gradient.contiguous().clone()
        distributed.all_reduce(gradient, group=ctx.group)
        return gradient[distributed.get_rank(ctx.group)], None


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
