"""Build the optimizer, and keep what it remembers independent of how it computes."""
from __future__ import annotations

from typing import Any

import torch
from torch import nn

HOW_TO_COMPUTE = ("foreach", "fused", "capturable", "differentiable")
"""Settings of an optimizer that say how, not what, it computes. They belong to the machine, not to the checkpoint."""

MOMENTUM = 0.99


def build_sgd(network: nn.Module, *, initial_lr: float, weight_decay: float,
              device: torch.device) -> torch.optim.SGD:
    """Return SGD with Nesterov momentum. On CUDA it decides on the GPU whether to skip a step, without waiting."""
    options = {"fused": True} if device.type == "cuda" and _sgd_can_be_fused() else {}
    return torch.optim.SGD(network.parameters(), initial_lr, weight_decay=weight_decay, momentum=MOMENTUM,
                           nesterov=True, **options)


def build_grad_scaler(device: torch.device) -> torch.amp.GradScaler | None:
    """Return what keeps small float16 gradients from vanishing; only CUDA trains in float16."""
    if device.type != "cuda":
        return None
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler("cuda")
    return torch.cuda.amp.GradScaler()  # torch before 2.3


def portable_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimizer's state as any machine and any version of torch loads it."""
    state = optimizer.state_dict()
    groups = [{key: None if key in ("foreach", "fused") else value for key, value in group.items()}
              for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def load_optimizer_state_(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state; how to compute, and the memory layout of the parameters, stay as they are here."""
    settings = [{key: group[key] for key in HOW_TO_COMPUTE if key in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, kept in zip(optimizer.param_groups, settings):
        group.update(kept)
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.ndim > 1:
                entries[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _sgd_can_be_fused() -> bool:
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 3)
