"""Check epochs, and name errors so that the name may leave the site."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nnunetv2.federated.errors import NonFiniteError, ShortEpochError

_OUT_OF_MEMORY = ("DefaultCPUAllocator", "out of memory", "Cannot allocate memory")
_DEAD_WORKER = "background workers"


def check_epoch(outputs: Sequence[dict], *, epoch: int, num_iterations: int) -> None:
    """Raise an error for an epoch cut short or with broken losses.

    Args:
        outputs: Results of the training steps.

    Raises:
        ShortEpochError: There were fewer steps than there should have been.
        NonFiniteError: A loss is NaN or infinite.
    """
    if len(outputs) < num_iterations:
        raise ShortEpochError(
            f"epoch {epoch} had {len(outputs)} of {num_iterations} iterations: nothing is sent. "
            "Go on from the last checkpoint with --c"
        )
    losses = [
        np.asarray(output["loss"], dtype=np.float64)
        for output in outputs
        if isinstance(output, dict) and "loss" in output
    ]
    broken = [number for number, loss in enumerate(losses) if not np.isfinite(loss).all()]
    if broken:
        raise NonFiniteError(
            f"the training loss is NaN or infinite from iteration {broken[0]} of epoch {epoch} on "
            f"({len(broken)} of {len(losses)}): nothing is sent. Look for broken images or labels, "
            "and go on from the last checkpoint with --c"
        )


def kind_of(error: BaseException) -> str:
    """Return the kind of an error; its text may quote case names."""
    text = str(error)
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or (
        isinstance(error, (RuntimeError, OSError)) and any(sign in text for sign in _OUT_OF_MEMORY)
    ):
        return "OutOfMemoryError"
    if isinstance(error, RuntimeError) and _DEAD_WORKER in text:
        return "DataLoaderError"
    return type(error).__name__
