"""Merge the outputs of the steps of an epoch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def collate_outputs(outputs: Sequence[dict]) -> dict:
    """Merge dicts with equal keys into one.

    Numbers to a list, arrays to one array with a new first axis, lists joined. Arrays without an axis, such as losses,
    become a column `(n, 1)`.

    The first dict decides the keys and their types.

    Raises:
        ValueError: A value is of any other type.
    """
    return {key: _collate(key, [output[key] for output in outputs]) for key in outputs[0]}


def _collate(key: object, values: list) -> list | np.ndarray:
    first = values[0]
    if np.isscalar(first):
        return values
    if isinstance(first, (np.ndarray, np.lib.mixins.NDArrayOperatorsMixin)):  # the latter: arrays still on a GPU
        # Single numbers, such as a loss, become (steps, 1).
        return np.vstack([np.asarray(value)[None] for value in values])
    if isinstance(first, list):
        return [entry for value in values for entry in value]
    raise ValueError(f"cannot collate {key!r} of type {type(first).__name__}: use numbers, NumPy arrays or lists")
