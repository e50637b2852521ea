"""Compare predictions and scores with the reference release, on random networks and real scans."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_models import TinyModel, write_model

pytestmark = pytest.mark.parity

# The reference sums in float16, so its rounding decides where two classes are nearly equal. In a network of random
# weights that is in 0.2 % of all voxels; a few lessons make it less.
AGREEMENT = 0.999
LESSONS = 40

MODELS = {
    "hippocampus": TinyModel(patch_size=(24, 32, 24), spacing=(1.2, 0.8, 1.0), folds=(0, 1), features=(8, 16),
                               lessons=LESSONS),
    "transposed": TinyModel(patch_size=(24, 32, 24), spacing=(1.2, 0.8, 1.0), transpose_forward=(2, 0, 1),
                              lessons=LESSONS),
    "spinalcord": TinyModel(patch_size=(8, 64, 64), spacing=(4.0, 0.7, 0.7), mirroring_axes=(1, 2), lessons=LESSONS),
    "regions": TinyModel(patch_size=(24, 32, 24), spacing=(1.2, 0.8, 1.0), regions_class_order=(1, 2),
                         labels={"background": 0, "whole": [1, 2], "core": [2]}, lessons=LESSONS),
    "slices": TinyModel(patch_size=(32, 40), spacing=(0.9, 0.8), mirroring_axes=(0, 1), lessons=LESSONS),
    "retina": TinyModel(patch_size=(96, 128), spacing=(1.0, 1.0), labels={"background": 0, "vessel": 1},
                        channels=("R", "G", "B"), file_ending=".png", reader="NaturalImage2DIO", mirroring_axes=(0, 1),
                          lessons=LESSONS),
}

PREDICT = """
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, perform_everything_on_device=False)
predictor.initialize_from_trained_model_folder(value["model"], value["folds"])
predictor.predict_from_files(value["images"], value["output"], save_probabilities=value["probabilities"],
                             num_processes_preprocessing=1, num_processes_segmentation_export=1)
"""


@pytest.fixture
def images(shared_data, tmp_path):
    """Return a function that lays out a few scans as a folder of cases."""
    def lay_out(kind: str, count: int = 1) -> Path:
        folder = tmp_path / "images"
        folder.mkdir()
        source, ending = {
            "retina": (shared_data / "retina" / "chasedb1", ".jpg"),
            "spinalcord": (shared_data / "spinalcord" / "ucl", ".nii.gz"),
        }.get(kind, (shared_data / "hippocampus", ".nii.gz"))
        files = sorted(path for path in (source / "images").rglob(f"*{ending}"))[:count]
        assert files, f"no images below {source}"
        for number, file in enumerate(files):
            if kind == "retina":
                from skimage import io
                io.imsave(folder / f"eye_{number}_0000.png", io.imread(file)[:300, :400], check_contrast=False)
            else:
                shutil.copy(file, folder / f"case_{number}_0000.nii.gz")
        return folder
    return lay_out


@pytest.mark.parametrize("kind", MODELS)
def test_label_maps_agree(kind, images, reference, ours, tmp_path):
    model = MODELS[kind]
    value = {"model": str(write_model(tmp_path / "model", model)), "folds": list(model.folds),
             "images": str(images(kind)), "probabilities": True}
    reference.run(PREDICT, {**value, "output": str(tmp_path / "theirs")})
    ours.run(PREDICT, {**value, "output": str(tmp_path / "ours")})

    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == names
    for name in names:
        if name.endswith(model.file_ending):
            mine, theirs = (_read(tmp_path / folder / name) for folder in ("ours", "theirs"))
            agreement = np.mean(mine == theirs)
            print(kind, name, agreement, np.bincount(theirs.ravel()))
            assert agreement >= AGREEMENT
        if name.endswith(".npz"):
            mine, theirs = (np.load(tmp_path / folder / name)["probabilities"] for folder in ("ours", "theirs"))
            assert mine.dtype == theirs.dtype == np.float32
            assert mine.shape == theirs.shape
            assert np.abs(mine - theirs).mean() < 1e-3
            print(kind, name, "probabilities differ by", np.abs(mine - theirs).max())


@pytest.mark.parametrize("kind", ["hippocampus", "regions"])
def test_summaries_are_equal(kind, shared_data, reference, ours, tmp_path):
    model = MODELS[kind]
    references, predictions = tmp_path / "references", tmp_path / "predictions"
    references.mkdir()
    predictions.mkdir()
    labels = sorted((shared_data / "hippocampus" / "labels").glob("*.nii.gz"))[:3]
    for file in labels:
        shutil.copy(file, references)
        _shift(file, predictions / file.name)
    plans, dataset = tmp_path / "plans.json", tmp_path / "dataset.json"
    plans.write_text(json.dumps(model.plans()))
    dataset.write_text(json.dumps(model.dataset_json()))
    arguments = ("nnUNetv2_evaluate_folder", references, predictions, "-djfile", dataset, "-pfile", plans, "-np", "2")
    reference.command(*arguments, "-o", tmp_path / "theirs.json")
    ours.command(*arguments, "-o", tmp_path / "ours.json")
    assert (tmp_path / "ours.json").read_text() == (tmp_path / "theirs.json").read_text()


def _shift(source: Path, target: Path) -> None:
    import SimpleITK as sitk

    image = sitk.ReadImage(str(source))
    moved = sitk.GetImageFromArray(np.roll(sitk.GetArrayFromImage(image), (1, 2, 0), (0, 1, 2)))
    moved.CopyInformation(image)
    sitk.WriteImage(moved, str(target))


def _read(path: Path) -> np.ndarray:
    if path.suffix == ".png":
        from skimage import io
        return io.imread(path)
    import SimpleITK as sitk
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
