"""The command nnUNetv2_make_splits, and the training that holds to what it was told."""

import json
from pathlib import Path

import pytest

from nnunetv2.experiment_planning.make_splits import main
from nnunetv2.preprocessed_data.bad_cases import BadCase, save_bad_cases
from nnunetv2.training import splits

NAME = "Dataset007_Frames"
CASES = [f"P{number}_{scan}" for number in range(6) for scan in range(2)]
RULE = r"^(P\d+)_"


@pytest.fixture
def preprocessed(roots) -> Path:
    """Write a raw dataset of six patients with two empty scans each, and return its folder of preprocessed data."""
    raw = roots["nnUNet_raw"] / NAME
    (raw / "imagesTr").mkdir(parents=True)
    for case in CASES:
        (raw / "imagesTr" / f"{case}_0000.nii.gz").touch()
    (raw / "dataset.json").write_text(json.dumps({"labels": {"background": 0}, "file_ending": ".nii.gz"}))
    return roots["nnUNet_preprocessed"] / NAME


def read(file: Path) -> list[dict]:
    return json.loads(file.read_text())


def test_patients_stay_whole_and_the_command_says_so(preprocessed, capsys):
    main(["-d", "7", "--patients", RULE, "--folds", "3"])
    folds = read(preprocessed / "splits_final.json")
    assert len(folds) == 3
    for fold in folds:
        assert not {case[:2] for case in fold["train"]} & {case[:2] for case in fold["val"]}
    printed = capsys.readouterr().out
    assert "12 cases of 6 patients in 3 folds" in printed
    assert "fold 2: train on 4 patients (8 cases), validate on 2 patients (4 cases)" in printed
    assert "-f 0 1 2" in printed


def test_without_options_the_split_is_that_of_training(preprocessed, tmp_path):
    main(["-d", NAME])
    written = read(preprocessed / "splits_final.json")
    assert written == splits.load_or_create_splits(tmp_path / "own.json", lambda: CASES, print)
    assert not (preprocessed / "patients.json").exists()


def test_a_hospital_is_left_out_in_each_fold(preprocessed, tmp_path):
    table = tmp_path / "sites.csv"
    table.write_text("patient;site\n" + "".join(f"P{n};{'Bonn' if n < 2 else 'Ulm'}\n" for n in range(6)))
    main(["-d", "7", "--patients", RULE, "--group", str(table), "--leave_one_group_out"])
    bonn, ulm = read(preprocessed / "splits_final.json")
    assert bonn["val"] == ulm["train"] == CASES[:4]


@pytest.mark.parametrize(
    "options",
    [
        ["--leave_one_group_out"],
        ["--group", "x.csv", "--leave_one_group_out", "--folds", "3"],
        ["--folds", "1"],
        ["--seed", "-1"],
    ],
)
def test_options_that_contradict_each_other_are_refused(options):
    with pytest.raises(SystemExit, match="2"):
        main(["-d", "7", *options])


def test_other_splits_stay_unless_told(preprocessed):
    main(["-d", "7"])
    before = read(preprocessed / "splits_final.json")
    with pytest.raises(FileExistsError, match="exists and separates patients. --overwrite replaces it"):
        main(["-d", "7", "--patients", RULE])
    assert read(preprocessed / "splits_final.json") == before
    main(["-d", "7", "--patients", RULE, "--overwrite"])
    assert read(preprocessed / "splits_final.json") != before
    main(["-d", "7", "--patients", RULE])  # the same again


def test_splits_of_the_raw_dataset_stay(preprocessed, roots):
    (roots["nnUNet_raw"] / NAME / "splits_final.json").write_text('[{"train": ["P0_0"], "val": ["P1_0"]}]')
    with pytest.raises(FileExistsError, match="comes with the dataset"):
        main(["-d", "7", "--patients", RULE, "--overwrite"])


