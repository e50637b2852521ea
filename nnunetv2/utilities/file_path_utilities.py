"""Names of model folders: nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION/fold_X and back."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2.paths import nnUNet_results
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.legacy_names import file_helpers_of

if TYPE_CHECKING:
    from multiprocessing.pool import AsyncResult, Pool
    from multiprocessing.process import BaseProcess

__getattr__ = file_helpers_of(__name__)

_ENSEMBLE = "ensemble"
_BETWEEN_MODELS = "___"
_BETWEEN_PARTS = "__"


def convert_trainer_plans_config_to_identifier(trainer_name: str, plans_identifier: str, configuration: str) -> str:
    """Return the name of a model's folder: nnUNetTrainer__nnUNetPlans__3d_fullres."""
    return _BETWEEN_PARTS.join((trainer_name, plans_identifier, configuration))


def convert_identifier_to_trainer_plans_config(identifier: str) -> list[str]:
    """Return trainer, plans and configuration of a model's folder.

    It may be given with its path.
    """
    return Path(identifier).name.split(_BETWEEN_PARTS)


def get_output_folder(
    dataset_name_or_id: str | int,
    trainer_name: str = "nnUNetTrainer",
    plans_identifier: str = "nnUNetPlans",
    configuration: str = "3d_fullres",
    fold: str | int | None = None,
) -> str:
    """Return the folder of a model below nnUNet_results, or of one of its folds."""
    identifier = convert_trainer_plans_config_to_identifier(trainer_name, plans_identifier, configuration)
    folder = os.path.join(nnUNet_results, maybe_convert_to_dataset_name(dataset_name_or_id), identifier)
    return folder if fold is None else os.path.join(folder, f"fold_{fold}")


def parse_dataset_trainer_plans_configuration_from_path(path: str) -> tuple[str, str, str, str] | None:
    """Return dataset, trainer, plans and configuration that a path into a model folder names.

    Returns:
        None if no component starts with `Dataset`, or if the component two above a `fold_X` does not.

    Raises:
        AssertionError: The component below the dataset is missing or is no TRAINER__PLANS__CONFIGURATION.
    """
    components = Path(path).parts
    fold = next((i for i, part in enumerate(components) if part.startswith("fold_")), None)
    if fold is not None:
        assert fold >= 2, _bad_model_path(path)
        dataset = fold - 2
        if not components[dataset].startswith("Dataset"):
            return None
    else:
        dataset = next((i for i, part in enumerate(components) if part.startswith("Dataset")), None)
        if dataset is None:
            return None
    assert dataset + 1 < len(components), _bad_model_path(path)
    parts = convert_identifier_to_trainer_plans_config(components[dataset + 1])
    assert len(parts) == 3, _bad_model_path(path)
    trainer, plans, configuration = parts
    return components[dataset], trainer, plans, configuration


def _bad_model_path(path: str) -> str:
    return f"{path} does not lead into a model folder DatasetXXX_NAME/TRAINER__PLANS__CONFIGURATION[/fold_X]"


def default_merged_folder(model_folder: str, folds: Sequence[int | str]) -> str:
    """Return where the accumulated cross-validation results of a model lie."""
    return os.path.join(model_folder, f"crossval_results_folds_{folds_tuple_to_string(folds)}")


def get_ensemble_name(model1_folder: str, model2_folder: str, folds: Sequence[int | str]) -> str:
    """Return the folder name of an ensemble of two models: ensemble___MODEL1___MODEL2___FOLDS."""
    models = (Path(folder).name for folder in (model1_folder, model2_folder))
    return _BETWEEN_MODELS.join((_ENSEMBLE, *models, folds_tuple_to_string(folds)))


def get_ensemble_name_from_d_tr_c(
    dataset: str | int, tr1: str, p1: str, c1: str, tr2: str, p2: str, c2: str, folds: Sequence[int | str]
) -> str:
    """Return the folder name of an ensemble of two models of a dataset.

    Each is given by trainer, plans, configuration.
    """
    return get_ensemble_name(get_output_folder(dataset, tr1, p1, c1), get_output_folder(dataset, tr2, p2, c2), folds)


def convert_ensemble_folder_to_model_identifiers_and_folds(ensemble_folder: str) -> tuple[list[str], str]:
    """Return the model identifiers and folds in an ensemble's folder name.

    Folds as text.

    Raises:
        ValueError: The name has another form.
    """
    parts = Path(ensemble_folder).name.split(_BETWEEN_MODELS)
    if len(parts) < 3 or parts[0] != _ENSEMBLE:
        raise ValueError(f"{ensemble_folder} is no ensemble folder: expected ensemble___MODEL1___MODEL2___FOLDS")
    return parts[1:-1], parts[-1]


def folds_tuple_to_string(folds: Iterable[int | str]) -> str:
    """Return folds as they stand in folder names: (0, 1, "all") gives 0_1_all."""
    return "_".join(str(fold) for fold in folds)


def folds_string_to_tuple(folds_string: str) -> list[int | str]:
    """Return folds from a folder name as a list: 0_1_all gives [0, 1, "all"]."""
    return [_parse_fold(fold) for fold in folds_string.split("_")]


def _parse_fold(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


def check_workers_alive_and_busy(
    export_pool: Pool,
    worker_list: Sequence[BaseProcess],
    results_list: Sequence[AsyncResult],
    allowed_num_queued: int = 0,
) -> bool:
    """Tell whether a pool has all the work it should have.

    As many unfinished results as workers, and some queued.

    Args:
        export_pool: The pool, of which only the number of workers counts.
        worker_list: Its processes as they were at the start; a pool replaces dead ones silently.
        results_list: The results of `apply_async` so far.
        allowed_num_queued: Unfinished results beyond one per worker.

    Raises:
        RuntimeError: A worker has died, most often because the machine ran out of memory.
    """
    dead = [worker for worker in worker_list if not worker.is_alive()]
    if dead:
        codes = ", ".join(str(worker.exitcode) for worker in dead)
        raise RuntimeError(
            f"{len(dead)} of {len(worker_list)} worker processes died (exit codes {codes}; -9 means "
            "killed, mostly for lack of memory: try fewer processes)"
        )
    unfinished = sum(not result.ready() for result in results_list)
    return unfinished >= len(export_pool._pool) + allowed_num_queued
