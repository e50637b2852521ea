"""List predicted label maps with their references."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from nnunetv2.preprocessed_data.bad_cases import find_bad_cases_of
from nnunetv2.utilities import file_endings


def list_pairs(folder_ref: str, folder_pred: str, file_ending: str, *, chill: bool) -> dict[str, tuple[str, str]]:
    """Return name -> (prediction, reference) of all predictions of a folder, sorted by name.

    Args:
        chill: If False, every reference must have been predicted, but for cases that the dataset does without.

    Raises:
        AssertionError: Predictions are missing.
        FileNotFoundError: There is no prediction, or one without reference.
    """
    predicted, references = list_names(folder_pred, file_ending), list_names(folder_ref, file_ending)
    left_out = find_bad_cases_of(folder_ref)
    missing = sorted(
        name for name in set(references) - set(predicted) if name.removesuffix(file_ending) not in left_out
    )
    if missing and not chill:
        raise AssertionError(
            f"{len(missing)} of {len(references)} references in {folder_ref} have no prediction in "
            f"{folder_pred}: {_shorten(missing)}. Pass --chill (chill=True) to score the others alone"
        )
    if not predicted:
        raise FileNotFoundError(f"no prediction found in {folder_pred}: no file ends in {file_ending}")
    strangers = sorted(set(predicted) - set(references))
    if strangers:
        raise FileNotFoundError(
            f"{len(strangers)} of {len(predicted)} predictions in {folder_pred} have no reference "
            f"in {folder_ref}: {_shorten(strangers)}"
        )
    return {name: (os.path.join(folder_pred, name), os.path.join(folder_ref, name)) for name in predicted}


def list_names(folder: str, file_ending: str) -> list[str]:
    """Return the sorted names of a folder's files with an ending.

    Links to missing files are included.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    return file_endings.list_names(folder, file_ending)


def first_reference(folder_ref: str, endings: Sequence[str]) -> str:
    """Return the name of the first file with one of the endings.

    Raises:
        FileNotFoundError: There is none.
    """
    names = [name for name in list_names(folder_ref, "") if name.lower().endswith(tuple(endings))]
    if not names:
        raise FileNotFoundError(f"no reference found in {folder_ref}: no file ends in {', '.join(endings)}")
    return names[0]


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
