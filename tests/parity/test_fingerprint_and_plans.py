"""Fingerprints and plans against those of the reference release, on made and on real datasets."""
from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.parity

NUM_RANDOM_DATASETS = 140

PLANNERS = {
    "ExperimentPlanner": "default_experiment_planner",
    "ResEncUNetPlanner": "residual_unets.residual_encoder_unet_planners",
    "nnUNetPlannerResEncM": "residual_unets.residual_encoder_unet_planners",
    "nnUNetPlannerResEncL": "residual_unets.residual_encoder_unet_planners",
    "nnUNetPlannerResEncXL": "residual_unets.residual_encoder_unet_planners",
    "nnUNetPlannerResEncL_noResampling": "resampling.planners_no_resampling",
}

# Plans each dataset in `value`: (name, planner, its module, keywords). Networks are built without weights, on the meta
# device, which changes no number and saves the reference most of its time. No image exists, so none is read.
PLAN_ALL = """
import contextlib, importlib, io, warnings
os.environ["nnUNet_n_proc_DA"] = "1"  # the reference sets its number of threads by it
import torch
warnings.simplefilter("ignore")
base = "nnunetv2.experiment_planning.experiment_planners."
default = importlib.import_module(base + "default_experiment_planner")
default.ExperimentPlanner.determine_reader_writer = lambda self: type("SimpleITKIO", (), {})
with contextlib.redirect_stdout(io.StringIO()), torch.device("meta"):
    for name, planner, module, keywords in value:
        getattr(importlib.import_module(base + module), planner)(name, **keywords).plan_experiment()
"""

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


# ------------------------------------------------------------------------------------------------ made fingerprints


def make_random_dataset(rng: np.random.Generator, number: int) -> tuple[dict, dict, list]:
    """Return dataset.json, a fingerprint, and what to plan: (name, planner, module, keywords)."""
    num_cases = int(rng.integers(1, 12))
    kind = rng.choice(["isotropic", "thick slices", "any", "single slices", "mixed"])
    base = {"isotropic": np.full(3, rng.uniform(0.4, 2.5)), "any": rng.uniform(0.3, 4, 3),
            "thick slices": np.array([rng.uniform(2, 10), *[rng.uniform(0.3, 1.6)] * 2]),
            "single slices": np.array([999.0, 1.0, 1.0]), "mixed": rng.uniform(0.5, 1.5, 3)}[kind]
    if kind != "single slices":
        base = rng.permutation(base) if rng.random() < 0.3 else base
        base = np.round(base, int(rng.integers(1, 6)))
    spread = 0.0 if rng.random() < 0.3 or kind == "single slices" else 0.2
    spacings = base * rng.uniform(1 - spread, 1 + spread, (num_cases, 3))
    if kind == "mixed":
        spacings[rng.random(num_cases) < 0.5, 0] *= rng.uniform(3, 8)
    edge = np.exp(rng.uniform(np.log(24), np.log(700), 3))
    shapes = np.maximum(8, edge * rng.uniform(0.9, 1.1, (num_cases, 3))).astype(int)
    if kind == "thick slices":
        shapes[:, int(np.argmax(base))] = rng.integers(8, 60, num_cases)
    if kind == "single slices":
        shapes[:, 0] = 1
        shapes[:, 1:] = (shapes[:, 1:] * rng.uniform(1, 3)).astype(int)
    labels = {"background": 0, **{f"label {i}": i for i in range(1, int(rng.integers(2, 8)))}}
    name = f"Dataset{number:03d}_Random"
    dataset_json = {
        "channel_names": {str(i): str(rng.choice(["CT", "MR", "noNorm", "rescale_to_0_1"]))
                          for i in range(int(rng.integers(1, 4)))},
        "labels": labels, "numTraining": int(np.exp(rng.uniform(np.log(5), np.log(2000)))), "file_ending": ".nii.gz",
        "dataset": {"case": {"images": ["absent"], "label": "absent"}},
    }
    fingerprint = {
        "spacings": spacings.tolist(), "shapes_after_crop": shapes.tolist(),
        "median_relative_size_after_cropping": float(rng.choice([0.5, 0.75, 1.0])),
        "foreground_intensity_properties_per_channel": {"0": {"mean": float(rng.normal())}},
    }
    planner = str(rng.choice(list(PLANNERS), p=[0.5, 0.1, 0.1, 0.15, 0.1, 0.05]))
    keywords = {}
    if rng.random() < 0.2:
        keywords["gpu_memory_target_in_gb"] = float(rng.choice([4, 11, 16, 24.0]))
    if rng.random() < 0.15 and kind != "single slices":
        keywords["overwrite_target_spacing"] = np.round(base * rng.uniform(0.7, 1.5, 3), 3).tolist()
    if rng.random() < 0.1:
        keywords["suppress_transpose"] = True
    return dataset_json, fingerprint, [name, planner, PLANNERS[planner], keywords]


