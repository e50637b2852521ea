"""Write the volumes that `preprocessing.py` measures on, each once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

DATASET = "Dataset990_Phantoms"
CASES = 10
LABELS = {"background": 0, "liver": 1, "spleen": 2, "kidney": 3}


def scaled(shape: Sequence[int], scale: float) -> tuple[int, ...]:
    return tuple(max(8, round(n * scale)) for n in shape)


def draw_ellipsoids(shape: Sequence[int], labels: int, rng: np.random.Generator) -> np.ndarray:
    """Draw overlapping ellipsoids, one per label above 0."""
    drawn = np.zeros(shape, np.int8)
    grid = np.ogrid[tuple(slice(0, 1, n * 1j) for n in shape)]
    for label in range(1, labels):
        centre, radius = rng.uniform(0.2, 0.8, 3), rng.uniform(0.08, 0.25, 3)
        drawn[sum(((axis - c) / r) ** 2 for axis, c, r in zip(grid, centre, radius)) < 1] = label
    return drawn


def write_resampling_volumes(folder: Path, scale: float) -> None:
    """Write an image of noise, a map of ten labels, and the shape to resample both to."""
    if (folder / "new_shape.npy").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    shape = scaled((200, 400, 400), scale)
    np.save(folder / "image.npy", rng.normal(size=shape).astype(np.float32))
    np.save(folder / "labels.npy", draw_ellipsoids(shape, 10, rng))
    np.save(folder / "new_shape.npy", scaled((250, 500, 500), scale))


def write_many_names(folder: Path, cases: int) -> None:
    """Write a raw dataset of empty files, to be listed only."""
    images = folder / "imagesTr"
    if (folder / "dataset.json").is_file():
        return
    images.mkdir(parents=True)
    for i in range(cases):
        (images / f"case_{i:05}_0000.nii.gz").touch()
    write_dataset_json(folder, cases)


def write_ct_dataset(folder: Path, scale: float) -> None:
    """Write ten scans with bodies of tissue in air, three organs, noise, and a spacing of their own each."""
    if (folder / "dataset.json").is_file():
        return
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for case in range(CASES):
        rng = np.random.default_rng(case)
        labels = draw_ellipsoids(scaled((150, 300, 300), scale), len(LABELS), rng)
        grid = np.ogrid[tuple(slice(-1, 1, n * 1j) for n in labels.shape)]
        in_body = (grid[1] / 0.8) ** 2 + (grid[2] / 0.9) ** 2 + 0 * grid[0] < 1
        image = np.where(in_body, 40.0, -1000.0) + 30 * labels + rng.normal(0, 15, labels.shape)
        spacing = (0.7 + 0.02 * case, 0.7 + 0.02 * case, 1 + 0.1 * case)
        write_nifti(image.astype(np.int16), folder / "imagesTr" / f"case_{case}_0000.nii.gz", spacing)
        write_nifti(labels.astype(np.uint8), folder / "labelsTr" / f"case_{case}.nii.gz", spacing)
    write_dataset_json(folder, CASES)


def write_nifti(array: np.ndarray, path: Path, spacing: Sequence[float]) -> None:
    """Write `(z, y, x)` voxels; the spacing in ITK's order."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(array)
    image.SetSpacing([float(side) for side in spacing])
    sitk.WriteImage(image, str(path), True)


def write_dataset_json(folder: Path, cases: int) -> None:
    """Come last: a folder with this file is complete."""
    (folder / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "CT"}, "labels": LABELS, "numTraining": cases, "file_ending": ".nii.gz"})
    )
