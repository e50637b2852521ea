"""Datasets in older formats become raw datasets, whole or not at all."""

import json
import os
import time

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2.dataset_conversion import convert_MSD_dataset, convert_raw_dataset_from_old_nnunet_format
from nnunetv2.dataset_conversion.convert_MSD_dataset import convert_msd_dataset, parse_task_name, split_4d_nifti
from nnunetv2.dataset_conversion.convert_raw_dataset_from_old_nnunet_format import convert
from nnunetv2.dataset_conversion.new_dataset import building_dataset, invert_labels

OLD_JSON = {
    "name": "X",
    "tensorImageSize": "4D",
    "modality": {"0": "T1", "1": "T2"},
    "labels": {"0": "background", "1": "a", "2": "b"},
    "numTraining": 2,
    "numTest": 1,
    "training": [{"image": "./imagesTr/c1.nii.gz", "label": "./labelsTr/c1.nii.gz"}],
    "test": [],
}


def write(array, file, spacing=(1.5, 2.0, 3.0), origin=(-4.0, 5.0, 6.0)):
    image = sitk.GetImageFromArray(array)
    if array.ndim == 4:
        image = sitk.JoinSeries([sitk.GetImageFromArray(part) for part in array])
        image.SetSpacing((*spacing, 7.0))
        image.SetOrigin((*origin, 8.0))
        image.SetDirection(np.block([[np.diag([-1.0, -1, 1]), np.zeros((3, 1))], [np.zeros((1, 3)), 1]]).ravel())
    else:
        image.SetSpacing(spacing)
        image.SetOrigin(origin)
    sitk.WriteImage(image, str(file))


@pytest.fixture
def task(tmp_path):
    """A task with two images of two channels each, their labels, and one image for testing."""
    folder = tmp_path / "Task05_My_Organ"
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for case in ("c1", "c2"):
        write(rng.integers(-99, 99, (2, 3, 4, 5)).astype(np.int16), folder / "imagesTr" / f"{case}.nii.gz")
        write(rng.integers(0, 3, (3, 4, 5)).astype(np.uint8), folder / "labelsTr" / f"{case}.nii.gz")
    write(rng.random((3, 4, 5)).astype(np.float32), folder / "imagesTs" / "t1.nii.gz")
    (folder / "imagesTr" / "._c1.nii.gz").write_bytes(b"what macOS leaves")
    (folder / "dataset.json").write_text(json.dumps(OLD_JSON))
    return folder


def names(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_decathlon_task_becomes_a_raw_dataset(task, roots):
    convert_msd_dataset(f"{task}/", num_processes=2)
    folder = roots["nnUNet_raw"] / "Dataset005_My_Organ"
    assert names(folder) == [
        "dataset.json",
        *(f"imagesTr/{c}_000{i}.nii.gz" for c in ("c1", "c2") for i in (0, 1)),
        "imagesTs/t1_0000.nii.gz",
        "labelsTr/c1.nii.gz",
        "labelsTr/c2.nii.gz",
    ]
    assert json.loads((folder / "dataset.json").read_text()) == {
        "name": "X",
        "tensorImageSize": "4D",
        "labels": {"background": 0, "a": 1, "b": 2},
        "numTraining": 2,
        "numTest": 1,
        "file_ending": ".nii.gz",
        "channel_names": {"0": "T1", "1": "T2"},
    }
    assert [entry.name for entry in roots["nnUNet_raw"].iterdir()] == ["Dataset005_My_Organ"]


def test_channels_keep_values_and_place(task, tmp_path):
    split_4d_nifti(str(task / "imagesTr" / "c1.nii.gz"), str(tmp_path))
    whole = sitk.ReadImage(str(task / "imagesTr" / "c1.nii.gz"))
    for channel in (0, 1):
        part = sitk.ReadImage(str(tmp_path / f"c1_000{channel}.nii.gz"))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(part), sitk.GetArrayFromImage(whole)[channel])
        assert part.GetPixelID() == whole.GetPixelID()
        assert (part.GetSpacing(), part.GetOrigin()) == ((1.5, 2.0, 3.0), (-4.0, 5.0, 6.0))
        assert part.GetDirection() == (-1, 0, 0, 0, -1, 0, 0, 0, 1)


def test_images_for_testing_are_not_needed(task, roots):
    for file in (task / "imagesTs").iterdir():
        file.unlink()
    (task / "imagesTs").rmdir()
    convert_MSD_dataset.main(["-i", str(task), "-overwrite_id", "1005", "-np", "1"])
    assert (roots["nnUNet_raw"] / "Dataset1005_My_Organ" / "dataset.json").is_file()


