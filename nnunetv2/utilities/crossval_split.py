"""Split training cases into the folds of a cross-validation, and read such splits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2.utilities.json_files import read_json


def generate_crossval_split(train_identifiers: Sequence[str], seed: int = 12345, n_splits: int = 5) -> list[dict]:
    """Split identifiers into `n_splits` pairs of training and validation cases; each case is validated once.

    The order of `train_identifiers` matters, the order within each list follows it. The split equals the one of
    scikit-learn's `KFold(n_splits, shuffle=True, random_state=seed)`, without its import time.

    Returns:
        One dict `{"train": [...], "val": [...]}` per fold.

    Raises:
        ValueError: There are fewer cases than folds, or fewer than two folds.
    """
    identifiers = np.array(train_identifiers)
    if n_splits < 2 or len(identifiers) < n_splits:
        raise ValueError(
            f"cannot split {len(identifiers)} training cases into {n_splits} folds; every fold needs a "
            "case (train with fold 'all', or write splits_final.json yourself)"
        )
    order = np.arange(len(identifiers))
    np.random.RandomState(seed).shuffle(order)
    folds = [np.sort(fold) for fold in np.array_split(order, n_splits)]
    return [{"train": list(np.delete(identifiers, fold)), "val": list(identifiers[fold])} for fold in folds]


def read_splits(path: Path) -> list[dict]:
    """Read splits_final.json, a list with one dict `{"train": [...], "val": [...]}` per fold.

    Raises:
        ValueError: The file holds something else; the message names it, and the fold.
    """
    splits = read_json(path, list, refuse_duplicates=True)
    wrong = [str(fold) for fold, split in enumerate(splits) if not _is_split(split)]
    if wrong:
        raise ValueError(
            f'{path} must hold a list with one entry {{"train": [...], "val": [...]}} per fold, where '
            f"the dots are names of cases in quotes; fold {', '.join(wrong)} is none (folds count from 0)"
        )
    return splits


def _is_split(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(part), list) and all(isinstance(case, str) for case in value[part])
        for part in ("train", "val")
    )
