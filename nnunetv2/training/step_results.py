"""Keep results of steps on the GPU until they are read.

Fetching each at once would stop the GPU in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


class PendingArray(np.lib.mixins.NDArrayOperatorsMixin):
    """A NumPy array on its way from a GPU.

    Computing with it, or printing it, waits for it.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()
        self._fetched: np.ndarray | None = None

    @property
    def is_pending(self) -> bool:
        """Whether nobody has read it so far."""
        return self._fetched is None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self._fetched is None:
            self._fetched = self.tensor.cpu().numpy()
        return self._fetched.astype(dtype) if dtype is not None else self._fetched

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        if "out" in options:  # as in `counts += 1`
            options["out"] = tuple(map(_plain, options["out"]))
        return getattr(ufunc, method)(*map(_plain, inputs), **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(np.asarray(self), name)

    def __getitem__(self, index: Any) -> Any:
        return np.asarray(self)[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        np.asarray(self)[index] = value

    def __len__(self) -> int:
        return len(self.tensor)

    def __reduce__(self) -> tuple[Any, ...]:
        return np.asarray, (np.asarray(self),)  # another process may not reach this GPU

    def __float__(self) -> float:
        return float(np.asarray(self))

    def __int__(self) -> int:
        return int(np.asarray(self))

    def __bool__(self) -> bool:
        return bool(np.asarray(self))

    def __format__(self, specification: str) -> str:
        array = np.asarray(self)
        return format(array.item() if array.ndim == 0 else array, specification)

    def __repr__(self) -> str:
        return repr(np.asarray(self))


def as_result(tensor: torch.Tensor) -> np.ndarray | PendingArray:
    """Return a tensor as an array, fetched from a GPU when read."""
    return PendingArray(tensor) if tensor.is_cuda else tensor.detach().cpu().numpy()


def latest_loss(outputs: Sequence[Any]) -> float | None:
    """Return the loss of the latest step, or None.

    It waits for the GPU.
    """
    loss = outputs[-1].get("loss") if outputs and isinstance(outputs[-1], dict) else None
    return None if loss is None or np.size(loss) != 1 else float(loss)


def fetch(outputs: Sequence[Any]) -> list[Any]:
    """Return the results of an epoch's steps as NumPy arrays.

    It waits for the GPU once per kind of result.
    """
    outputs = list(outputs)
    steps = [output for output in outputs if isinstance(output, dict)]
    alike = [name for name in (steps[0] if steps else ()) if _are_alike([output.get(name) for output in steps])]
    fetched = {name: torch.stack([output[name].tensor for output in steps]).cpu().numpy() for name in alike}
    # With the ellipsis, single numbers stay arrays, as they are on a CPU.
    plain = iter(
        {name: fetched[name][i, ...] if name in fetched else _plain(value) for name, value in output.items()}
        for i, output in enumerate(steps)
    )
    return [next(plain) if isinstance(output, dict) else output for output in outputs]


def _are_alike(values: Sequence[Any]) -> bool:
    """Tell whether all are pending and of one shape, so that they can be fetched together."""
    return all(isinstance(value, PendingArray) and value.is_pending for value in values) and (
        len({value.tensor.shape for value in values}) == 1
    )


def _plain(value: Any) -> Any:
    return np.asarray(value) if isinstance(value, PendingArray) else value
