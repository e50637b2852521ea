"""Refuse to start where a run would fail after minutes.

Variables are unset, folders missing or read-only.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from nnunetv2.experiment_planning.errors import InvalidDatasetError
from nnunetv2.experiment_planning.integrity.dataset_json import (
    REQUIRED_KEYS,
    locate_dataset_json,
    parse_dataset_json,
    require_keys,
)
from nnunetv2.paths import EnvironmentPath, nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

_TRIAL = 1 << 16  # bytes


def require_dataset(dataset_id: int | str) -> str:
    """Return the name of a readable dataset with a writable preprocessed folder.

    Args:
        dataset_id: Its number or its name.

    Raises:
        RuntimeError: A variable is unset, a folder that one names does not exist or cannot be written to, or there is
            no such dataset.
    """
    raw, preprocessed = _require_root(nnUNet_raw), Path(nnUNet_preprocessed.require())
    if not preprocessed.parent.is_dir():
        raise _describe_missing(nnUNet_preprocessed)
    name = maybe_convert_to_dataset_name(dataset_id)
    if not (raw / name).is_dir():
        raise InvalidDatasetError(
            f"there is no dataset {name} in nnUNet_raw={raw}. Check its name or number, or put its folder there"
        )
    _require_dataset_json(raw / name)
    folders = [preprocessed / name, preprocessed, preprocessed.parent]
    _require_writable(next(folder for folder in folders if folder.exists()))
    return name


def _require_dataset_json(folder: Path) -> None:
    file = locate_dataset_json(folder)
    # without numTraining a fingerprint can be extracted, and planning tells that it is missing
    require_keys(parse_dataset_json(file), file, [key for key in REQUIRED_KEYS if key != "numTraining"])


def _require_root(variable: EnvironmentPath) -> Path:
    root = Path(variable.require())
    if not root.is_dir():
        raise _describe_missing(variable)
    return root


def _describe_missing(variable: EnvironmentPath) -> InvalidDatasetError:
    return InvalidDatasetError(
        f"the environment variable {variable.env_var_name} names the folder {variable.get()}, "
        "which does not exist. Correct the variable, create the folder, or mount the disk that "
        "it is on"
    )


def _require_writable(folder: Path) -> None:
    """Try it, because permissions do not tell about full and read-only disks and network drives."""
    if not folder.is_dir():
        raise InvalidDatasetError(f"{folder} is a file, where preprocessed data need a folder. Remove or rename it")
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_TRIAL))
            file.flush()
    except OSError as error:
        raise InvalidDatasetError(
            f"{folder} cannot be written to ({error.strerror}). Give yourself the right to write "
            "there, free some space, or let nnUNet_preprocessed name another folder"
        ) from error
