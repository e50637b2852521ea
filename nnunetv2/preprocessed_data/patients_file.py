"""The file that names the patient of each case, so that no split separates them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunetv2.utilities.atomic_write import save_json_atomically
from nnunetv2.utilities.json_files import JsonFileError, read_json

PATIENTS_FILE = "patients.json"
"""In the raw dataset, from which preprocessing copies it to the preprocessed one, where also `nnUNetv2_make_splits`
writes it."""

_SHOWN = 3


@dataclass(frozen=True)
class SeparatedPatient:
    """A patient with cases on both sides of a fold."""

    fold: int
    patient: str
    train: tuple[str, ...]
    val: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"patient {self.patient} is on both sides of fold {self.fold}: trained on {_some(self.train)}, "
            f"validated on {_some(self.val)}"
        )


def save_patients(patients: Mapping[str, str], folder: Path) -> None:
    """Write case -> patient to a preprocessed dataset."""
    save_json_atomically(dict(patients), folder / PATIENTS_FILE)


def load_patients(folder: Path) -> dict[str, str]:
    """Return case -> patient of a raw or preprocessed dataset; empty where nobody has said.

    Raises:
        JsonFileError: The file holds something else.
    """
    file = folder / PATIENTS_FILE
    if not file.is_file():
        return {}
    content = read_json(file, refuse_duplicates=True)
    odd = next((case for case, patient in content.items() if not isinstance(patient, str) or not patient), None)
    if odd is not None:
        raise JsonFileError(f'{file}: the patient of case {odd!r} must be a text, as in {{"case_001": "P17"}}')
    return content


def require_same_patients(
    patients: Mapping[str, str], declared: Mapping[str, str], source: object, raw: object
) -> None:
    """Check that patients are those that a raw dataset declares.

    Args:
        source: Where `patients` come from, for messages.
        raw: Folder of the raw dataset.

    Raises:
        ValueError: A case has another patient there.
    """
    odd = next((case for case in patients if declared.get(case, patients[case]) != patients[case]), None)
    if odd is not None:
        raise ValueError(
            f"{source} names patient {patients[odd]} for case {odd}, {raw}/{PATIENTS_FILE} names {declared[odd]}: "
            "correct one of them"
        )


def find_separated(folds: Sequence[Mapping[str, Sequence[str]]], patients: Mapping[str, str]) -> list[SeparatedPatient]:
    """Find patients that a fold both trains on and validates on.

    A case without a patient is one of its own.
    """
    separated = []
    for fold, split in enumerate(folds):
        train, val = (_by_patient(split[part], patients) for part in ("train", "val"))
        separated += [
            SeparatedPatient(fold, patient, tuple(train[patient]), tuple(val[patient]))
            for patient in sorted(train.keys() & val.keys())
        ]
    return separated


def _by_patient(cases: Sequence[str], patients: Mapping[str, str]) -> dict[str, list[str]]:
    of_patient: dict[str, list[str]] = {}
    for case in cases:
        if case in patients:
            of_patient.setdefault(patients[case], []).append(case)
    return of_patient


def _some(cases: Sequence[str]) -> str:
    more = f" and {len(cases) - _SHOWN} more" if len(cases) > _SHOWN else ""
    return ", ".join(cases[:_SHOWN]) + more
