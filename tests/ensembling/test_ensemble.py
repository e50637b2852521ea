"""Tests of averaging probabilities."""

from __future__ import annotations

import json
import pickle
import sys

import numpy as np
import pytest
import SimpleITK as sitk
from trained_models import NAME, make_dataset_json, make_model_plans, make_trained_models, properties

from nnunetv2.ensembling import ensemble
from nnunetv2.ensembling.ensemble import average_probabilities, ensemble_crossvalidations, ensemble_folders
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.restricted_pickle import save_pickle

SHAPE = (10, 22, 26)


def write_folder(path, seed, *, regions=False, cases=("a", "b"), dtype=np.float32):
    path.mkdir()
    rng = np.random.default_rng(seed)
    for case in cases:
        np.savez_compressed(path / f"{case}.npz", probabilities=rng.random((3 if regions else 4, *SHAPE)).astype(dtype))
        save_pickle(properties(), path / f"{case}.pkl")
    (path / "dataset.json").write_text(json.dumps(make_dataset_json(regions=regions)))
    (path / "plans.json").write_text(json.dumps(make_model_plans()))
    return str(path)


def read(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_the_mean_is_float32_and_exact(tmp_path):
    arrays = [
        np.random.default_rng(i).random((2, 3, 4, 5)).astype(dtype)
        for i, dtype in enumerate((np.float16, np.float32, np.float32))
    ]
    files = []
    for number, array in enumerate(arrays):
        files.append(str(tmp_path / f"{number}.npz"))
        np.savez_compressed(files[-1], probabilities=array if number else np.asfortranarray(array))
    expected = arrays[0].astype(np.float32)
    expected = (expected + arrays[1] + arrays[2]) / 3
    result = average_probabilities(files)
    assert result.dtype == np.float32 and np.array_equal(result, expected)


@pytest.mark.parametrize("regions", [False, True])
def test_label_maps_follow_from_the_mean(tmp_path, regions):
    folders = [
        write_folder(tmp_path / name, seed, regions=regions) for seed, name in enumerate(("one", "two", "three"))
    ]
    ensemble_folders(folders, str(tmp_path / "merged"), num_processes=1)
    manager = PlansManager(make_model_plans()).get_label_manager(make_dataset_json(regions=regions))
    for case in "ab":
        mean = average_probabilities([f"{folder}/{case}.npz" for folder in folders])
        expected = manager.convert_probabilities_to_segmentation(mean)
        assert np.array_equal(read(tmp_path / "merged" / f"{case}.nii.gz"), expected) and len(np.unique(expected)) > 2
    assert {file.name for file in (tmp_path / "merged").iterdir()} == {
        "a.nii.gz",
        "b.nii.gz",
        "dataset.json",
        "plans.json",
    }


def test_merged_probabilities_can_be_merged_again(tmp_path):
    folders = [write_folder(tmp_path / name, seed) for seed, name in enumerate(("one", "two"))]
    ensemble_folders(folders, str(tmp_path / "merged"), save_merged_probabilities=True, num_processes=1)
    with np.load(tmp_path / "merged" / "a.npz") as file:
        assert np.array_equal(file["probabilities"], average_probabilities([f"{folder}/a.npz" for folder in folders]))
    ensemble_folders([str(tmp_path / "merged")], str(tmp_path / "again"), num_processes=1)
    assert np.array_equal(read(tmp_path / "again" / "a.nii.gz"), read(tmp_path / "merged" / "a.nii.gz"))


def test_cases_that_were_named_with_their_ending_keep_it_once(tmp_path):
    cases = ("a", "b.nii.gz", "c.nii.gz")
    folders = [write_folder(tmp_path / name, seed, cases=cases) for seed, name in enumerate(("one", "two"))]
    (tmp_path / "one" / "b.nii.gz").write_bytes(b"a label map beside b.nii.gz.npz")
    for name in ("c.nii.gz", "c.nii.gz.nii.gz"):
        (tmp_path / "one" / name).write_bytes(b"label maps of two cases, c and c.nii.gz")
    ensemble_folders(folders, str(tmp_path / "merged"), num_processes=1)
    found = {path.name for path in (tmp_path / "merged").glob("*.nii.gz")}
    assert found == {"a.nii.gz", "b.nii.gz", "c.nii.gz.nii.gz"}


def test_folders_must_hold_the_same_cases(tmp_path):
    folders = [write_folder(tmp_path / "one", 0), write_folder(tmp_path / "two", 1, cases=("a", "c"))]
    with pytest.raises(AssertionError, match=r"b\.npz, c\.npz"):
        ensemble_folders(folders, str(tmp_path / "merged"), num_processes=1)
    with pytest.raises(FileNotFoundError, match="--save_probabilities"):
        ensemble_folders([write_folder(tmp_path / "three", 0, cases=())], str(tmp_path / "merged"))


def test_probabilities_of_another_dataset_are_refused(tmp_path):
    one, two = write_folder(tmp_path / "one", 0), write_folder(tmp_path / "two", 1, regions=True)
    with pytest.raises(ValueError, match="same classes"):
        ensemble_folders([one, two], str(tmp_path / "merged"), num_processes=1)
    with pytest.raises(ValueError, match="another dataset"):
        ensemble_folders(
            [one], str(tmp_path / "merged"), num_processes=1, dataset_json_file_or_dict=make_dataset_json(regions=True)
        )


@pytest.mark.parametrize("content", [b"", b"nonsense", "other key", "truncated", "integers"])
def test_damaged_probabilities_are_named(tmp_path, content):
    file = tmp_path / "a.npz"
    np.savez(
        file,
        **{
            "other" if content == "other key" else "probabilities": np.zeros(
                (2, 3, 3, 3), np.int64 if content == "integers" else np.float32
            )
        },
    )
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content == "truncated":
        file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"a\.npz"):
        average_probabilities([str(file)])


