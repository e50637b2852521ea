"""Pack trained models of a dataset into a zip file that `nnUNetv2_install_pretrained_model_from_zip` installs."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from nnunetv2.paths import nnUNet_results
from nnunetv2.utilities.atomic_write import replacing
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.file_path_utilities import (
    convert_ensemble_folder_to_model_identifiers_and_folds,
    convert_trainer_plans_config_to_identifier,
    default_merged_folder,
)
from nnunetv2.utilities.json_files import PLANS, read_json

logger = logging.getLogger(__name__)

PRIVACY_FILE = "privacy.json"
"""In the folder of a fold that was trained with differential privacy, and of a model of several sites that were."""
_SCORES = ("summary.json", "postprocessing.pkl", "postprocessing.json")
_PROBABILITIES = (".npz", ".pkl")
# Weights, images and label maps do not get smaller by compression.
_STORED = (".pth", ".png", ".gz", ".npz")


def export_pretrained_model(
    dataset_name_or_id: int | str,
    output_file: str,
    configurations: Sequence[str] = ("2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres"),
    trainer: str = "nnUNetTrainer",
    plans_identifier: str = "nnUNetPlans",
    folds: Sequence[int | str] = (0, 1, 2, 3, 4),
    strict: bool = True,
    save_checkpoints: Sequence[str] = ("checkpoint_final.pth",),
    export_crossval_predictions: bool = False,
) -> None:
    """Write a zip file with everything that prediction needs, and the scores.

    Paths in it start at nnUNet_results.

    Args:
        output_file: The zip file; it appears complete or not at all.
        configurations: Those to pack. One that was not trained is left out if the dataset's plans do not have it, or
            if `strict` is False.
        folds: All must exist in each configuration that is packed.
        strict: Whether a configuration that was not trained is an error.
        save_checkpoints: Names of checkpoints; each must exist in each fold.
        export_crossval_predictions: Also pack validation predictions, without probabilities.

    Raises:
        RuntimeError: A configuration, or each of them, has not been trained.
        AssertionError: A fold is missing.
        FileNotFoundError: A checkpoint, plans.json, dataset.json or dataset_fingerprint.json is missing.
    """
    dataset = maybe_convert_to_dataset_name(dataset_name_or_id)
    root = Path(nnUNet_results)
    models = _find_models(root / dataset, configurations, trainer, plans_identifier, strict)
    files = [
        file
        for model in models
        for file in _files_of_model(model, folds, save_checkpoints, export_crossval_predictions)
    ]
    files += _files_of_ensembles(root / dataset, {model.name for model in models}, export_crossval_predictions)
    files += _existing(root / dataset, ("inference_information.json", "inference_instructions.txt"))
    Path(output_file).absolute().parent.mkdir(parents=True, exist_ok=True)
    with replacing(output_file) as written, zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in dict.fromkeys(files):
            kind = zipfile.ZIP_STORED if file.suffix in _STORED else zipfile.ZIP_DEFLATED
            archive.write(file, file.relative_to(root).as_posix(), compress_type=kind)


def _find_models(dataset: Path, configurations: Sequence[str], trainer: str, plans: str, strict: bool) -> list[Path]:
    folders = {
        name: dataset / convert_trainer_plans_config_to_identifier(trainer, plans, name) for name in configurations
    }
    models = [folder for folder in folders.values() if folder.is_dir()]
    if not models:
        raise RuntimeError(
            f"nothing to export: none of {', '.join(configurations)} has been trained with {trainer} "
            f"and {plans} in {dataset}"
        )
    planned = _planned_configurations(models[0])
    for name, folder in folders.items():
        if folder in models:
            continue
        if strict and name in planned:
            raise RuntimeError(
                f"{name} has not been trained: {folder} does not exist. Name the configurations to "
                "export (-c), or leave those out that are missing (--not_strict)"
            )
        logger.warning("%s is left out: %s does not exist", name, folder)
    return models


def _planned_configurations(model: Path) -> list[str]:
    return list(read_json(_require(model / "plans.json"), required=PLANS)["configurations"])


def _files_of_model(
    model: Path, folds: Sequence[int | str], checkpoints: Sequence[str], with_predictions: bool
) -> Iterator[Path]:
    missing = [fold for fold in folds if not (model / f"fold_{fold}").is_dir()]
    assert not missing, f"{model} lacks the folds {', '.join(map(str, missing))}; name those to export (-f)"
    is_private = any((model / f"fold_{fold}" / PRIVACY_FILE).is_file() for fold in folds)
    if is_private:
        logger.warning("%s was trained with differential privacy: figures that it does not cover stay here", model.name)
    for fold in folds:
        folder = model / f"fold_{fold}"
        yield from _existing(folder, (PRIVACY_FILE,) if is_private else ("debug.json",))
        for name in checkpoints:
            yield _require(folder / name)
        if is_private:
            continue
        # Neither is needed for prediction, so that a fold whose validation is to come can be shared.
        yield from _existing(folder, ("progress.png", "network_architecture.pdf"))
        yield from _scores(folder / "validation", with_predictions)
    if not is_private:
        yield from _scores(Path(default_merged_folder(str(model), folds)), with_predictions)
    for name in ("plans.json", *(() if is_private else ("dataset_fingerprint.json",)), "dataset.json"):
        yield _require(model / name)
    yield from _existing(model, (PRIVACY_FILE,))


def _files_of_ensembles(dataset: Path, models: set[str], with_predictions: bool) -> list[Path]:
    """Return the scores of those ensembles all of whose members are exported."""
    folder = dataset / "ensembles"
    if not folder.is_dir():
        return []
    files: list[Path] = []
    for ensemble in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        try:
            members, _ = convert_ensemble_folder_to_model_identifiers_and_folds(str(ensemble))
        except ValueError:
            logger.warning("%s is left out: it is not named like an ensemble", ensemble)
            continue
        if set(members) <= models:
            files += _scores(ensemble, with_predictions)
    return files


def _scores(folder: Path, with_predictions: bool) -> list[Path]:
    """Return the scores in a folder of predictions, if there is one, or all files but probabilities."""
    if not with_predictions or not folder.is_dir():
        return _existing(folder, _SCORES)
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file() and (file.suffix not in _PROBABILITIES or file.name in _SCORES)
    )


def _existing(folder: Path, names: Sequence[str]) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_file()]


def _require(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(f"cannot export {file.parent}: it has no {file.name}")
    return file
