"""The list of training cases that a dataset does without, damaged or mismatched."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.atomic_write import save_json_atomically
from nnunetv2.utilities.json_files import JsonFileError, read_json
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

T = TypeVar("T")

BAD_CASES_FILE = "bad_cases.json"
"""In the preprocessed dataset. Written with `--without_bad_cases`; later steps leave the same cases out."""

_SHOWN = 10


@dataclass(frozen=True)
class BadCase:
    """A case that is left out, and why."""

    case: str
    file: str
    reason: str


def save_bad_cases(cases: Sequence[BadCase], folder: Path) -> None:
    """Write the list to a preprocessed dataset; without cases there is none."""
    if not cases:
        (folder / BAD_CASES_FILE).unlink(missing_ok=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_json_atomically([asdict(case) for case in cases], folder / BAD_CASES_FILE, sort_keys=False)


def load_bad_cases(folder: Path) -> list[BadCase]:
    """Return the list of a preprocessed dataset; empty if there is none.

    Raises:
        JsonFileError: The file holds something else.
    """
    file = folder / BAD_CASES_FILE
    if not file.is_file():
        return []
    entries = read_json(file, list)
    keys = ("case", "file", "reason")
    if not all(isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in keys) for entry in entries):
        raise JsonFileError(
            f'{file} must hold a list of entries {{"case": "...", "file": "...", "reason": "..."}}. '
            "Write it anew with nnUNetv2_plan_and_preprocess --without_bad_cases"
        )
    return [BadCase(*(entry[key] for key in keys)) for entry in entries]


def list_training_cases(
    raw_folder: str | Path, preprocessed_folder: Path, dataset_json: dict | None = None
) -> dict[str, dict]:
    """Return the files of all training cases that are not on the list.

    In the form {case: {"images": [...], "label": file}}.
    """
    dataset = get_filenames_of_train_images_and_targets(str(raw_folder), dataset_json)
    return without_bad_cases(dataset, preprocessed_folder)


def without_bad_cases(dataset: Mapping[str, T], preprocessed_folder: Path) -> dict[str, T]:
    """Return the cases that are not on the list of a preprocessed dataset."""
    bad = {one.case for one in load_bad_cases(preprocessed_folder)}
    return {case: files for case, files in dataset.items() if str(case) not in bad}


def describe_bad_cases(preprocessed_folder: Path) -> str | None:
    """Return a line on the cases that are left out; None without any."""
    bad = load_bad_cases(preprocessed_folder)
    if not bad:
        return None
    cases = f"{len(bad)} bad {'case is' if len(bad) == 1 else 'cases are'}"
    return f"{cases} left out: {_some(one.case for one in bad)} (reasons in {preprocessed_folder / BAD_CASES_FILE})"


def find_bad_cases_of(references: str | os.PathLike[str]) -> set[str]:
    """Return the cases left out of the dataset that a labelsTr or gt_segmentations belongs to."""
    folder = Path(references).absolute()
    if folder.name == "gt_segmentations":
        return {one.case for one in load_bad_cases(folder.parent)}
    if folder.name == "labelsTr" and nnUNet_preprocessed.is_set():
        return {one.case for one in load_bad_cases(Path(nnUNet_preprocessed) / folder.parent.name)}
    return set()


def _some(cases: Iterable[str]) -> str:
    names = list(cases)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