def test_splits_in_place_are_checked(preprocessed, capsys):
    with pytest.raises(ValueError, match="--check needs --patients, or the file .*patients.json"):
        main(["-d", "7", "--check"])
    with pytest.raises(FileNotFoundError, match="to check"):
        main(["-d", "7", "--patients", RULE, "--check"])
    main(["-d", "7"])
    with pytest.raises(ValueError, match="separates 5 patients"):
        main(["-d", "7", "--patients", RULE, "--check"])
    assert "patient P0 is on both sides of fold" in capsys.readouterr().out
    main(["-d", "7", "--patients", RULE, "--overwrite"])
    main(["-d", "7", "--patients", RULE, "--check"])
    assert "none on both sides" in capsys.readouterr().out
    main(["-d", "7", "--check"])  # by the patients that the command has noted
    assert "6 patients, none on both sides" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["nnUNet_raw", "nnUNet_preprocessed"])
def test_patients_that_the_dataset_names_stay_whole(preprocessed, roots, where):
    preprocessed.mkdir(parents=True, exist_ok=True)
    file = roots[where] / NAME / "patients.json"
    file.write_text(json.dumps({case: case[:2] for case in CASES[2:]}))  # the others are patients of their own
    main(["-d", "7", "--folds", "3"])
    for fold in read(preprocessed / "splits_final.json"):
        assert {case[:2] for case in fold["train"]} & {case[:2] for case in fold["val"]} <= {"P0"}
    assert json.loads((preprocessed / "patients.json").read_text())["P3_1"] == "P3"


def test_patients_that_contradict_the_dataset_are_refused(preprocessed, roots):
    (roots["nnUNet_raw"] / NAME / "patients.json").write_text('{"P3_1": "somebody"}')
    with pytest.raises(ValueError, match=r"--patients .* names patient P3 for case P3_1, .*names somebody"):
        main(["-d", "7", "--patients", RULE])
    assert not (preprocessed / "splits_final.json").exists()


def test_training_splits_by_patient_where_they_are_known(tmp_path):
    (tmp_path / "patients.json").write_text(json.dumps({case: case[:2] for case in CASES}))
    lines = []
    folds = splits.load_or_create_splits(tmp_path / "splits_final.json", lambda: CASES, lines.append)
    assert len(folds) == 5 and "keep patients whole" in lines[0]
    assert not any({case[:2] for case in fold["train"]} & {case[:2] for case in fold["val"]} for fold in folds)


def test_training_refuses_splits_that_separate_a_known_patient(preprocessed):
    main(["-d", "7", "--patients", RULE])
    file = preprocessed / "splits_final.json"
    assert splits.split_cases(file, 0, lambda: CASES, "folder", print)
    folds = read(file)
    folds[0]["train"].append(folds[0]["val"].pop())
    file.write_text(json.dumps(folds))
    with pytest.raises(ValueError, match="is on both sides of fold 0: .* Write the splits anew"):
        splits.split_cases(file, 0, lambda: CASES, "folder", print)
    with pytest.raises(ValueError, match="on both sides of fold 7"):
        splits.split_cases(file, 7, lambda: CASES, "folder", print)  # at random, by case


def test_bad_cases_are_in_no_split_and_leave_one_that_is_there(preprocessed, capsys):
    file = preprocessed / "splits_final.json"
    main(["-d", "7", "--folds", "3"])
    save_bad_cases([BadCase("P3_1", "imagesTr/P3_1_0000.nii.gz", "damaged file")], preprocessed)
    lines = []
    train, val = splits.split_cases(file, 0, lambda: [case for case in CASES if case != "P3_1"], "folder", lines.append)
    assert len({*train, *val}) == 11
    assert any("names 1 bad cases, which are left out: P3_1" in line for line in lines)
    main(["-d", "7", "--folds", "3", "--overwrite"])
    assert "1 bad case is left out: P3_1" in capsys.readouterr().out
    assert all(len(fold["train"] + fold["val"]) == 11 for fold in read(file))


def test_a_preprocessed_dataset_suffices(preprocessed, roots, monkeypatch, capsys):
    (preprocessed / "gt_segmentations").mkdir(parents=True)
    (preprocessed / "dataset.json").write_text('{"file_ending": ".nii.gz"}')
    for case in CASES[:6]:
        (preprocessed / "gt_segmentations" / f"{case}.nii.gz").touch()
    monkeypatch.delenv("nnUNet_raw")
    main(["-d", "7", "--patients", RULE, "--folds", "3"])
    assert "There is no raw dataset" in capsys.readouterr().out
    assert len(read(preprocessed / "splits_final.json")[0]["val"]) == 2
