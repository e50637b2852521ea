"""Draw phantom scans: a body with one organ and a lesion inside it, as three scanners would see them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LABELS = {"background": 0, "organ": 1, "lesion": 2}
FIELD_OF_VIEW_MM = (40.0, 40.0, 40.0)


@dataclass(frozen=True, kw_only=True)
class Scanner:
    """What makes the images of one site look different from those of the others."""

    spacing_mm: tuple[float, float, float]
    """Distance of voxels, array order (Z, Y, X)."""
    intensities: tuple[float, float, float]
    """Mean intensity of body, organ and lesion."""
    noise: float
    """Standard deviation of the noise, in units of the organ's contrast to the body."""
    bias: float
    """Strength of the slow brightness change across the image, as a fraction."""


def draw_labels(grid_mm: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw one subject on a grid of positions.

    Args:
        grid_mm: (3, Z, Y, X) positions relative to the centre of the field of view.
        rng: Decides position, size and orientation of organ and lesion.

    Returns:
        The label map (Z, Y, X) uint8, and a boolean map of the body of the same shape.
    """
    body = ellipsoid(grid_mm, centre=np.zeros(3), radii=np.array([26.0, 17.5, 18.5]))
    centre = rng.uniform(-3.5, 3.5, 3)
    radii = rng.uniform([8.0, 7.0, 9.0], [11.0, 9.5, 12.0])
    organ = ellipsoid(grid_mm, centre=centre, radii=radii, rotation=random_rotation(rng))
    lesion_radius = rng.uniform(4.2, 5.6)
    direction = rng.normal(size=3)
    lesion_centre = centre + direction / np.linalg.norm(direction) * rng.uniform(0.0, 0.35) * radii.min()
    lesion = ellipsoid(grid_mm, centre=lesion_centre, radii=lesion_radius * rng.uniform(0.85, 1.15, 3))
    labels = np.zeros(grid_mm.shape[1:], np.uint8)
    labels[organ] = LABELS["organ"]
    labels[lesion & organ] = LABELS["lesion"]
    return labels, body


def ellipsoid(grid_mm: np.ndarray, *, centre: np.ndarray, radii: np.ndarray, rotation: np.ndarray | None = None):
    """Mark the positions inside an ellipsoid: boolean (Z, Y, X)."""
    offset = grid_mm - centre[:, None, None, None]
    if rotation is not None:
        offset = np.tensordot(rotation, offset, axes=1)
    return np.sum((offset / radii[:, None, None, None]) ** 2, axis=0) <= 1


def random_rotation(rng: np.random.Generator, max_angle_rad: float = 0.5) -> np.ndarray:
    """Rotate about a random axis by a small angle (Rodrigues' formula): (3, 3)."""
    axis = rng.normal(size=3)
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = rng.uniform(-max_angle_rad, max_angle_rad)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def scan(scanner: Scanner, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw one subject and its image: float32 (Z, Y, X) and label map uint8 (Z, Y, X)."""
    from scipy.ndimage import gaussian_filter

    axes = [
        np.arange(round(length / step)) * step - length / 2 + step / 2
        for length, step in zip(FIELD_OF_VIEW_MM, scanner.spacing_mm)
    ]
    grid_mm = np.stack(np.meshgrid(*axes, indexing="ij"))
    labels, body = draw_labels(grid_mm, rng)
    level_body, level_organ, level_lesion = (level * rng.uniform(0.95, 1.05) for level in scanner.intensities)
    image = np.where(body, level_body, 0.0)
    image[labels == LABELS["organ"]] = level_organ
    image[labels == LABELS["lesion"]] = level_lesion
    image = gaussian_filter(image, sigma=[0.4 / step for step in scanner.spacing_mm])
    slope = rng.normal(size=3)
    slow = np.tensordot(slope / np.linalg.norm(slope), grid_mm, axes=1) / (max(FIELD_OF_VIEW_MM) / 2)
    image *= 1 + scanner.bias * slow
    image += rng.normal(scale=scanner.noise * abs(level_organ - level_body), size=image.shape)
    return image.astype(np.float32), labels


def write_dataset(folder: Path, scanner: Scanner, *, num_train: int, num_test: int, seed: int) -> None:
    """Write a raw nnU-Net dataset: imagesTr, labelsTr, imagesTs, labelsTs and dataset.json."""
    rng = np.random.default_rng(seed)
    for number in range(num_train + num_test):
        suffix = "Tr" if number < num_train else "Ts"
        image, labels = scan(scanner, rng)
        case_id = f"phantom_{number:03d}"
        write_nifti(folder / f"images{suffix}" / f"{case_id}_0000.nii.gz", image, scanner.spacing_mm)
        write_nifti(folder / f"labels{suffix}" / f"{case_id}.nii.gz", labels, scanner.spacing_mm)
    description = {"channel_names": {"0": "MR"}, "labels": LABELS, "numTraining": num_train, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(description, indent=4), encoding="utf-8")


def write_nifti(path: Path, array: np.ndarray, spacing_mm: tuple[float, float, float]) -> None:
    """Write one volume (Z, Y, X) with its spacing (Z, Y, X)."""
    import SimpleITK

    path.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(spacing_mm[::-1])
    SimpleITK.WriteImage(image, str(path))
