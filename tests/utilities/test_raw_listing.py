"""The cases of a raw dataset and their files."""

import json
import os

import numpy as np
import pytest

from nnunetv2.utilities.utils import (
    create_lists_from_splitted_dataset_folder,
    create_paths_fn,
    get_filenames_of_train_images_and_targets,
    get_identifiers_from_splitted_dataset_folder,
)


@pytest.fixture
def folder(tmp_path):
    for name in ("b_0001.nii.gz", "b_0000.nii.gz", "a_1_0000.nii.gz", "a_0000.nii.gz", "other_0000.png"):
        (tmp_path / name).touch()
    (tmp_path / "folder_0000.nii.gz").mkdir()
    return tmp_path


def test_identifiers_are_sorted_and_distinct(folder):
    identifiers = get_identifiers_from_splitted_dataset_folder(str(folder), ".nii.gz")
    assert isinstance(identifiers, np.ndarray) and identifiers.dtype.kind == "U"
    assert identifiers.tolist() == ["a", "a_1", "b"]


def test_no_file_gives_no_identifier(tmp_path):
    assert get_identifiers_from_splitted_dataset_folder(tmp_path, ".png").tolist() == []


def test_files_without_channel_number_are_reported(folder, caplog):
    (folder / "case.nii.gz").touch()
    assert "case" not in get_identifiers_from_splitted_dataset_folder(folder, ".nii.gz")
    assert "case.nii.gz" in caplog.text


def test_channels_are_listed_in_order(folder):
    expected = [
        [f"{folder}/a_0000.nii.gz"],
        [f"{folder}/a_1_0000.nii.gz"],
        [f"{folder}/b_0000.nii.gz", f"{folder}/b_0001.nii.gz"],
    ]
    assert create_lists_from_splitted_dataset_folder(str(folder), ".nii.gz") == expected
    wanted = create_lists_from_splitted_dataset_folder(str(folder), ".nii.gz", ["b", "missing"], num_processes=3)
    assert wanted == [expected[2], []]
    assert create_paths_fn("x", ["a_0000.png", "a_1_0000.png", "a_00001.png"], ".png", "a") == ["x/a_0000.png"]


def test_ending_is_no_pattern(tmp_path):
    (tmp_path / "a_0000xnii").touch()
    assert create_lists_from_splitted_dataset_folder(str(tmp_path), ".nii", ["a"]) == [[]]


def test_standard_layout(tmp_path):
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "imagesTr" / "a_0000.png").touch()
    (tmp_path / "dataset.json").write_text(json.dumps({"file_ending": ".png"}))
    assert get_filenames_of_train_images_and_targets(str(tmp_path)) == {
        "a": {"images": [f"{tmp_path}/imagesTr/a_0000.png"], "label": f"{tmp_path}/labelsTr/a.png"}
    }


def test_explicit_files(tmp_path, monkeypatch):
    monkeypatch.setenv("SCANS", "/scans")
    content = {"dataset": {"a": {"images": ["$SCANS/a.png", "../other/b.png"], "label": "labels/a.png"}}}
    before = json.dumps(content)
    folder = tmp_path / "dataset"
    assert get_filenames_of_train_images_and_targets(str(folder), content) == {
        "a": {"images": ["/scans/a.png", f"{tmp_path}/other/b.png"], "label": f"{folder}/labels/a.png"}
    }
    assert json.dumps(content) == before


def test_explicit_entry_without_label_is_named(tmp_path):
    with pytest.raises(ValueError, match="case a_7"):
        get_filenames_of_train_images_and_targets(str(tmp_path), {"dataset": {"a_7": {"images": []}}})


def test_thousands_of_files_are_listed_at_once(tmp_path, monkeypatch):
    (tmp_path / "imagesTr").mkdir()
    for case in range(1500):
        for channel in range(2):
            (tmp_path / "imagesTr" / f"case_{case:05d}_{channel:04d}.nii.gz").touch()
    dataset_json = {"file_ending": ".nii.gz"}
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(folder) or scandir(folder))
    cases = get_filenames_of_train_images_and_targets(str(tmp_path), dataset_json)
    assert len(cases) == 1500 and all(len(files["images"]) == 2 for files in cases.values())
    assert len(listed) <= 2, "the folder is not read once per case"


def test_a_link_to_nothing_is_a_file_of_its_case(folder, tmp_path):
    (folder / "c_0000.nii.gz").symlink_to(tmp_path / "nowhere" / "c_0000.nii.gz")
    (folder / "d_0000.nii.gz").symlink_to(folder / "folder_0000.nii.gz")  # a folder
    (folder / ".#a_0000.nii.gz").symlink_to("someone@somewhere.1234")  # the lock of an editor
    assert get_identifiers_from_splitted_dataset_folder(folder, ".nii.gz").tolist() == ["a", "a_1", "b", "c"]
