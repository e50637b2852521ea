"""Collect the validation predictions of all folds and score them together."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2.configuration import default_num_processes
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.plans.partial_labels import common_numbers
from nnunetv2.utilities.json_files import read_json


def accumulate_cv_results(
    trained_model_folder: str,
    merged_output_folder: str,
    folds: Sequence[int | str],
    num_processes: int = default_num_processes,
    overwrite: bool = True,
) -> None:
    """Copy the validation predictions of some folds into one folder and write its summary.json.

    Args:
        trained_model_folder: With plans.json, dataset.json and the folds.
        merged_output_folder: Created if needed.
        folds: Their numbers, or "all".
        overwrite: If True, an existing output folder is removed first. If False, its files are kept, and scored
            again only if something was added.

    Raises:
        RuntimeError: A fold has not been trained or validated, or two folds predicted the same case.
    """
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder2

    model, merged = Path(trained_model_folder), Path(merged_output_folder)
    dataset_json, plans = (read_json(model / name) for name in ("dataset.json", "plans.json"))
    folders = {fold: _validation_folder(model, fold) for fold in folds}
    if overwrite:
        shutil.rmtree(merged, ignore_errors=True)
    merged.mkdir(parents=True, exist_ok=True)
    for name in ("dataset.json", "plans.json"):
        shutil.copyfile(model / name, merged / name)
    has_new = _copy_predictions(folders, merged, dataset_json["file_ending"], overwrite)
    if has_new or not (merged / "summary.json").is_file():
        compute_metrics_on_folder2(
            find_references(plans["dataset_name"], dataset_json),
            str(merged),
            str(merged / "dataset.json"),
            str(merged / "plans.json"),
            str(merged / "summary.json"),
            num_processes,
            chill=True,
        )


def find_references(dataset_name: str, dataset_json: Mapping[str, Any] | None = None) -> str:
    """Return the folder of a dataset's reference label maps.

    Raw if it exists, else their copies beside the plans.

    Args:
        dataset_json: Of a model; where its labels have other values than the raw ones, these do not do.
    """
    if nnUNet_raw.is_set() and not common_numbers(dataset_json or {}):
        raw = Path(nnUNet_raw, dataset_name, "labelsTr")
        if raw.is_dir():
            return str(raw)
    return str(Path(nnUNet_preprocessed, dataset_name, "gt_segmentations"))


def _validation_folder(model: Path, fold: int | str) -> Path:
    folder = model / f"fold_{fold}" / "validation"
    if not folder.parent.is_dir():
        raise RuntimeError(
            f"fold {fold} of {model} is missing: {folder.parent} does not exist. Train it, or name the "
            "folds to use (-f)"
        )
    if not folder.is_dir():
        raise RuntimeError(
            f"fold {fold} of {model} has no validation predictions: {folder} does not exist. Run "
            "nnUNetv2_train with --val, or name the folds to use (-f)"
        )
    return folder


def _copy_predictions(folders: dict[int | str, Path], merged: Path, ending: str, overwrite: bool) -> bool:
    """Copy label maps; return whether there was a new one."""
    origin: dict[str, int | str] = {}
    has_new = False
    for fold, folder in folders.items():
        for file in sorted(folder.iterdir()):
            if not file.name.endswith(ending):
                continue
            if overwrite and file.name in origin:
                raise RuntimeError(
                    f"{file.name} was predicted in two folds, {origin[file.name]} and {fold}: the folds "
                    "of one model must not share validation cases. If splits_final.json was changed, "
                    "nnUNetv2_train ... FOLD --val validates each fold on its cases alone"
                )
            origin.setdefault(file.name, fold)
            if not (merged / file.name).exists():
                shutil.copyfile(file, merged / file.name)
                has_new = True
    return has_new
