"""Compare predictions and scores with the reference release, on random networks and real scans."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_models import TinyModel, write_model

# The reference sums in float16, so its rounding decides where two classes are nearly equal. In a network of random
# weights that is in 0.2 % of all voxels; a few lessons make it less.
AGREEMENT = 0.999
LESSONS = 40
# The lessons end in other weights on other processors, and how many voxels bfloat16 rounds into another class depends
# on them (0.02 to 0.5 % seen). Where the classes are clear, no rounding may matter.
AGREEMENT_BF16, CLEAR = 0.98, 0.1
VOLUME = {"patch_size": (24, 32, 24), "spacing": (1.2, 0.8, 1.0), "lessons": LESSONS}

MODELS = {
    "hippocampus": TinyModel(folds=(0, 1), features=(8, 16), **VOLUME),
    "transposed": TinyModel(transpose_forward=(2, 0, 1), **VOLUME),
    "regions": TinyModel(regions_class_order=(1, 2), labels={"background": 0, "whole": [1, 2], "core": [2]}, **VOLUME),
    "lowres": TinyModel(**{**VOLUME, "spacing": (2.0, 1.6, 1.6)}),
    "cascade": TinyModel(previous_stage="3d_lowres", **VOLUME),
    "slices": TinyModel(patch_size=(32, 40), spacing=(0.9, 0.8), mirroring_axes=(0, 1), lessons=LESSONS),
    "spinalcord": TinyModel(patch_size=(8, 64, 64), spacing=(4.0, 1.0, 1.0), mirroring_axes=(1, 2), lessons=LESSONS),
    "retina": TinyModel(
        patch_size=(96, 128),
        spacing=(1.0, 1.0),
        labels={"background": 0, "vessel": 1},
        channels=("R", "G", "B"),
        file_ending=".png",
        reader="NaturalImage2DIO",
        mirroring_axes=(0, 1),
        lessons=LESSONS,
    ),
    "ct": TinyModel(
        patch_size=(24, 48, 48),
        spacing=(3.0, 4.0, 4.0),
        channels=("CT",),
        normalization="CTNormalization",
        lessons=LESSONS,
    ),
    "nrrd": TinyModel(
        patch_size=(8, 64, 64), spacing=(6.5, 2.0, 2.0), file_ending=".nrrd", mirroring_axes=(1, 2), lessons=LESSONS
    ),
}

PREDICT = """
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
for job in value:
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(job["model"], job["folds"])
    predictor.predict_from_files_sequential(job["images"], job["output"], save_probabilities=True,
                                            folder_with_segs_from_prev_stage=job["previous_stage"])
