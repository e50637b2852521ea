"""Build a raw dataset that appears only when it is complete."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from nnunetv2.errors import InvalidInputError
from nnunetv2.utilities.atomic_write import A_DAY_S, make_scratch, remove_leftovers


@contextmanager
def building_dataset(name: str) -> Iterator[Path]:
    """Yield an empty folder for a new dataset.

    It becomes `nnUNet_raw/name` once the block has succeeded, and is removed otherwise, a day later if the process
    was killed.

    Raises:
        InvalidInputError: The name is no dataset name, or its number is taken.
    """
    from nnunetv2.paths import nnUNet_raw

    root = Path(nnUNet_raw)
    require_free_name(name)
    if not root.is_dir():
        raise InvalidInputError(f"the folder {root}, which nnUNet_raw names, does not exist")
    remove_leftovers(root, older_than_s=A_DAY_S)
    scratch = make_scratch(root)
    try:
        folder = scratch / name
        folder.mkdir()
        yield folder
        folder.rename(root / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def require_free_name(name: str) -> None:
    """Refuse a name that no other command would find, or whose number another dataset has."""
    from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id, find_candidate_datasets

    if re.fullmatch(r"Dataset\d{3,}_\w[\w.-]*", name, re.ASCII) is None:
        raise InvalidInputError(
            f"{name!r} is no dataset name: it must be Dataset, three digits, an underscore and a "
            f"name without spaces, such as Dataset004_Hippocampus"
        )
    number = convert_dataset_name_to_id(name)
    present = find_candidate_datasets(number)
    if len(present):
        raise DatasetExistsError(
            f"the number {number} is taken by {', '.join(map(str, present))} (in nnUNet_raw, "
            f"nnUNet_preprocessed or nnUNet_results). Choose another, or remove that dataset"
        )


class DatasetExistsError(InvalidInputError, RuntimeError):
    """There is a dataset of this number already."""


def invert_labels(labels: Mapping[str, str]) -> dict[str, int]:
    """Turn {"0": "background", "1": "liver"}, as dataset.json had it once, into {"background": 0, "liver": 1}.

    Raises:
        InvalidInputError: A key is no whole number, or two labels share a name.
    """
    try:
        inverted = {name: int(value) for value, name in labels.items()}
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"dataset.json has labels {dict(labels)}; expected numbers with their names, such as "
            f'{{"0": "background", "1": "liver"}}'
        ) from error
    if len(inverted) < len(labels):
        raise InvalidInputError(f"dataset.json gives two labels the same name: {dict(labels)}")
    return inverted


def require_keys(content: Mapping[str, object], keys: tuple[str, ...], file: Path) -> None:
    """Raise InvalidInputError if one of the keys is missing."""
    missing = [key for key in keys if key not in content]
    if missing:
        raise InvalidInputError(f"{file} lacks {', '.join(missing)}")
