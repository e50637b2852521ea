"""Fingerprints and plans against those of the reference release, on made and on real datasets."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

# Extracts the fingerprint of each dataset in `value` and plans it.
EXTRACT_ALL = """
import contextlib, io
os.environ["nnUNet_n_proc_DA"] = "1"
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
with contextlib.redirect_stdout(io.StringIO()):
    for name in value:
        extractor = DatasetFingerprintExtractor(name, 2)
        extractor.show_progress_bar = False
        extractor.num_foreground_voxels_for_intensitystats = 2e6
        extractor.run(overwrite_existing=True)
        ExperimentPlanner(name).plan_experiment()
"""


# ------------------------------------------------------------------------------------------------ images


@pytest.fixture
def compare(roots, reference, ours, monkeypatch):
    """Extract and plan datasets on both sides and compare all files."""

    def compare(*names: str) -> None:
        theirs = copy_preprocessed(roots)
        ours.run(EXTRACT_ALL, names)
        monkeypatch.setenv("nnUNet_preprocessed", str(theirs))
        reference.run(EXTRACT_ALL, names)
        for name in names:
            compare_preprocessed(roots["nnUNet_preprocessed"] / name, theirs / name)

    return compare


def test_hippocampus(roots, shared_data, compare):
    cases = sorted(file.name.removesuffix(".nii.gz") for file in (shared_data / "hippocampus" / "labels").iterdir())
    make_dataset(
        roots,
        "Dataset004_Hippocampus",
        {
            case: (
                [find(shared_data / "hippocampus" / "images", case)],
                find(shared_data / "hippocampus" / "labels", case),
            )
            for case in cases[::6][:40]
        },
        ["MR"],
        3,
    )
    compare("Dataset004_Hippocampus")


def test_spinal_cord_of_all_sites(roots, shared_data, compare):
    cases = {}
    for site in sorted(folder for folder in (shared_data / "spinalcord").iterdir() if folder.is_dir()):
        for label in sorted((site / "labels").iterdir()):
            case = label.name.removesuffix(".nii.gz")
            cases[f"{site.name}_{case}"] = [find(site / "images", case)], label
    make_dataset(roots, "Dataset005_SpinalCord", cases, ["MR"], 3)
    compare("Dataset005_SpinalCord")


def test_retina_as_2d_png(roots, shared_data, compare):
    from skimage import io

    folder = start_dataset(roots, "Dataset006_Retina", ["R", "G", "B"], 2, ".png")
    labels = sorted((shared_data / "retina" / "chasedb1" / "labels").iterdir())[:6]
    for label in labels:
        image = find(shared_data / "retina" / "chasedb1" / "images", label.stem)
        io.imsave(folder / "imagesTr" / f"{label.stem}_0000.png", io.imread(image), check_contrast=False)
        io.imsave(folder / "labelsTr" / f"{label.stem}.png", io.imread(label), check_contrast=False)
    finish_dataset(folder, len(labels))
    compare("Dataset006_Retina")


def test_anisotropic_ct_with_cases_without_foreground_and_an_ignore_label(roots, compare):
    """One empty case turns the intensities into float64; air around the body is cropped."""
    folder = start_dataset(
        roots, "Dataset007_CT", ["CT", "PET"], 3, ".nii.gz", {"background": 0, "a": 1, "b": 2, "ignore": 3}
    )
    rng = np.random.default_rng(7)
    for number in range(7):
        shape = (int(rng.integers(9, 14)), int(rng.integers(80, 120)), int(rng.integers(80, 120)))
        inside = np.zeros(shape, dtype=bool)
        inside[:, 10:-8, 6:-9] = True
        ct = np.where(inside, np.round(rng.normal(40, 150, shape)), 0).astype(np.float32)
        pet = np.where(inside, rng.gamma(2, 3, shape), 0).astype(np.float32)
        label = np.where(inside & (rng.random(shape) < 0.2), rng.integers(1, 4, shape), 0).astype(np.uint8)
        spacing = (float(rng.choice([5, 6, 2])), 0.8, 0.8)
        write_nifti(ct, folder / "imagesTr" / f"ct_{number}_0000.nii.gz", spacing)
        write_nifti(pet, folder / "imagesTr" / f"ct_{number}_0001.nii.gz", spacing)
        write_nifti(label * (number != 3), folder / "labelsTr" / f"ct_{number}.nii.gz", spacing)
    finish_dataset(folder, 7)
    compare("Dataset007_CT")


def test_commands_with_the_full_number_of_samples(roots, shared_data, reference, ours, monkeypatch):
    labels = sorted((shared_data / "hippocampus" / "labels").iterdir())[100:112]
    name = "Dataset008_Hippocampus"
    make_dataset(
        roots,
        name,
        {
            label.name.removesuffix(".nii.gz"): (
                [find(shared_data / "hippocampus" / "images", label.name.removesuffix(".nii.gz"))],
                label,
            )
            for label in labels
        },
        ["MR"],
        3,
    )
    theirs = copy_preprocessed(roots)
    arguments = ["-d", 8, "--verify_dataset_integrity", "--no_pp", "-npfp", 2]
    ours.command("nnUNetv2_plan_and_preprocess", *arguments)
    monkeypatch.setenv("nnUNet_preprocessed", str(theirs))
    reference = replace(reference, environment={**reference.environment, "nnUNet_n_proc_DA": "1"})
    reference.command("nnUNetv2_plan_and_preprocess", *arguments)
    compare_preprocessed(roots["nnUNet_preprocessed"] / name, theirs / name)


# ------------------------------------------------------------------------------------------------ helpers


def copy_preprocessed(roots: dict[str, Path]) -> Path:
    theirs = roots["nnUNet_preprocessed"].with_name("preprocessed_by_reference")
    shutil.copytree(roots["nnUNet_preprocessed"], theirs)
    return theirs


def compare_preprocessed(ours: Path, theirs: Path) -> None:
    names = {file.name for file in ours.iterdir()} - {"dataset_overview.png"}  # one more thing of ours
    assert names == {file.name for file in theirs.iterdir()}
    for file in sorted(ours.glob("*.json")):
        compare_json(json.loads(file.read_text()), json.loads((theirs / file.name).read_text()), file.name)


def compare_json(ours: object, theirs: object, where: str) -> None:
    """Same types, same keys in the same order, floats within 1e-6; order statistics and geometry to the bit."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert list(ours) == list(theirs), where
        for key in ours:
            compare_json(ours[key], theirs[key], f"{where} > {key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(ours, theirs)):
            compare_json(a, b, f"{where} > {i}")
    elif isinstance(ours, float) and where.endswith(("> mean", "> std")):
        assert ours == pytest.approx(theirs, rel=1e-6), where
    else:
        assert ours == theirs, where


def start_dataset(
    roots: dict[str, Path],
    name: str,
    channels: list[str],
    num_labels: int,
    file_ending: str,
    labels: dict[str, int] | None = None,
) -> Path:
    folder = roots["nnUNet_raw"] / name
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    (folder / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {str(i): channel for i, channel in enumerate(channels)},
                "labels": labels or {"background": 0, **{f"label {i}": i for i in range(1, num_labels)}},
                "file_ending": file_ending,
            }
        )
    )
    return folder


def finish_dataset(folder: Path, num_training: int) -> None:
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**content, "numTraining": num_training}))


def make_dataset(
    roots: dict[str, Path], name: str, cases: dict[str, tuple[list[Path], Path]], channels: list[str], num_labels: int
) -> None:
    """Link files of cases, (images per channel, label), into a raw dataset."""
    folder = start_dataset(roots, name, channels, num_labels, ".nii.gz")
    for case, (images, label) in cases.items():
        for i, image in enumerate(images):
            (folder / "imagesTr" / f"{case}_{i:04d}.nii.gz").symlink_to(image)
        (folder / "labelsTr" / f"{case}.nii.gz").symlink_to(label)
    finish_dataset(folder, len(cases))


def find(folder: Path, case: str) -> Path:
    """Find the image of a case, whatever its channel suffix and ending."""
    found = sorted(file for file in folder.iterdir() if file.name.startswith((f"{case}.", f"{case}_")))
    assert found, f"no image of {case} in {folder}"
    return found[0]


def write_nifti(array: np.ndarray, file: Path, spacing: tuple[float, ...]) -> None:
    import SimpleITK

    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    SimpleITK.WriteImage(image, str(file))
