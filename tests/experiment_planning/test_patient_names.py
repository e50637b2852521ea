"""Which patient a case shows, as people say or as names suggest."""

import pytest

from nnunetv2.experiment_planning.patient_names import assign_patients, guess_siblings, read_table, suggest_rule

FRAMES = [f"patient{number:03}_frame{frame:02}" for number in (1, 2, 3) for frame in (1, 12)]


@pytest.mark.parametrize("rule", [r"^(patient\d+)_", r"^(?P<patient>[^_]+)_(frame)", r"^patient\d+"])
def test_an_expression_names_the_patient(rule):
    assert assign_patients(FRAMES, rule) == {case: case.split("_")[0] for case in FRAMES}


def test_an_expression_must_match_every_case():
    with pytest.raises(ValueError, match="names no patient for 1 of 7 cases: odd"):
        assign_patients([*FRAMES, "odd"], r"^(patient\d+)_")


def test_what_is_neither_file_nor_expression_is_refused():
    with pytest.raises(ValueError, match="neither a file nor a regular expression"):
        assign_patients(FRAMES, "(patient")
    with pytest.raises(FileNotFoundError, match=r"no table .*patients\.csv"):
        assign_patients(FRAMES, "patients.csv")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_names_patients_whatever_parts_its_columns(tmp_path, delimiter):
    rows = [("Patient", "age", "Case"), ("P1", "40", "a"), ("P1", "41", "b"), ("P2", "9", "c"), ("P3", "1", "test_1")]
    file = tmp_path / "patients.csv"
    file.write_text("\ufeff" + "\n".join(delimiter.join(row) for row in rows) + "\n\n", encoding="utf-8")
    assert assign_patients(["a", "b", "c"], str(file)) == {"a": "P1", "b": "P1", "c": "P2"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "the columns none in its first line; it needs case, and patient"),
        ("name,patient\na,P1\n", "has the columns name, patient"),
        ("case,patient\na,P1\na,P2\nb,P1\n", "line 3: case a is in P1 and in P2"),
        ("case,patient\na,P1\n", "names no patient for 1 of 2 cases: b"),
        ("case,patient\na,P1\nb\n", "line 3: case or patient is empty"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(tmp_path, text, complaint):
    (tmp_path / "patients.csv").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        assign_patients(["a", "b"], str(tmp_path / "patients.csv"))


def test_a_table_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "patients.csv").write_bytes(b"case,patient\na,\xff\n")
    with pytest.raises(ValueError, match="not encoded in UTF-8"):
        assign_patients(["a"], str(tmp_path / "patients.csv"))


@pytest.mark.parametrize("text", ["patient,site\nP1,Bonn\nP2,Ulm\n", "case,hospital\na,Bonn\nb,Bonn\nc,Ulm\n"])
def test_groups_are_named_by_patient_or_case(tmp_path, text):
    (tmp_path / "sites.csv").write_text(text)
    patients = {"a": "P1", "b": "P1", "c": "P2"}
    groups = read_table(tmp_path / "sites.csv", list(patients), what="group", patients=patients)
    assert groups == {"a": "Bonn", "b": "Bonn", "c": "Ulm"}


@pytest.mark.parametrize(
    ("cases", "patients"),
    [
        (FRAMES, ["patient001", "patient002", "patient003"]),
        (["sub-01_ses-1", "sub-01_ses-2_run-1", "sub-02"], ["sub-01"]),
        (["P01_20190101", "P01_20200101", "P02_20190101"], ["P01"]),
        (["BraTS-GLI-00005-100", "BraTS-GLI-00005-101", "BraTS-GLI-00006-100"], ["BraTS-GLI-00005"]),
        (["case_001_left", "case_001_right", "case_002_left"], ["case_001"]),
        (["knee12a", "knee12b", "knee13"], ["knee12"]),
        (["101_baseline", "101_followup", "102_baseline"], ["101"]),
    ],
)
def test_names_like_several_scans_of_one_patient_are_found(cases, patients):
    assert [one.patient for one in guess_siblings(cases)] == patients


@pytest.mark.parametrize(
    "cases",
    [
        [f"hippocampus_{number:03}" for number in range(40)],
        [f"BraTS2021_{number:05}" for number in range(40)],
        [f"{organ}_{number}" for organ in ("liver", "spleen") for number in range(5)],
        [f"s{number:04}" for number in range(40)],
        ["volume-1", "volume-12"],
        [],
    ],
)
def test_numbered_names_are_no_siblings(cases):
    assert guess_siblings(cases) == []


def test_an_expression_is_suggested_only_if_it_serves_all_cases():
    rule = suggest_rule(guess_siblings(FRAMES), FRAMES)
    assert assign_patients(FRAMES, rule) == {case: case.split("_")[0] for case in FRAMES}
    assert suggest_rule(guess_siblings(FRAMES), [*FRAMES, "other"]) is None


def test_an_expression_may_be_longer_than_names_of_files():
    rule = "^(" + "|".join(f"P{number:04}" for number in range(1000)) + ")"
    assert assign_patients(["P0001_1", "P0999_2"], rule) == {"P0001_1": "P0001", "P0999_2": "P0999"}


def test_cells_of_a_table_may_hold_breaks_of_lines(tmp_path):
    table = tmp_path / "patients.csv"
    table.write_text('case,patient,note\na,P\x85 1,"two\nlines"\nb,Q,\n', encoding="utf-8")
    assert read_table(table, ["a", "b"], what="patient") == {"a": "P\x85 1", "b": "Q"}


def test_a_cell_beyond_all_measure_is_told(tmp_path):
    table = tmp_path / "patients.csv"
    table.write_text("case,patient\na," + "x" * 200_000)
    with pytest.raises(ValueError, match=r"patients\.csv is no table in CSV: field larger"):
        read_table(table, ["a"], what="patient")
