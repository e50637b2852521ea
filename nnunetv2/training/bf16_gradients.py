"""Find convolutions whose weight gradients a CPU computes wrongly in bfloat16.

With torch 2.13 (oneDNN) on processors with AVX512-BF16, the weight gradient of a 3D convolution is garbage (1e36, NaN;
with kernels of 7 also memory beyond the array is written) where the first spatial axis of its input is longer than 1
and shorter than the kernel. Outputs and gradients of inputs are right, so predictions are not concerned. Small channel
numbers, some strides and dilations escape; the rule here leaves them out, as it is meant to be safe and simple.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS = (torch.conv3d, torch.conv_transpose3d)


def describe_wrong_gradients(network: nn.Module, data: torch.Tensor) -> str | None:
    """Describe the first convolution whose weight gradient would be wrong; None if there is none.

    The network predicts the data once, without gradients and in evaluation mode; it is left as it was.
    """
    if data.ndim != 5:
        return None
    with _undisturbed(network), torch.no_grad(), _ConvolutionWatch() as watch:
        network(data)
    return watch.found


class _ConvolutionWatch(TorchFunctionMode):
    """See every 3D convolution, also those that a network of others calls as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.found: str | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _CONVOLUTIONS and self.found is None:
            values, weight = (*args, kwargs.get("input"), kwargs.get("weight"))[:2]
            depth, kernel = values.shape[-3], weight.shape[-3]
            if 1 < depth < kernel:
                self.found = f"kernel {_by(weight.shape[-3:])} on {_by(values.shape[-3:])} voxels"
        return func(*args, **kwargs)


@contextlib.contextmanager
def _undisturbed(network: nn.Module) -> Iterator[None]:
    """Evaluate a network, and restore its modes and torch's random state afterwards."""
    modes = {module: module.training for module in network.modules()}
    with torch.random.fork_rng(devices=[]):
        network.eval()
        try:
            yield
        finally:
            for module, is_training in modes.items():
                module.training = is_training


def _by(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