def test_properties_that_mean_harm_are_refused(tmp_path):
    folder = write_folder(tmp_path / "one", 0, cases=("a",))

    class Attack:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'proof')!r}, 'w')",)

    (tmp_path / "one" / "a.pkl").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(pickle.UnpicklingError, match=r"a\.pkl"):
        ensemble_folders([folder], str(tmp_path / "merged"), num_processes=1)
    assert not (tmp_path / "proof").exists()


def test_validation_predictions_of_models_are_merged(roots, tmp_path):
    results = make_trained_models(roots)
    models = [str(results / f"nnUNetTrainer__nnUNetPlans__{name}") for name in ("2d", "3d_fullres")]
    ensemble_crossvalidations(models, str(tmp_path / "out"), folds=(0, 1), num_processes=1)
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 4
    (tmp_path / "out" / "case_00.nii.gz").write_bytes(b"kept")
    ensemble_crossvalidations(models, str(tmp_path / "out"), folds=(0, 1), num_processes=1, overwrite=False)
    assert (tmp_path / "out" / "case_00.nii.gz").read_bytes() == b"kept"
    (results / "nnUNetTrainer__nnUNetPlans__2d" / "fold_1" / "validation" / "case_02.npz").unlink()
    with pytest.raises(RuntimeError, match=r"case_02\.npz"):
        ensemble_crossvalidations(models, str(tmp_path / "out"), folds=(0, 1), num_processes=1)
    with pytest.raises(RuntimeError, match="--val --npz"):
        ensemble_crossvalidations(models, str(tmp_path / "out"), folds=(0, 4), num_processes=1)
    assert NAME in str(results)


def test_the_command(tmp_path, monkeypatch):
    folders = [write_folder(tmp_path / name, seed) for seed, name in enumerate(("one", "two"))]
    monkeypatch.setattr(
        sys, "argv", ["nnUNetv2_ensemble", "-i", *folders, "-o", str(tmp_path / "m"), "-np", "1", "--save_npz"]
    )
    ensemble.entry_point_ensemble_folders()
    assert {"a.npz", "a.pkl", "a.nii.gz"} <= {file.name for file in (tmp_path / "m").iterdir()}
