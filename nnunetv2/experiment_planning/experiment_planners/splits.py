"""Carry the splits that come with a raw dataset over to its preprocessed folder."""

from __future__ import annotations

from pathlib import Path

from nnunetv2.errors import InvalidInputError
from nnunetv2.utilities.atomic_write import copy_atomically
from nnunetv2.utilities.crossval_split import read_splits

SPLITS_FILE = "splits_final.json"


def adopt_splits(raw_folder: Path, preprocessed_folder: Path) -> None:
    """Copy the raw dataset's splits_final.json, or check that folds are equal.

    Folds are compared as sets; the file in place may have further folds.

    Raises:
        InvalidInputError: A fold differs.
        ValueError: One of the files makes no sense.
    """
    source, target = raw_folder / SPLITS_FILE, preprocessed_folder / SPLITS_FILE
    if not source.is_file():
        return
    if not target.is_file():
        preprocessed_folder.mkdir(parents=True, exist_ok=True)
        copy_atomically(source, target)
        return
    wanted, present = (read_splits(file) for file in (source, target))
    for fold, split in enumerate(wanted):
        if fold >= len(present) or any(set(split[part]) != set(present[fold][part]) for part in ("train", "val")):
            raise InvalidInputError(
                f"fold {fold} of {source} differs from {target}. Remove the latter if the former "
                f"is to be used; models trained so far keep to the latter"
            )
