"""Find corrupted labels among those of one site: hippocampus MR, a fifth of whose labels are made wrong.

    python -m benchmarks.audit_annotations --data FOLDER_OF_HIPPOCAMPUS --folder WORK [--site D] [--seed 0]

Corrupted cases are shared among five kinds: eroded and dilated by one voxel, the two labels swapped, one label
missing, shifted by three voxels. Networks of a cross-validation are trained with these labels, all scans of a subject
in the same fold, and `nnUNetv2_audit_annotations` lists the doubtful cases. Prints recall and precision of the list,
overall and per kind, and writes them with all settings to WORK/result.json. Network and training are small, as two CPU
cores demand.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

DATASET, CONFIGURATION, TRAINER = "Dataset450_Audit", "3d_fullres", "nnUNetTrainerAudit"
LABELS = {"background": 0, "anterior": 1, "posterior": 2}
KINDS = ("eroded", "dilated", "swapped", "missing", "shifted")
FEATURES, BATCH_SIZE, PATCH_SIZE = (8, 16, 32, 64), 2, (32, 48, 32)
SHIFT_VOXELS = 3
WANTED = 0.8
"""Least recall and precision of the list."""

SHORT_TRAINER = '''
import os
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoDA import nnUNetTrainerNoDA
from nnunetv2.training.nnUNetTrainer.variants.optimizer.nnUNetTrainerAdam import nnUNetTrainerAdam


class nnUNetTrainerAudit(nnUNetTrainerAdam, nnUNetTrainerNoDA):
    """AdamW without augmentation, for as many iterations as two cores have time for."""

    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr = 2e-3
        self.num_epochs = int(os.environ["BENCHMARK_EPOCHS"])
        self.num_iterations_per_epoch = int(os.environ["BENCHMARK_ITERATIONS"])
        self.num_val_iterations_per_epoch = 1
'''


def corrupt(labels: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Return a label map `(Z, Y, X)` with one kind of mistake."""
    foreground = labels > 0
    if kind == "eroded":
        return np.where(ndimage.binary_erosion(foreground), labels, 0)
    if kind == "dilated":
        nearest = ndimage.distance_transform_edt(~foreground, return_distances=False, return_indices=True)
        return np.where(ndimage.binary_dilation(foreground), labels[tuple(nearest)], 0)
    if kind == "swapped":
        return np.where(foreground, 3 - labels, 0)
    if kind == "missing":
        return np.where(labels == rng.integers(1, 3), 0, labels)
    axis, steps = rng.integers(0, 3), int(rng.choice((-SHIFT_VOXELS, SHIFT_VOXELS)))
    return ndimage.shift(labels, np.eye(3, dtype=int)[axis] * steps, order=0)


def write_dataset(data: Path, raw: Path, *, site: str, seed: int, fraction: float) -> dict[str, str]:
    """Write the raw dataset of a site, with some labels corrupted; return case -> kind of mistake."""
    with (data / "sites.csv").open(newline="", encoding="utf-8") as file:
        cases = [row["case"] for row in csv.DictReader(file) if row["site"] == site]
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(cases)[: round(fraction * len(cases))]
    mistakes = {str(case): KINDS[number % len(KINDS)] for number, case in enumerate(chosen)}
    folder = raw / DATASET
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for case in cases:
        (folder / "imagesTr" / f"{case}_0000.nii.gz").symlink_to(data / "images" / f"{case}.nii.gz")
        image = sitk.ReadImage(str(data / "labels" / f"{case}.nii.gz"))
        labels = sitk.GetArrayFromImage(image)
        if case in mistakes:
            labels = corrupt(labels, mistakes[case], rng).astype(labels.dtype)
        written = sitk.GetImageFromArray(labels)
        written.CopyInformation(image)
        sitk.WriteImage(written, str(folder / "labelsTr" / f"{case}.nii.gz"), True)
    description = {"channel_names": {"0": "MRI"}, "labels": LABELS, "file_ending": ".nii.gz", "numTraining": len(cases)}
    (folder / "dataset.json").write_text(json.dumps(description, indent=4), encoding="utf-8")
    return mistakes


def write_splits(data: Path, folder: Path, *, folds: int, cases: Sequence[str]) -> None:
    """Write splits_final.json with all scans of a subject in the same fold."""
    with (data / "sites.csv").open(newline="", encoding="utf-8") as file:
        subject_of = {row["case"]: int(row["subject"]) for row in csv.DictReader(file)}
    subjects = sorted({subject_of[case] for case in cases})
    fold_of = {subject: number % folds for number, subject in enumerate(subjects)}
    splits = [
        {
            "train": [case for case in cases if fold_of[subject_of[case]] != fold],
            "val": [case for case in cases if fold_of[subject_of[case]] == fold],
        }
        for fold in range(folds)
    ]
    (folder / "splits_final.json").write_text(json.dumps(splits, indent=4), encoding="utf-8")


