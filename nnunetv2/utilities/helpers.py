"""Small torch helpers that trainers and predictors share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def softmax_helper_dim0(x: torch.Tensor) -> torch.Tensor:
    """Apply softmax over axis 0, the classes of one case `(c, ...)`."""
    return x.softmax(0)


def softmax_helper_dim1(x: torch.Tensor) -> torch.Tensor:
    """Apply softmax over axis 1, the classes of a batch `(b, c, ...)`."""
    return x.softmax(1)


def empty_cache(device: torch.device) -> None:
    """Give cached, unused memory of a GPU back to it; do nothing on a CPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


class dummy_context:
    """A context manager that does nothing."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, exc_type: object, exc_value: object, traceback: object) -> None:
        return None
