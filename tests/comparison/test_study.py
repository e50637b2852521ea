"""A comparison as a value: what is refused, and what going on with it may change."""

import json
from dataclasses import replace

import pytest

from nnunetv2.comparison.arms import ARMS, Arm
from nnunetv2.comparison.study import Dataset, Study, check_study, list_test_cases, open_study
from nnunetv2.comparison.study_folder import StudyFolder, link_datasets, link_tests, whole_or_nothing

LABELS = {"background": 0, "a": 1}


def make_dataset(raw, number, *, labels=LABELS, tests=("t1",), label_of_tests=True):
    folder = raw / f"Dataset{number:03d}_S{number}"
    for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / name).mkdir(parents=True)
    content = {"labels": labels, "channel_names": {"0": "MRI"}, "file_ending": ".nii.gz", "numTraining": 1}
    (folder / "dataset.json").write_text(json.dumps(content))
    (folder / "imagesTr" / "c1_0000.nii.gz").touch()
    (folder / "labelsTr" / "c1.nii.gz").touch()
    for case in tests:
        (folder / "imagesTs" / f"{case}_0000.nii.gz").touch()
        if label_of_tests:
            (folder / "labelsTs" / f"{case}.nii.gz").touch()
    return Dataset(name=folder.name, folder=str(folder))


def make_study(*sites, **changes):
    study = Study(
        sites=sites,
        arms=(ARMS["alone"], ARMS["ffe"]),
        seeds=1,
        epochs=1,
        iterations=1,
        val_iterations=1,
        configuration="2d",
        fold="all",
        plans_name="nnUNetPlans",
        device="cpu",
    )
    return replace(study, **changes)


def test_datasets_that_do_not_go_together_are_named(tmp_path, capsys):
    first = make_dataset(tmp_path, 1)
    for other, message in (
        (make_dataset(tmp_path, 2, labels={"background": 0, "b": 1}), "Dataset002_S2 has labels .*'b'"),
        (make_dataset(tmp_path, 4, label_of_tests=False), "Dataset004_S4: test case t1 lacks .*labelsTs/t1.nii.gz"),
        (first, "named twice"),
    ):
        with pytest.raises(ValueError, match=message):
            check_study(make_study(first, other))
    with pytest.raises(ValueError, match="no dataset has test cases: put images that no training sees into"):
        check_study(make_study(make_dataset(tmp_path, 6, tests=()), make_dataset(tmp_path, 7, tests=())))
    check_study(make_study(first, make_dataset(tmp_path, 3, tests=())))
    assert "Dataset003_S3 has no test cases" in capsys.readouterr().out
    with pytest.raises(ValueError, match="two sites or more"):
        check_study(make_study(first))
    with pytest.raises(ValueError, match="--seeds must be 1 or more, it is 0"):
        check_study(make_study(first, make_dataset(tmp_path, 5), seeds=0))


def test_one_file_may_hold_all_channels(tmp_path):
    dataset = make_dataset(tmp_path, 1, tests=("t.1", "t 2"))
    file = tmp_path / dataset.name / "dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "channel_names": {"0": "R", "1": "G", "2": "B"}}))
    assert {case: len(images) for case, (images, _) in list_test_cases(dataset).items()} == {"t.1": 1, "t 2": 1}
    (tmp_path / dataset.name / "imagesTs" / "t.1_0001.nii.gz").touch()
    with pytest.raises(ValueError, match="test case t 2 lacks .*t 2_0001"):
        list_test_cases(dataset)


def touch(folder, study, *, go_on=True):
    """Open a comparison and leave it again."""
    with open_study(folder, study, go_on=go_on):
        pass


def test_a_study_goes_on_with_the_same_options_and_may_get_arms_and_seeds(tmp_path):
    study = make_study(make_dataset(tmp_path, 1), make_dataset(tmp_path, 2))
    folder = tmp_path / "study"
    touch(folder, study, go_on=False)
    with pytest.raises(ValueError, match="holds a comparison already: go on with --c"):
        touch(folder, study, go_on=False)
    touch(folder, replace(study, arms=(*study.arms, ARMS["asym"]), seeds=3))
    with pytest.raises(ValueError, match="begun with epochs 1, now it is 2"):
        touch(folder, replace(study, epochs=2))
    with pytest.raises(ValueError, match="begun with another arm ffe"):
        touch(folder, replace(study, arms=(Arm(name="ffe", training="alone"),)))


def test_an_arm_that_is_left_out_once_is_still_known(tmp_path):
    """Trainings lie under its name, which must not become that of another arm."""
    study = make_study(make_dataset(tmp_path, 1), make_dataset(tmp_path, 2), seeds=2)
    folder = tmp_path / "study"
    touch(folder, study, go_on=False)
    touch(folder, replace(study, arms=(ARMS["alone"],), seeds=1))
    held = json.loads((folder / "study.json").read_text())
    assert sorted(arm["name"] for arm in held["arms"]) == ["alone", "ffe"] and held["seeds"] == 2
    with pytest.raises(ValueError, match="begun with another arm ffe"):
        touch(folder, replace(study, arms=(Arm(name="ffe", training="alone"),)))


def test_a_second_command_changes_nothing_in_a_folder_at_work(tmp_path):
    study = make_study(make_dataset(tmp_path, 1), make_dataset(tmp_path, 2))
    folder = tmp_path / "study"
    with open_study(folder, study, go_on=False):
        before = (folder / "study.json").read_bytes()
        with pytest.raises(ValueError, match="is in use by another nnUNetv2_fed_compare"):
            touch(folder, replace(study, seeds=5))
        assert (folder / "study.json").read_bytes() == before


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "thesis.docx").touch()
    study = make_study(make_dataset(tmp_path, 1), make_dataset(tmp_path, 2))
    with pytest.raises(ValueError, match="is not empty and holds no comparison"):
        touch(tmp_path / "study", study)
    assert [one.name for one in (tmp_path / "study").iterdir()] == ["thesis.docx"]


def test_links_tell_equal_case_names_of_two_sites_apart(tmp_path):
    study = make_study(make_dataset(tmp_path, 1), make_dataset(tmp_path, 2))
    folder = StudyFolder(tmp_path / "study")
    for _ in range(2):
        link_datasets(study, folder)
        link_tests(study, folder)
    assert sorted(path.name for path in (folder.tests / "labels").iterdir()) == ["001_t1.nii.gz", "002_t1.nii.gz"]
    pooled = json.loads((folder.raw / "Dataset999_Pooled" / "dataset.json").read_text())
    assert pooled["numTraining"] == 2 and sorted(pooled["dataset"]) == ["001_c1", "002_c1"]
    assert (folder.raw / "Dataset001_S1" / "imagesTr" / "c1_0000.nii.gz").exists()


def test_an_interrupted_step_leaves_no_folder_of_its_name(tmp_path):
    folder = tmp_path / "step"
    with pytest.raises(KeyboardInterrupt), whole_or_nothing(folder) as attempt:
        (attempt / "half").touch()
        raise KeyboardInterrupt
    assert not folder.exists()
    with whole_or_nothing(folder) as attempt:
        (attempt / "whole").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["step"] and (folder / "whole").exists()
    with whole_or_nothing(folder) as attempt:
        assert attempt is None