def test_nothing_is_left_of_a_conversion_that_fails(task, roots):
    (task / "labelsTr" / "c2.nii.gz").unlink()
    (task / "labelsTr" / "c2.nii.gz").symlink_to(task / "absent")
    with pytest.raises(FileNotFoundError):
        convert_msd_dataset(str(task))
    assert list(roots["nnUNet_raw"].iterdir()) == []


def test_what_a_killed_conversion_has_left_is_removed_a_day_later(task, roots):
    for name, age_s in (("old", 2 * 86400), ("young", 3600)):
        (roots["nnUNet_raw"] / f".partial-{name}").mkdir()
        os.utime(roots["nnUNet_raw"] / f".partial-{name}", (time.time() - age_s,) * 2)
    convert_msd_dataset(str(task), num_processes=1)
    assert sorted(entry.name for entry in roots["nnUNet_raw"].iterdir()) == [".partial-young", "Dataset005_My_Organ"]


def test_taken_number_is_refused(task, roots):
    (roots["nnUNet_results"] / "Dataset005_Other").mkdir()
    with pytest.raises(AssertionError, match="number 5 is taken by Dataset005_Other"):
        convert_msd_dataset(str(task))


def test_flat_image_is_refused(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5), np.uint8)), str(tmp_path / "flat.nii.gz"))
    with pytest.raises(RuntimeError, match="flat.nii.gz has 2 axes"):
        split_4d_nifti(str(tmp_path / "flat.nii.gz"), str(tmp_path))


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        ("Organ", None, "must be a folder named as in the Decathlon"),
        ("Task07_X", "imagesTr", "lacks imagesTr"),
        ("Task07_X", "dataset.json", "lacks dataset.json"),
    ],
)
def test_other_folders_are_refused(tmp_path, name, missing, message):
    folder = tmp_path / name
    for part in {"imagesTr", "labelsTr"} - {missing}:
        (folder / part).mkdir(parents=True)
    if missing != "dataset.json":
        (folder / "dataset.json").write_text("{}")
    with pytest.raises(AssertionError, match=message):
        parse_task_name(folder)


def test_dataset_of_the_first_nnunet_is_copied(task, roots):
    convert(str(task), "Dataset012_Organ")
    folder = roots["nnUNet_raw"] / "Dataset012_Organ"
    assert names(folder) == names(task)
    assert json.loads((folder / "dataset.json").read_text()) == {
        "name": "X",
        "numTraining": 2,
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "a": 1, "b": 2},
        "file_ending": ".nii.gz",
    }


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("Organ", ValueError, "'Organ' is no dataset name"),
        ("Dataset012_Organ", RuntimeError, "12 is taken"),
        ("Dataset012_Other", RuntimeError, "number 12 is taken by Dataset012_Organ"),
    ],
)
def test_names_that_would_not_be_found_are_refused(task, roots, name, error, message):
    (roots["nnUNet_raw"] / "Dataset012_Organ").mkdir()
    with pytest.raises(error, match=message):
        convert_raw_dataset_from_old_nnunet_format.main([str(task), name])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"labels": {"0": "background"}}, "dataset.json lacks modality"),
        ({"modality": {}, "labels": {"background": 0}}, "expected numbers with their names"),
        ({"modality": {}, "labels": {"0": "background", "1": "background"}}, "the same name"),
    ],
)
def test_broken_descriptions_are_refused(task, roots, content, message):
    (task / "dataset.json").write_text(json.dumps(content))
    for conversion in (lambda: convert(str(task), "Dataset012_Organ"), lambda: convert_msd_dataset(str(task))):
        with pytest.raises(ValueError, match=message):
            conversion()
    assert list(roots["nnUNet_raw"].iterdir()) == []


def test_dataset_appears_when_it_is_complete(roots):
    with building_dataset("Dataset001_X") as folder:
        (folder / "dataset.json").touch()
        assert not (roots["nnUNet_raw"] / "Dataset001_X").exists()
    assert (roots["nnUNet_raw"] / "Dataset001_X" / "dataset.json").is_file()
    assert invert_labels({"0": "background", "1": "a"}) == {"background": 0, "a": 1}


@pytest.mark.parametrize("here", [".", "../Task05_My_Organ", "./"])
def test_a_task_is_converted_from_within_its_folder(task, roots, monkeypatch, here):
    monkeypatch.chdir(task)
    convert_msd_dataset(here, num_processes=1)
    assert (roots["nnUNet_raw"] / "Dataset005_My_Organ" / "dataset.json").is_file()


def test_a_link_to_a_task_is_converted_under_its_own_name(task, roots, tmp_path):
    task.rename(tmp_path / "downloaded")
    (tmp_path / "Task05_My_Organ").symlink_to(tmp_path / "downloaded")
    convert_msd_dataset(str(tmp_path / "Task05_My_Organ"), num_processes=1)
    assert (roots["nnUNet_raw"] / "Dataset005_My_Organ" / "dataset.json").is_file()