"""
_predicted: dict[str, Path] = {}


@pytest.fixture
def predicted(shared_data, reference, ours, tmp_path, monkeypatch) -> Path:
    """Predict with all models in three processes, once: folders theirs, ours, bf16, each with one folder per model.

    All cascades continue the reference's first stage.
    """
    if not _predicted:
        jobs = [
            {
                "model": str(write_model(tmp_path / "models" / kind, model)),
                "folds": list(model.folds),
                "images": str(_lay_out(kind, shared_data, tmp_path / "images" / kind)),
                "previous_stage": str(tmp_path / "theirs" / "lowres") if kind == "cascade" else None,
            }
            for kind, model in MODELS.items()
        ]
        for name, python, autocast in (("theirs", reference, "0"), ("ours", ours, "0"), ("bf16", ours, "1")):
            for kind in MODELS:
                (tmp_path / name / kind).mkdir(parents=True)
            python.environment.update(nnUNet_cpu_autocast=autocast, nnUNet_def_n_proc="1")
            python.run(PREDICT, [{**job, "output": str(tmp_path / name / kind)} for kind, job in zip(MODELS, jobs)])
        _predicted["folder"] = tmp_path
    return _predicted["folder"]


@pytest.mark.parametrize("kind", MODELS)
def test_label_maps_agree(kind, predicted):
    theirs, ending = predicted / "theirs" / kind, MODELS[kind].file_ending
    files = sorted(theirs.glob(f"*{ending}"))
    assert files
    for name, enough in (("ours", AGREEMENT), ("bf16", AGREEMENT_BF16)):
        folder = predicted / name / kind
        assert {path.name for path in folder.iterdir()} == {path.name for path in theirs.iterdir()}
        equal = [_read(folder / path.name) == _read(path) for path in files]
        agreement = sum(map(np.count_nonzero, equal)) / sum(map(np.size, equal))
        print(kind, name, f"{100 * agreement:.3f} %")
        assert agreement >= enough


@pytest.mark.parametrize("kind", MODELS)
def test_bfloat16_changes_no_label_where_the_classes_are_clear(kind, predicted):
    ending = MODELS[kind].file_ending
    for file in sorted((predicted / "ours" / kind).glob("*.npz")):
        clear = _margin(file, has_regions=MODELS[kind].regions_class_order is not None) > CLEAR
        assert clear.mean() > 0.5
        exact, rounded = (_read(predicted / name / kind / (file.stem + ending)) for name in ("ours", "bf16"))
        assert (exact == rounded).reshape(clear.shape)[clear].all()


@pytest.mark.parametrize("kind", MODELS)
def test_probabilities_agree(kind, predicted):
    for path in sorted((predicted / "theirs" / kind).glob("*.npz")):
        mine, theirs = (np.load(folder)["probabilities"] for folder in (predicted / "ours" / kind / path.name, path))
        assert mine.dtype == theirs.dtype == np.float32
        assert mine.shape == theirs.shape
        differences = np.abs(mine - theirs).max(axis=0)
        inner = differences[tuple(map(_without_rim, differences.shape))]
        print(
            kind,
            path.name,
            f"{100 * np.mean(differences <= 2e-3):.2f} % of voxels within 2e-3, without the rim "
            f"{100 * np.mean(inner <= 2e-3):.3f} %, at most {inner.max():.4f}",
        )
        # At the rim of an image only the rims of tiles reach, and there the reference rounds logits to whole numbers.
        assert np.mean(differences <= 2e-3) >= 0.98
        assert np.mean(inner <= 2e-3) >= 0.9999
        assert inner.max() <= 4e-3


def _margin(file: Path, *, has_regions: bool) -> np.ndarray:
    """Return by how much the best class leads in each voxel, or how far the least certain region is from 0.5."""
    probabilities = np.load(file)["probabilities"]
    if has_regions:
        return np.abs(probabilities - 0.5).min(axis=0)
    runner_up, best = np.partition(probabilities, -2, axis=0)[-2:]
    return best - runner_up


def _without_rim(side: int) -> slice:
    """Leave out a tenth at both ends of an axis, unless it has a few slices only."""
    rim = -(-side // 10) if side > 4 else 0
    return slice(rim, side - rim)


def _lay_out(kind: str, shared_data: Path, folder: Path) -> Path:
    """Copy a scan or two into a folder of cases."""
    folder.mkdir(parents=True)
    hippocampus = sorted((shared_data / "hippocampus" / "images").glob("*.nii.gz"))[:1]
    sources = {
        "spinalcord": sorted((shared_data / "spinalcord" / "ucl").rglob("images/*.nii.gz"))[:1],
        "retina": sorted((shared_data / "retina" / "chasedb1").rglob("*.jpg"))[:1],
        "ct": [shared_data / "odd" / "nnunet_example_ct_sm.nii.gz"],
        "nrrd": [shared_data / "odd" / "pr_brain1_image.nrrd"],
    }.get(kind, hippocampus)
    assert sources, f"no images of kind {kind} below {shared_data}"
    for number, source in enumerate(sources):
        target = folder / f"case_{number}_0000{MODELS[kind].file_ending}"
        if source.suffix == ".jpg":
            from skimage import io

            io.imsave(target, io.imread(source)[:300, :400], check_contrast=False)
        else:
            shutil.copy(source, target)
    return folder


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
    arguments = ("nnUNetv2_evaluate_folder", references, predictions, "-djfile", dataset, "-pfile", plans, "-np", "1")
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
