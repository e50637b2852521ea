"""Know which scans belong to the same patient.

    nnUNet_raw/<dataset>/patients.json, which preprocessing copies to nnUNet_preprocessed/<dataset>

    {"case_001": "P17", "case_002": "P17", "case_003": "P18"}

`nnUNetv2_make_splits --patients` writes it, too. Without it each scan counts as a patient of its own, and all that is
promised is promised per scan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nnunetv2.preprocessed_data.patients_file import PATIENTS_FILE, load_patients, require_same_patients


@dataclass(frozen=True)
class Patients:
    """The patients of a training split."""

    cases_of: dict[str, list[str]]
    """Patient -> cases, both sorted."""
    unit: Literal["patient", "scan"]
    """The unit that is drawn, clipped and protected as one."""

    def __len__(self) -> int:
        return len(self.cases_of)

    @property
    def are_scans(self) -> bool:
        """Tell whether each patient has one scan, so that both units are the same."""
        return all(len(cases) == 1 for cases in self.cases_of.values())


def read_patients(preprocessed: Path, raw: Path | None) -> dict[str, str] | None:
    """Return case -> patient, or None if the dataset does not say.

    Args:
        preprocessed: Folder of the dataset below nnUNet_preprocessed.
        raw: The same below nnUNet_raw, where that is known.

    Raises:
        JsonFileError: A file is no mapping of texts to texts.
        ValueError: There are two files, and they differ.
    """
    patient_of = load_patients(preprocessed)
    declared = {} if raw is None else load_patients(raw)
    require_same_patients(patient_of, declared, preprocessed / PATIENTS_FILE, raw)
    return patient_of or declared or None


def group_by_patient(cases: Sequence[str], patient_of: dict[str, str] | None) -> Patients:
    """Group the training cases by patient.

    Raises:
        ValueError: A case has no patient.
    """
    if patient_of is None:
        return Patients({case: [case] for case in sorted(cases)}, "scan")
    missing = sorted(set(cases) - patient_of.keys())
    if missing:
        raise ValueError(
            f"{PATIENTS_FILE} names no patient for case {missing[0]} ({len(missing)} of {len(cases)} training cases): "
            "add them, or run nnUNetv2_make_splits --patients again"
        )
    grouped: dict[str, list[str]] = {}
    for case in sorted(cases):
        grouped.setdefault(patient_of[case], []).append(case)
    return Patients(dict(sorted(grouped.items())), "patient")


def datasets_with_the_same_cases(ledger_file: Path) -> list[str]:
    """Return other datasets with a ledger whose cases seem to be the same.

    Their cases have the same names, and labels of the same sizes.

    A copy of patients under another id spends their budget in silence. That can be hinted at, not proved.
    """
    own = _cases_digest(ledger_file.parent)
    return [
        other.parent.name
        for other in sorted(ledger_file.parent.parent.glob(f"*/{ledger_file.name}"))
        if other.parent != ledger_file.parent and own is not None and _cases_digest(other.parent) == own
    ]


def _cases_digest(folder: Path) -> str | None:
    """Return a digest of names and sizes of a dataset's labels; None if there are none."""
    files = sorted((folder / "gt_segmentations").glob("*"))
    lines = [f"{file.name} {file.stat().st_size}" for file in files if file.is_file()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else None
