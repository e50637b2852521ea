"""Warnings of the integrity check about copies and siblings."""

import gzip
import json
import shutil

import numpy as np
import pytest
from planning_scans import write_nifti

from nnunetv2.experiment_planning.integrity.likeness import digest_voxels, find_siblings
from nnunetv2.experiment_planning.make_splits import main as make_splits
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

FRAMES = [f"P{number}_t{scan}" for number in range(5) for scan in range(2)]


@pytest.fixture
def folder(make_scans, make_case):
    return make_scans({f"case_{i}": make_case(i, num_channels=2) for i in range(3)})


def test_a_copy_is_found_however_it_is_compressed(folder, capsys):
    source = folder / "imagesTr" / "case_0_0000.nii.gz"
    (folder / "imagesTr" / "case_2_0000.nii.gz").write_bytes(gzip.compress(gzip.decompress(source.read_bytes()), 1))
    verify_dataset_integrity(str(folder), 2)
    printed = capsys.readouterr().out
    assert "The same image occurs twice" in printed
    assert "case_2  imagesTr/case_2_0000.nii.gz  as imagesTr/case_0_0000.nii.gz" in printed
    assert "passed the integrity check" in printed


def test_a_copy_among_the_channels_and_the_test_images_is_found(folder, capsys):
    shutil.copy(folder / "imagesTr" / "case_1_0000.nii.gz", folder / "imagesTr" / "case_1_0001.nii.gz")
    (folder / "imagesTs").mkdir()
    shutil.copy(folder / "imagesTr" / "case_0_0001.nii.gz", folder / "imagesTs" / "new_0001.nii.gz")
    (folder / "imagesTs" / "new_0000.nii.gz").write_bytes(b"no image")
    verify_dataset_integrity(str(folder), 2)
    printed = capsys.readouterr().out
    assert "The same image occurs twice (2 times)" in printed
    assert "as imagesTr/case_1_0000.nii.gz" in printed and "imagesTs/new_0001.nii.gz" in printed
    assert "A test image cannot be read" in printed


def test_the_digest_sees_shape_and_every_voxel():
    image = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    other = image.copy()
    other[-1, -1, -1, -1] += 1
    assert len({digest_voxels(one) for one in (image, other, image.reshape(1, 3, 2, 4))}) == 3
    assert digest_voxels(np.zeros((1, 2, 3, 4))) is None  # blank images are all alike


def test_siblings_are_warned_of_until_splits_keep_them_together(make_scans, make_case, roots, capsys):
    folder = make_scans({case: make_case(i) for i, case in enumerate(FRAMES)})
    verify_dataset_integrity(str(folder), 2)
    printed = capsys.readouterr().out
    assert "Names look like several scans of one patient (5 times)" in printed
    assert "P3    P3_t0, P3_t1" in printed
    assert "nnUNetv2_make_splits -d Dataset002_Scans --patients" in printed

    make_splits(["-d", "2"])
    verify_dataset_integrity(str(folder), 2)
    assert "on both sides of a fold" in capsys.readouterr().out

    make_splits(["-d", "2", "--patients", "^(P[0-9]+)_", "--overwrite"])
    verify_dataset_integrity(str(folder), 2)
    assert "one patient" not in capsys.readouterr().out


def test_what_people_said_counts_more_than_names():
    folds = json.loads('[{"train": ["a_t1", "b_t1"], "val": ["a_t2"]}]')
    cases = ["a_t1", "a_t2", "b_t1"]
    assert find_siblings("Dataset001_A", cases, folds, dict(zip(cases, "xyz"))) == []
    (found,) = find_siblings("Dataset001_A", ["a_t1", "b_t1", "a_t2"], folds, {"b_t1": "x", "a_t2": "x"})
    assert found.case == "x"


def test_two_scans_of_different_patients_are_no_copies(folder, make_case, capsys):
    write_nifti(make_case(9)[0][0], folder / "imagesTr" / "case_1_0001.nii.gz")
    verify_dataset_integrity(str(folder), 2)
    assert "Warnings" not in capsys.readouterr().out
