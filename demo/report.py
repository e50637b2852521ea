"""Show what the demo has reached: a table of Dice per site, and a picture of slices with truth and prediction."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

COLOURS = {1: (0.10, 0.60, 0.95), 2: (1.00, 0.55, 0.05)}


def mean_dice(summary: Path) -> float:
    """Return the mean foreground Dice of a summary.json."""
    return json.loads(summary.read_text(encoding="utf-8"))["foreground_mean"]["Dice"]


def print_table(summaries: Mapping[str, Path], labels: Mapping[str, int]) -> None:
    """Print one line per site: Dice of every label, and their mean."""
    names = [name for name, value in labels.items() if value]
    print("\nDice on test cases that no site trained on, one model for all:\n")
    print(f"{'site':12}" + "".join(f"{name:>10}" for name in names) + f"{'mean':>10}")
    for site, summary in summaries.items():
        means = json.loads(summary.read_text(encoding="utf-8"))["mean"]
        row = "".join(f"{means[str(labels[name])]['Dice']:10.3f}" for name in names)
        print(f"{site:12}{row}{mean_dice(summary):10.3f}")


def save_picture(sites: Mapping[str, tuple[Path, Path]], path: Path) -> Path:
    """Draw, for the first test case of every site, one slice: image, ground truth, prediction.

    Args:
        sites: Name of the site -> (folder of its raw dataset, folder of its predictions).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 2.6 * len(sites)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(sites), 3, squeeze=False)
    for row, (name, (dataset, predictions)) in zip(axes, sites.items()):
        truth_file = sorted((dataset / "labelsTs").glob("*.nii.gz"))[0]
        case_id = truth_file.name.removesuffix(".nii.gz")
        image, spacing = read_volume(dataset / "imagesTs" / f"{case_id}_0000.nii.gz")
        truth, prediction = read_volume(truth_file)[0], read_volume(predictions / truth_file.name)[0]
        number = int(np.argmax(np.sum(truth == max(COLOURS), axis=(1, 2))))
        columns = {f"{name}: {case_id}": None, "ground truth": truth, "prediction": prediction}
        for axis, (title, labels) in zip(row, columns.items()):
            picture = overlay(image[number], None if labels is None else labels[number])
            axis.imshow(picture, aspect=spacing[1] / spacing[2])
            axis.set_title(title, fontsize=10)
            axis.set_axis_off()
    figure.savefig(path, dpi=130)
    return path


def overlay(image: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    """Blend a slice (Y, X) with its labels: RGB (Y, X, 3) between 0 and 1."""
    low, high = np.percentile(image, [1, 99])
    grey = np.clip((image - low) / max(high - low, 1e-8), 0, 1)
    colour = np.repeat(grey[..., None], 3, axis=-1)
    if labels is not None:
        for value, tint in COLOURS.items():
            colour[labels == value] = 0.45 * colour[labels == value] + 0.55 * np.array(tint)
    return colour


def read_volume(path: Path) -> tuple[np.ndarray, tuple[float, ...]]:
    """Read an image file: array (Z, Y, X) and spacing (Z, Y, X) in mm."""
    import SimpleITK

    image = SimpleITK.ReadImage(str(path))
    return SimpleITK.GetArrayFromImage(image), image.GetSpacing()[::-1]
