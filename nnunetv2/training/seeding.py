"""Make trainings repeat: the environment variable nnUNet_seed, an extension of this package.

The option `--seed` sets it for one training.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

SEED_VARIABLE = "nnUNet_seed"


def seed_from_environment() -> int | None:
    """Return the seed that the user asked for, or None.

    Raises:
        ValueError: It is no whole number from 0 to 4294967295.
    """
    text = os.environ.get(SEED_VARIABLE)
    if not text:
        return None
    if not text.isdecimal() or int(text) >= 2**32:
        raise ValueError(f"{SEED_VARIABLE} is {text!r}: set it to a whole number from 0 to {2**32 - 1}, or unset it")
    return int(text)


def use_seed(seed: int) -> None:
    """Let this process, and those that it starts, train with a seed from now on."""
    os.environ[SEED_VARIABLE] = str(seed)


@contextmanager
def seed_restored() -> Iterator[None]:
    """Undo `use_seed` at the end of the block."""
    before = os.environ.get(SEED_VARIABLE)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(SEED_VARIABLE, None)
        else:
            os.environ[SEED_VARIABLE] = before


def seed_epoch(epoch: int, rank: int) -> None:
    """Begin new random sequences with an epoch, if the user set a seed.

    They depend on nothing but seed, epoch and process, so that a training that goes on from a checkpoint draws the same
    numbers as without the interruption.
    """
    seed = seed_from_environment()
    if seed is not None:
        from nnunetv2.training.data_augmentation.numbered_batches import seed_generators

        seed_generators([seed, rank, epoch])


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch, and choose deterministic algorithms on a GPU.

    Two runs of one training on the same machine then give the same weights, with any number of augmentation workers:
    these derive their random numbers from the seed and the number of the batch, not from this process.
    """
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
