"""Initialise the weights of networks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


class InitWeights_He:
    """Draw the weights of (transposed) convolutions as He et al. 2015 do for leaky ReLU.

    Set their biases to 0.

    Use it as `network.apply(InitWeights_He(1e-2))`.
    """

    def __init__(self, neg_slope: float = 1e-2) -> None:
        self.neg_slope = neg_slope

    def __call__(self, module: nn.Module) -> None:
        from torch import nn

        if not isinstance(module, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            return
        nn.init.kaiming_normal_(module.weight, a=self.neg_slope)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