@pytest.mark.slow
def test_plans_of_random_fingerprints_are_the_same_files(roots, reference, ours, monkeypatch):
    rng = np.random.default_rng(20240731)
    tasks = []
    for number in range(1, NUM_RANDOM_DATASETS + 1):
        dataset_json, fingerprint, task = make_random_dataset(rng, number)
        tasks.append(task)
        for root, file, content in (("nnUNet_raw", "dataset.json", dataset_json),
                                    ("nnUNet_preprocessed", "dataset_fingerprint.json", fingerprint)):
            (roots[root] / task[0]).mkdir()
            (roots[root] / task[0] / file).write_text(json.dumps(content))
    theirs = copy_preprocessed(roots)
    ours.run(PLAN_ALL, tasks)
    monkeypatch.setenv("nnUNet_preprocessed", str(theirs))
    reference.run(PLAN_ALL, tasks)

    assert all(read_plans(theirs / task[0]) for task in tasks)
    differing = [task for task in tasks
                 if read_plans(roots["nnUNet_preprocessed"] / task[0]) != read_plans(theirs / task[0])]
    assert not differing, f"{len(differing)} of {len(tasks)} plans differ: {differing[:5]}"


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
    make_dataset(roots, "Dataset004_Hippocampus", {
        case: ([find(shared_data / "hippocampus" / "images", case)], find(shared_data / "hippocampus" / "labels", case))
        for case in cases[::6][:40]}, ["MR"], 3)
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
    folder = start_dataset(roots, "Dataset007_CT", ["CT", "PET"], 3, ".nii.gz",
                           {"background": 0, "a": 1, "b": 2, "ignore": 3})
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


@pytest.mark.slow
def test_commands_with_the_full_number_of_samples(roots, shared_data, reference, ours, monkeypatch):
    labels = sorted((shared_data / "hippocampus" / "labels").iterdir())[100:112]
    name = "Dataset008_Hippocampus"
    make_dataset(roots, name, {label.name.removesuffix(".nii.gz"): ([find(shared_data / "hippocampus" / "images",
                                                                         label.name.removesuffix(".nii.gz"))], label)
                               for label in labels}, ["MR"], 3)
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


def read_plans(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.glob("*Plans*.json")}


def compare_preprocessed(ours: Path, theirs: Path) -> None:
    assert sorted(file.name for file in ours.iterdir()) == sorted(file.name for file in theirs.iterdir())
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


def start_dataset(roots: dict[str, Path], name: str, channels: list[str], num_labels: int, file_ending: str,
                  labels: dict[str, int] | None = None) -> Path:
    folder = roots["nnUNet_raw"] / name
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps({
        "channel_names": {str(i): channel for i, channel in enumerate(channels)},
        "labels": labels or {"background": 0, **{f"label {i}": i for i in range(1, num_labels)}},
        "file_ending": file_ending}))
    return folder


def finish_dataset(folder: Path, num_training: int) -> None:
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**content, "numTraining": num_training}))


def make_dataset(roots: dict[str, Path], name: str, cases: dict[str, tuple[list[Path], Path]], channels: list[str],
                 num_labels: int) -> None:
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
