"""Find predictions of labelled cases by networks that have not learned from them.

Networks of a cross-validation predict the cases that they were validated on. Their training has left these predictions
in the folder `validation` of each fold; missing ones are made here. All other cases are predicted by the last fold,
and count as seen: a network may repeat the mistake that it was taught.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2.errors import InvalidInputError
from nnunetv2.utilities.file_path_utilities import (
    convert_identifier_to_trainer_plans_config,
    convert_trainer_plans_config_to_identifier,
)

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Fold = int | str


@dataclass(frozen=True)
class PlannedPrediction:
    """Where the prediction of a case comes from."""

    folds: tuple[Fold, ...]
    """Folds whose networks predict it."""
    file: Path | None
    """The prediction, if it is there already."""
    is_seen: bool
    """Whether these networks may have learned from its label."""


def find_model_folder(
    results: Path, dataset: str, *, trainer: str, plans: str, configuration: str | None, checkpoint: str
) -> Path:
    """Return the folder of a trained model of a dataset.

    Args:
        results: nnUNet_results.
        configuration: None: the only one that has been trained.

    Raises:
        InvalidInputError: There is none, or several and none is named.
    """
    if configuration is not None:
        folder = results / dataset / convert_trainer_plans_config_to_identifier(trainer, plans, configuration)
        if not find_folds(folder, checkpoint):
            raise InvalidInputError(
                f"{folder} has no fold with a {checkpoint}: train it (nnUNetv2_train), or name another model "
                "(-tr, -p, -c, or -m FOLDER)"
            )
        return folder
    trained = [
        folder
        for folder in sorted((results / dataset).glob(f"{trainer}__{plans}__*"))
        if len(convert_identifier_to_trainer_plans_config(folder.name)) == 3 and find_folds(folder, checkpoint)
    ]
    if len(trained) == 1:
        return trained[0]
    names = [convert_identifier_to_trainer_plans_config(folder.name)[2] for folder in trained]
    if not trained:
        raise InvalidInputError(
            f"{results / dataset} has no model of {trainer} with {plans} that has a {checkpoint}: train one "
            "(nnUNetv2_train), or name another (-tr, -p, or -m FOLDER)"
        )
    raise InvalidInputError(f"{dataset} has several trained configurations: name one with -c ({', '.join(names)})")


def find_folds(folder: Path, checkpoint: str) -> list[Fold]:
    """Return the folds that have a checkpoint: numbers in their order, then 'all'."""
    from nnunetv2.models import model_folder

    numbers: list[Fold] = sorted(model_folder.find_folds(folder, checkpoint)) if folder.is_dir() else []
    return [*numbers, "all"] if (folder / "fold_all" / checkpoint).is_file() else numbers


def plan_predictions(
    cases: Iterable[str],
    *,
    folder: Path,
    folds: Sequence[Fold],
    splits: Sequence[Mapping[str, Sequence[str]]],
    file_ending: str,
    is_unseen: bool,
) -> dict[str, PlannedPrediction]:
    """Decide which networks predict each case.

    Args:
        cases: Those of the dataset.
        folder: The model's.
        folds: Those that have been trained.
        splits: Content of splits_final.json of this dataset; empty if there is none.
        is_unseen: Whether the model comes from elsewhere and has never seen these cases.
    """
    if is_unseen:
        chosen = tuple(fold for fold in folds if fold != "all") or tuple(folds)
        return {case: PlannedPrediction(chosen, None, False) for case in cases}
    validated: dict[str, int] = {}
    for fold in folds:
        if isinstance(fold, int):
            for case in _validation_cases(folder, fold, splits, file_ending):
                validated.setdefault(case, fold)
    planned = {}
    for case in cases:
        if case in validated:
            file = folder / f"fold_{validated[case]}" / "validation" / f"{case}{file_ending}"
            planned[case] = PlannedPrediction((validated[case],), file if file.is_file() else None, False)
        else:
            planned[case] = PlannedPrediction((folds[-1],), None, True)  # 'all', which has most cases, if there is one
    return planned


def predict_missing(
    planned: Mapping[str, PlannedPrediction],
    images: Mapping[str, Sequence[str]],
    *,
    folder: Path,
    checkpoint: str,
    output: Path,
    file_ending: str,
    device: torch.device,
    num_processes: int,
) -> dict[str, Path]:
    """Predict the cases without a prediction, and return the file of every case.

    A case that could not be predicted has no file there.

    Args:
        planned: As `plan_predictions` says.
        images: Files of each case, one per channel.
        output: Folder for predictions; those of an earlier audit are replaced.

    Raises:
        InvalidInputError: The model is the second stage of a cascade, and predictions are missing.
    """
    files = {case: plan.file or output / f"{case}{file_ending}" for case, plan in planned.items()}
    groups: dict[tuple[Fold, ...], list[str]] = {}
    for case, plan in planned.items():
        if plan.file is None:
            files[case].unlink(missing_ok=True)
            groups.setdefault(plan.folds, []).append(case)
    for folds, cases in groups.items():
        logger.info("predicting %d cases with fold %s", len(cases), ", ".join(map(str, folds)))
        _predict(
            [list(images[case]) for case in cases],
            [str(output / case) for case in cases],
            folder=folder,
            folds=folds,
            checkpoint=checkpoint,
            device=device,
            num_processes=num_processes,
            file_ending=file_ending,
        )
    return files


def _predict(
    images: list[list[str]],
    outputs: list[str],
    *,
    folder: Path,
    folds: Sequence[Fold],
    checkpoint: str,
    device: torch.device,
    num_processes: int,
    file_ending: str,
) -> None:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=device, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), folds, checkpoint)
    if predictor.configuration_manager.previous_stage_name is not None:
        raise InvalidInputError(
            f"{folder} is the second stage of a cascade and has no prediction of {len(images)} cases: make them with "
            "nnUNetv2_train ... --val, or audit with another configuration (-c)"
        )
    workers = 0 if device.type == "cpu" else num_processes
    try:
        if workers:
            predictor.predict_from_files(
                images, outputs, num_processes_preprocessing=workers, num_processes_segmentation_export=workers
            )
        else:
            predictor.predict_from_files_sequential(images, outputs)
    except RuntimeError as error:
        if not any(Path(f"{output}{file_ending}").is_file() for output in outputs):
            raise
        logger.warning("%s", error)  # the others are there; the report lists these cases


def _validation_cases(
    folder: Path, fold: int, splits: Sequence[Mapping[str, Sequence[str]]], file_ending: str
) -> list[str]:
    """Return the cases that a fold was validated on; beyond the splits, those that its training has predicted."""
    if fold < len(splits):
        return list(splits[fold]["val"])
    validated = (folder / f"fold_{fold}" / "validation").glob(f"*{file_ending}")
    return [path.name.removesuffix(file_ending) for path in validated]
