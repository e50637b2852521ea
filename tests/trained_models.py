"""Write the results of trainings of several models: folds with validation label maps and probabilities."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from tiny_dataset import make_configuration, make_plans

from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.restricted_pickle import save_pickle

NAME = "Dataset997_Models"
SHAPE, SPACING = (10, 22, 26), (3.0, 1.5, 1.0)
PLAIN = {"background": 0, "organ": 1, "lesion": 2, "vessel": 3}
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "tip": [3]}


def make_dataset_json(*, regions: bool = False, ignore: bool = False) -> dict:
    labels = dict(REGIONS if regions else PLAIN)
    if ignore:
        labels["ignore"] = 4
    content = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 6, "file_ending": ".nii.gz"}
    return {**content, "regions_class_order": [1, 2, 3]} if regions else content


def make_model_plans(configurations: Sequence[str] = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")) -> dict:
    plans = make_plans()
    described = {
        "2d": make_configuration(dims=2),
        "3d_fullres": make_configuration(),
        "3d_lowres": {
            **make_configuration(),
            "data_identifier": "nnUNetPlans_3d_lowres",
            "next_stage": "3d_cascade_fullres",
        },
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
    }
    return {**plans, "dataset_name": NAME, "configurations": {name: described[name] for name in configurations}}


def draw_reference(rng: np.random.Generator, *, ignore: bool = False) -> np.ndarray:
    """Draw an organ with a lesion and a vessel; with `ignore`, a slab of label 4 that nobody annotated."""
    grid = np.indices(SHAPE) * np.array([2.0, 1, 1])[:, None, None, None]
    centre = np.array([10.0, 11, 13]) + rng.uniform(-1, 1, 3)
    distance = np.sqrt(((grid - centre[:, None, None, None]) ** 2).sum(0))
    labels = (distance < 8).astype(np.uint8)
    labels[distance < 4] = 2
    labels[:, 10:12, 12:15] = 3
    if ignore:
        labels[:2] = 4
    return labels


def draw_probabilities(reference: np.ndarray, rng: np.random.Generator, noise: float, regions: bool) -> np.ndarray:
    """Return probabilities `(c, *spatial)` near a reference, blurred by noise and with false islands."""
    truth = np.where(reference == 4, 0, reference).astype(int)
    for _ in range(3):
        label, start = rng.integers(1, 4), [rng.integers(0, n - 3) for n in SHAPE]
        truth[tuple(slice(s, s + 2) for s in start)] = label
    logits = 2 * np.eye(4)[truth].transpose(3, 0, 1, 2) + rng.normal(0, noise, (4, *SHAPE))
    probabilities = np.exp(logits) / np.exp(logits).sum(0)
    if regions:
        probabilities = np.stack([probabilities[1:].sum(0), probabilities[2:].sum(0), probabilities[3]])
    return probabilities.astype(np.float32)


def write_label_map(path: Path, labels: np.ndarray) -> None:
    image = sitk.GetImageFromArray(labels.astype(np.uint8))
    image.SetSpacing(SPACING[::-1])
    sitk.WriteImage(image, str(path), True)


def properties() -> dict:
    return {
        "sitk_stuff": {
            "spacing": SPACING[::-1],
            "origin": (0.0, 0.0, 0.0),
            "direction": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
        },
        "spacing": list(SPACING),
        "shape_before_cropping": SHAPE,
        "bbox_used_for_cropping": [[0, n] for n in SHAPE],
        "shape_after_cropping_and_before_resampling": SHAPE,
    }


def write_case(folder: Path, case: str, probabilities: np.ndarray, label_manager) -> None:
    """Write label map, probabilities and properties of a prediction."""
    np.savez_compressed(folder / f"{case}.npz", probabilities=probabilities)
    save_pickle(properties(), folder / f"{case}.pkl")
    write_label_map(folder / f"{case}.nii.gz", label_manager.convert_probabilities_to_segmentation(probabilities))


def make_trained_models(
    roots: dict[str, Path],
    *,
    configurations: dict[str, float] | None = None,
    folds: Sequence[int | str] = (0, 1),
    cases_per_fold: int = 2,
    regions: bool = False,
    ignore: bool = False,
    planned: Sequence[str] | None = None,
) -> Path:
    """Write references, plans and trained models below the three roots.

    Args:
        configurations: Name -> noise of its predictions.
        planned: Configurations in the plans; default: all four.

    Returns:
        The dataset's folder of results.
    """
    configurations = configurations or {"2d": 1.6, "3d_fullres": 1.4}
    dataset_json = make_dataset_json(regions=regions, ignore=ignore)
    plans = make_model_plans(planned) if planned else make_model_plans()
    label_manager = PlansManager(plans).get_label_manager(dataset_json)
    preprocessed, raw = roots["nnUNet_preprocessed"] / NAME, roots["nnUNet_raw"] / NAME
    (preprocessed / "gt_segmentations").mkdir(parents=True)
    (raw / "labelsTr").mkdir(parents=True)
    for path, content in (
        (preprocessed / "nnUNetPlans.json", plans),
        (preprocessed / "dataset.json", dataset_json),
        (raw / "dataset.json", dataset_json),
    ):
        path.write_text(json.dumps(content))
    rng = np.random.default_rng(0)
    cases = {f"case_{number:02}": draw_reference(rng, ignore=ignore) for number in range(len(folds) * cases_per_fold)}
    for case, reference in cases.items():
        write_label_map(preprocessed / "gt_segmentations" / f"{case}.nii.gz", reference)
        shutil.copy(preprocessed / "gt_segmentations" / f"{case}.nii.gz", raw / "labelsTr")
    for configuration, noise in configurations.items():
        model = roots["nnUNet_results"] / NAME / f"nnUNetTrainer__nnUNetPlans__{configuration}"
        model.mkdir(parents=True)
        for name, content in (("plans", plans), ("dataset", dataset_json), ("dataset_fingerprint", {"spacings": []})):
            (model / f"{name}.json").write_text(json.dumps(content))
        for number, fold in enumerate(folds):
            validation = model / f"fold_{fold}" / "validation"
            validation.mkdir(parents=True)
            (model / f"fold_{fold}" / "checkpoint_final.pth").write_bytes(b"weights" * 20)
            (model / f"fold_{fold}" / "progress.png").write_bytes(b"picture")
            for case in list(cases)[number * cases_per_fold : (number + 1) * cases_per_fold]:
                write_case(validation, case, draw_probabilities(cases[case], rng, noise, regions), label_manager)
            compute_metrics_on_folder2(
                str(preprocessed / "gt_segmentations"),
                str(validation),
                str(model / "dataset.json"),
                str(model / "plans.json"),
                chill=True,
            )
    return roots["nnUNet_results"] / NAME
