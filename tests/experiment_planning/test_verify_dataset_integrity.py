"""The integrity check of raw datasets."""
import json

import numpy as np
import pytest
from planning_scans import write_nifti

from nnunetv2.experiment_planning.errors import InvalidDatasetError
from nnunetv2.experiment_planning.verify_dataset_integrity import (
    check_cases,
    determine_expected_labels,
    find_geometry_warnings,
    find_label_errors,
    find_mismatches,
    verify_dataset_integrity,
    verify_labels,
)
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO


@pytest.fixture
def folder(make_scans, make_case):
    return make_scans({f"case_{i}": make_case(i) for i in range(3)})


def change_dataset_json(folder, *, remove=(), **changes):
    file = folder / "dataset.json"
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if key not in remove}))


def test_sound_dataset_passes(folder, capsys):
    verify_dataset_integrity(str(folder), 1)
    printed = capsys.readouterr().out
    assert "Dataset002_Scans passed the integrity check: 3 cases, 1 channel(s), labels 0, 1, 2" in printed


def test_old_name_of_channels_is_accepted(folder):
    change_dataset_json(folder, remove=["channel_names"], modality={"0": "MR"})
    verify_dataset_integrity(str(folder), 1)


def test_missing_dataset_json_is_named(tmp_path):
    with pytest.raises(AssertionError, match="has no dataset.json"):
        verify_dataset_integrity(str(tmp_path))


def test_broken_dataset_json_is_named(folder):
    (folder / "dataset.json").write_text("{")
    with pytest.raises(InvalidDatasetError, match="dataset.json is not valid JSON"):
        verify_dataset_integrity(str(folder))


def test_missing_keys_are_listed(folder):
    change_dataset_json(folder, remove=["numTraining", "channel_names"], comment="")
    with pytest.raises(AssertionError, match="lacks channel_names, numTraining.*Not used: comment"):
        verify_dataset_integrity(str(folder))


def test_missing_folder_is_named(folder):
    (folder / "labelsTr").rename(folder / "labels")
    with pytest.raises(AssertionError, match="has no folder labelsTr"):
        verify_dataset_integrity(str(folder))


def test_wrong_number_and_missing_files_are_reported_together(folder, capsys):
    change_dataset_json(folder, numTraining=4)
    (folder / "labelsTr" / "case_1.nii.gz").unlink()
    (folder / "imagesTr" / "case_2_0000.nii.gz").rename(folder / "imagesTr" / "case_2_0001.nii.gz")
    with pytest.raises(AssertionError, match=r"3 error\(s\) in 3 place\(s\)"):
        verify_dataset_integrity(str(folder), 1)
    printed = capsys.readouterr().out
    assert "numTraining is 4, but there are 3 cases" in printed
    assert "case_1        has no label labelsTr/case_1.nii.gz" in printed
    assert "case_2        has the image files case_2_0001.nii.gz; they must end in _0000.nii.gz" in printed


def test_label_without_image_is_a_warning(folder, capsys):
    (folder / "labelsTr" / "extra.nii.gz").write_bytes((folder / "labelsTr" / "case_0.nii.gz").read_bytes())
    verify_dataset_integrity(str(folder), 1)
    assert "extra.nii.gz  is a label without image" in capsys.readouterr().out


