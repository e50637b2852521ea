"""Build the optimizer, and keep its state independent of its implementation."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

HOW_TO_COMPUTE = ("foreach", "fused", "capturable", "differentiable")
"""Settings of an optimizer that choose its implementation. They belong to the machine, not to the checkpoint."""

MOMENTUM = 0.99


class EagerSGD(torch.optim.SGD):
    """Compute the steps of `torch.optim.SGD` without loading the compiler of torch.

    torch wraps these methods so that torch.compile leaves them alone, and the wrappers import torch._dynamo when they
    are called first: more than a second, and 100 MiB, of which a training that compiles nothing has no use.
    """

    add_param_group = inspect.unwrap(torch.optim.SGD.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.SGD.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.SGD.state_dict)
    zero_grad = inspect.unwrap(torch.optim.SGD.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


def build_sgd(
    network: nn.Module, *, initial_lr: float, weight_decay: float, device: torch.device, momentum: float = MOMENTUM
) -> torch.optim.SGD:
    """Return SGD with Nesterov momentum, which updates all weights in one pass where torch can.

    On CUDA it decides on the GPU whether to skip a step, without waiting.
    """
    options = {"fused": True} if can_be_fused(device) else {}
    sgd = torch.optim.SGD if device.type == "cuda" else EagerSGD  # on CUDA the network is compiled, so it is loaded
    return sgd(network.parameters(), initial_lr, weight_decay=weight_decay, momentum=momentum, nesterov=True, **options)


def build_adamw(
    network: nn.Module, *, initial_lr: float, weight_decay: float, betas: tuple[float, float], device: torch.device
) -> torch.optim.AdamW:
    """Return AdamW, which updates all weights in one pass where torch can."""
    options = {"fused": True} if can_be_fused(device) else {}
    return torch.optim.AdamW(network.parameters(), initial_lr, weight_decay=weight_decay, betas=betas, **options)


def build_grad_scaler(device: torch.device) -> torch.amp.GradScaler | None:
    """Return the scaler that keeps small float16 gradients from vanishing.

    Only CUDA trains in float16.
    """
    return torch.amp.GradScaler("cuda") if device.type == "cuda" else None


def portable_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimizer's state as any machine and any version of torch loads it."""
    state = optimizer.state_dict()
    groups = [
        {key: None if key in ("foreach", "fused") else value for key, value in group.items()}
        for group in state["param_groups"]
    ]
    return {**state, "param_groups": groups}


def load_optimizer_state_(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state, and keep the optimizer's ways to compute.

    The memory layout of the parameters stays, too.
    """
    settings = [{key: group[key] for key in HOW_TO_COMPUTE if key in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, kept in zip(optimizer.param_groups, settings):
        group.update(kept)
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.ndim > 1:
                entries[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def can_be_fused(device: torch.device) -> bool:
    """Tell whether SGD and Adam update all weights in one pass there."""
    return device.type in ("cuda", "cpu")
