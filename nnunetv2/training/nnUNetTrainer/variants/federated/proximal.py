"""Keep a site's weights near those of its round: the proximal term of FedProx.

The loss of a site gets MU/2 |w - w_round|^2 (Li et al., Federated Optimization in Heterogeneous Networks, MLSys 2020).
Its gradient, MU (w - w_round), is added where the optimizer steps, after clipping: so it works with any loss, optimizer
and precision, and the logged losses stay those of the data.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class ProximalTerm:
    """Add the gradient of the proximal term at each step of an optimizer.

    Args:
        mu: Its strength, above 0.
    """

    def __init__(self, mu: float) -> None:
        self.mu = mu
        self._anchors: dict[nn.Parameter, torch.Tensor] = {}
        self._optimizer: torch.optim.Optimizer | None = None

    @torch.no_grad()
    def anchor(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep the present values of parameters, towards which steps pull from then on."""
        self._anchors = {
            parameter: self._anchors[parameter].copy_(parameter)
            if parameter in self._anchors
            else parameter.detach().clone()
            for parameter in parameters
        }

    def attach_(self, optimizer: torch.optim.Optimizer) -> None:
        """Act on the steps of an optimizer; a trainer may have built another one since."""
        if optimizer is not self._optimizer:
            optimizer.register_step_pre_hook(self._pull)
            self._optimizer = optimizer

    def release(self) -> None:
        """Pull no more."""
        self._anchors = {}

    @torch.no_grad()
    def _pull(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        pulled = [
            parameter
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and parameter in self._anchors
        ]
        if pulled:
            away = torch._foreach_sub(pulled, [self._anchors[parameter] for parameter in pulled])
            torch._foreach_add_([parameter.grad for parameter in pulled], away, alpha=self.mu)
