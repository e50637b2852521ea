"""Compute instance normalization on a CPU the fast way.

Instance normalization is group normalization with a group per channel. torch computes the latter in one vectorised pass
over each sample and channel, in bfloat16 too; its instance normalization goes through the one of batches, which takes
several times as long and, in bfloat16, more than half the time of a training step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from torch.nn.modules.instancenorm import _InstanceNorm
else:
    _InstanceNorm = object


class _FastInstanceNorm(_InstanceNorm):
    """Mixin before a class of torch: the same parameters, the same result up to rounding."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize `(b, c, *spatial)`."""
        is_simple = not self.track_running_stats and x.shape[1] == self.num_features
        if x.device.type != "cpu" or not is_simple or x.ndim < 3:
            return super().forward(x)
        return functional.group_norm(x, self.num_features, self.weight, self.bias, self.eps)


class FastInstanceNorm1d(_FastInstanceNorm, nn.InstanceNorm1d):
    """Instance normalization of `(b, c, x)`."""


class FastInstanceNorm2d(_FastInstanceNorm, nn.InstanceNorm2d):
    """Instance normalization of `(b, c, y, x)`."""


class FastInstanceNorm3d(_FastInstanceNorm, nn.InstanceNorm3d):
    """Instance normalization of `(b, c, z, y, x)`."""


_FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.InstanceNorm1d: FastInstanceNorm1d,
    nn.InstanceNorm2d: FastInstanceNorm2d,
    nn.InstanceNorm3d: FastInstanceNorm3d,
}


def use_fast_instance_norm_(network: nn.Module) -> nn.Module:
    """Let the instance normalizations of a network compute fast on a CPU.

    Subclasses of torch's stay as they are.
    """
    for module in network.modules():
        module.__class__ = _FAST.get(type(module), type(module))
    return network
