"""Which scans belong to whom."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nnunetv2.preprocessed_data.patients_file import PATIENTS_FILE
from nnunetv2.training.differential_privacy.patients import (
    datasets_with_the_same_cases,
    group_by_patient,
    read_patients,
)

PATIENT_OF = {"c1": "P1", "c2": "P1", "c3": "P2"}


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    for name in ("preprocessed", "raw"):
        (tmp_path / name).mkdir()
    return tmp_path / "preprocessed", tmp_path / "raw"


def write(folder: Path, content) -> None:
    (folder / PATIENTS_FILE).write_text(json.dumps(content))


def test_without_a_file_nobody_knows(folders):
    assert read_patients(*folders) is None
    assert read_patients(folders[0], None) is None


@pytest.mark.parametrize("where", [0, 1])
def test_the_file_is_found_in_either_folder(folders, where):
    write(folders[where], PATIENT_OF)
    assert read_patients(*folders) == PATIENT_OF


def test_files_that_contradict_each_other_are_refused(folders):
    write(folders[0], PATIENT_OF)
    write(folders[1], {**PATIENT_OF, "c3": "P3"})
    with pytest.raises(ValueError, match=r"names patient P2 for case c3, .*raw/patients.json names P3"):
        read_patients(*folders)


@pytest.mark.parametrize("patient", [3, "", None, ["P1"]])
def test_a_patient_is_a_text(folders, patient):
    write(folders[0], {"c1": patient})
    with pytest.raises(ValueError, match="the patient of case 'c1' must be a text"):
        read_patients(*folders)


def test_cases_are_grouped_by_patient():
    found = group_by_patient(["c3", "c2", "c1"], PATIENT_OF)
    assert found.cases_of == {"P1": ["c1", "c2"], "P2": ["c3"]}
    assert (len(found), found.unit, found.are_scans) == (2, "patient", False)


def test_without_patients_each_scan_is_one():
    found = group_by_patient(["c2", "c1"], None)
    assert found.cases_of == {"c1": ["c1"], "c2": ["c2"]}
    assert (found.unit, found.are_scans) == ("scan", True)


def test_a_case_without_a_patient_is_named():
    with pytest.raises(ValueError, match=r"names no patient for case c9 \(1 of 2 training cases\): add them, or run"):
        group_by_patient(["c1", "c9"], PATIENT_OF)


def test_a_copy_under_another_id_is_hinted_at(tmp_path):
    for name, size in (("Dataset001_A", 3), ("Dataset002_B", 3), ("Dataset003_C", 4)):
        labels = tmp_path / name / "gt_segmentations"
        labels.mkdir(parents=True)
        (labels / "c1.nii.gz").write_bytes(b"x" * size)
        (tmp_path / name / "privacy_ledger.jsonl").touch()
    assert datasets_with_the_same_cases(tmp_path / "Dataset001_A" / "privacy_ledger.jsonl") == ["Dataset002_B"]