def test_listed_files_must_exist(folder):
    images = ["imagesTr/case_0_0000.nii.gz"]
    change_dataset_json(folder, dataset={"a": {"images": images, "label": "labelsTr/b.nii.gz"}})
    with pytest.raises(FileNotFoundError, match=r"1 file\(s\) that do not exist: .*b\.nii\.gz"):
        verify_dataset_integrity(str(folder))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_faults_of_all_cases_are_listed_before_the_check_fails(folder, make_case, num_processes, capsys):
    _, label, _ = make_case(0)
    write_nifti(np.zeros((6, 8, 11), np.uint8), folder / "labelsTr" / "case_0.nii.gz")
    write_nifti(label * 3, folder / "labelsTr" / "case_1.nii.gz", (3.0, 1.5, 1.25))
    (folder / "labelsTr" / "case_2.nii.gz").write_bytes(b"no image")
    with pytest.raises(RuntimeError, match=r"4 error\(s\) in 3 place\(s\), listed above. The first: case_0"):
        verify_dataset_integrity(str(folder), num_processes)
    printed = capsys.readouterr().out
    assert "  case_0  the label has shape (6, 8, 11), the image (6, 8, 10)" in printed
    assert "  case_1  the label contains 3, 6; expected are 0, 1, 2" in printed
    assert "  case_1  the label has spacing 3, 1.5, 1.25 mm, the image 3, 1.5, 1 mm" in printed
    assert "  case_2  cannot be read: RuntimeError" in printed


def test_number_of_channels_is_compared(folder, capsys):
    change_dataset_json(folder, channel_names={"0": "MR", "1": "CT"})
    with pytest.raises(RuntimeError):
        verify_dataset_integrity(str(folder), 1)
    assert capsys.readouterr().out.count("the image has 1 channel(s), dataset.json names 2") == 3


def test_nan_in_an_image_is_an_error():
    # given as arrays, since NIfTI files lose their NaN when SimpleITK reads them
    image, label, spacing = np.full((1, 2, 2, 2), np.nan), np.zeros((1, 2, 2, 2)), {"spacing": (1, 1, 1)}
    assert find_mismatches(image, spacing, label, spacing, 1) == ["the image contains NaN"]


def test_background_only_is_a_warning(make_scans, make_case, capsys):
    folder = make_scans({"full": make_case(0), "void": make_case(1, foreground=False)})
    verify_dataset_integrity(str(folder), 1)
    assert "  void  the label is background only" in capsys.readouterr().out


@pytest.mark.parametrize(("labels", "message"), [
    ({"background": 0, "a": 1, "b": 3}, "0, 1, 3; 1 is followed by 3"),
    ({"background": 0, "a": 2}, "0 is followed by 2"),
])
def test_labels_must_be_consecutive(labels, message):
    with pytest.raises(AssertionError, match=message):
        determine_expected_labels({"labels": labels})


def test_ignore_label_is_expected():
    assert determine_expected_labels({"labels": {"background": 0, "a": 1, "ignore": 2}}) == [0, 1, 2]


def test_regions_are_taken_apart():
    assert determine_expected_labels({"labels": {"background": 0, "all": [1, 2], "core": 2},
                                      "regions_class_order": [1, 2]}) == [0, 1, 2]


@pytest.mark.parametrize(("values", "message"), [
    ([0, 1.5], "the label contains 1.5; expected are 0, 1"),
    ([0, np.nan], "the label contains NaN"),
    ([], r"the label is empty"),
])
def test_faulty_label_values_are_shown(values, message):
    assert find_label_errors(np.array(values, dtype=np.float32), [0, 1])[0].startswith(message)


def test_differing_places_in_space_are_warnings():
    image, label = ({"sitk_stuff": {"origin": origin, "direction": (1.0, 0.0)}} for origin in ((0.0, 1.0), (0.0, 2.0)))
    assert find_geometry_warnings(image, label) == ["the origin of the label is 0, 2, that of the image 0, 1"]
    image, label = ({"nibabel_stuff": {"original_affine": np.eye(4) * s}} for s in (1, 1 + 1e-9))
    assert find_geometry_warnings(image, label) == []


def test_helpers_answer_for_single_files(folder, capsys):
    label = str(folder / "labelsTr" / "case_0.nii.gz")
    images = [str(folder / "imagesTr" / "case_0_0000.nii.gz")]
    assert verify_labels(label, SimpleITKIO, [0, 1, 2])
    assert not verify_labels(label, SimpleITKIO, [0, 1])
    assert f"Error: {label}: the label contains 2; expected are 0, 1" in capsys.readouterr().out
    assert check_cases(images, label, 1, SimpleITKIO)
    assert not check_cases(images, label, 2, SimpleITKIO)