def shrink_plans(folder: Path) -> None:
    """Replace the plans with a network that two CPU cores can train."""
    path = folder / "nnUNetPlans.json"
    plans = json.loads(path.read_text(encoding="utf-8"))
    configuration = plans["configurations"][CONFIGURATION]
    configuration["batch_size"], configuration["patch_size"] = BATCH_SIZE, list(PATCH_SIZE)
    network = configuration["architecture"]["arch_kwargs"]
    network["features_per_stage"] = [FEATURES[min(stage, len(FEATURES) - 1)] for stage in range(network["n_stages"])]
    path.write_text(json.dumps(plans, indent=4), encoding="utf-8")


def run(environment: dict[str, str], *command: object) -> None:
    """Run a command of the package; its output is shown if it fails."""
    program = Path(sys.executable).parent / str(command[0])
    done = subprocess.run([program, *map(str, command[1:])], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def score(listed: set[str], mistakes: dict[str, str]) -> dict[str, float]:
    """Return recall and precision of a list of cases."""
    found = len(listed & set(mistakes))
    return {"recall": found / len(mistakes), "precision": found / len(listed) if listed else 0.0}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; status 1 if the list is worse than wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("FEDNNUNET_DATA", "../shared/data")) / "hippocampus"
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder")
    parser.add_argument("--site", default="D")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fraction", type=float, default=0.2, help="of the cases that are corrupted")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=25)
    arguments = parser.parse_args(argv)
    data, folder = arguments.data.resolve(), arguments.folder.resolve()
    roots = {name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    (folder / "trainers").mkdir(parents=True)
    (folder / "trainers" / f"{TRAINER}.py").write_text(SHORT_TRAINER, encoding="utf-8")
    environment = {
        **os.environ,
        **roots,
        "nnUNet_extTrainer": str(folder / "trainers"),
        "nnUNet_n_proc_DA": "1",
        "nnUNet_def_n_proc": "1",
        "nnUNet_seed": str(arguments.seed),
        "OMP_NUM_THREADS": "1",  # two folds are trained at a time
        "BENCHMARK_EPOCHS": str(arguments.epochs),
        "BENCHMARK_ITERATIONS": str(arguments.iterations),
    }
    mistakes = write_dataset(
        data, Path(roots["nnUNet_raw"]), site=arguments.site, seed=arguments.seed, fraction=arguments.fraction
    )
    start = time.monotonic()
    run(environment, "nnUNetv2_plan_and_preprocess", "-d", 450, "-c", CONFIGURATION, "-npfp", 1, "-np", 1)
    preprocessed = Path(roots["nnUNet_preprocessed"], DATASET)
    cases = sorted(
        path.name.removesuffix(".nii.gz") for path in Path(roots["nnUNet_raw"], DATASET, "labelsTr").iterdir()
    )
    shrink_plans(preprocessed)
    write_splits(data, preprocessed, folds=arguments.folds, cases=cases)
    with ThreadPoolExecutor(2) as pool:  # each waits for a process
        list(
            pool.map(
                lambda fold: run(
                    environment, "nnUNetv2_train", 450, CONFIGURATION, fold, "-tr", TRAINER, "-device", "cpu"
                ),
                range(arguments.folds),
            )
        )
    trained = time.monotonic() - start
    run(
        environment,
        "nnUNetv2_audit_annotations",
        "-d",
        450,
        "-c",
        CONFIGURATION,
        "-tr",
        TRAINER,
        "-o",
        folder / "audit",
    )
    audited = time.monotonic() - start - trained
    audit = json.loads((folder / "audit" / "audit.json").read_text(encoding="utf-8"))
    listed = {case["case"] for case in audit["cases"] if case["doubtful"]}
    result = {
        "settings": {key: str(value) for key, value in vars(arguments).items()},
        "cases": len(cases),
        "corrupted": mistakes,
        "listed": sorted(listed),
        **score(listed, mistakes),
        "recall_by_kind": {
            kind: score(listed, {case: one for case, one in mistakes.items() if one == kind})["recall"]
            for kind in KINDS
        },
        "training_s": trained,
        "audit_s": audited,
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(
        f"{len(cases)} cases, {len(mistakes)} corrupted, {len(listed)} listed: recall {result['recall']:.2f}, "
        f"precision {result['precision']:.2f}; training {trained:.0f} s, audit {audited:.0f} s"
    )
    for kind, recall in result["recall_by_kind"].items():
        print(f"  {kind:8} recall {recall:.2f}")
    return 0 if min(result["recall"], result["precision"]) >= WANTED else 1


if __name__ == "__main__":
    raise SystemExit(main())
