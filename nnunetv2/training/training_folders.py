"""Locate the folders that a training reads and writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.training.options import BEFORE_RESULTS_NAME, check_results_name

if TYPE_CHECKING:
    from nnunetv2.plans.plans_manager import PlansManager


@dataclass(frozen=True)
class Folders:
    """The folders of a training; those below a root that is not set are None."""

    preprocessed_dataset_folder_base: str | None
    preprocessed_dataset_folder: str | None
    output_folder_base: str | None
    output_folder: str | None
    folder_with_segs_from_previous_stage: str | None
    """Where the previous stage of a cascade left its segmentations; None without a cascade."""


def locate_folders(
    plans: PlansManager, configuration: str, fold: int | str, trainer_name: str, results_name: str | None = None
) -> Folders:
    """Derive a training's folders from plans, configuration, fold and trainer.

    Args:
        results_name: Keeps the results of several settings of one trainer apart. The stages of a cascade have the same.

    Raises:
        OptionError: No folder can be called so.
    """
    if results_name:
        check_results_name(results_name)
        trainer_name = f"{trainer_name}{BEFORE_RESULTS_NAME}{results_name}"
    description = plans.get_configuration(configuration)
    dataset, previous = plans.dataset_name, description.previous_stage_name

    def below(root: str | None, *names: str) -> str | None:
        return os.path.join(root, dataset, *names) if root else None

    def model(name: str) -> str:
        return f"{trainer_name}__{plans.plans_name}__{name}"

    preprocessed, results = nnUNet_preprocessed.get(), nnUNet_results.get()
    return Folders(
        preprocessed_dataset_folder_base=below(preprocessed),
        preprocessed_dataset_folder=below(preprocessed, description.data_identifier),
        output_folder_base=below(results, model(configuration)),
        output_folder=below(results, model(configuration), f"fold_{fold}"),
        folder_with_segs_from_previous_stage=(
            below(results, model(previous), "predicted_next_stage", configuration) if previous is not None else None
        ),
    )


def require_folder(folder: str | None, trainer_name: str) -> str:
    """Return a folder that must be known.

    Raises:
        RuntimeError: It is None; the message says which environment variable to set.
    """
    if folder is None:
        unset = [root.env_var_name for root in (nnUNet_preprocessed, nnUNet_results) if not root.is_set()]
        raise RuntimeError(
            f"{' and '.join(unset) or 'a folder'} was not set when {trainer_name} was constructed: it "
            "can build networks, but not train"
        )
    return folder


def require_previous_stage(folder: str, cases: Iterable[str], configuration: str) -> None:
    """Check that the previous stage of a cascade has segmented all cases.

    Args:
        folder: Where it leaves its segmentations.
        cases: Those that are trained and validated with.
        configuration: The previous stage.

    Raises:
        FileNotFoundError: It has not; the message has a remedy.
    """
    needed = sorted(set(cases))
    there = {path.stem for path in Path(folder).iterdir()} if Path(folder).is_dir() else set()
    missing = [case for case in needed if case not in there]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(needed)} cases, such as {missing[0]}, have no segmentation of the previous stage "
            f"in {folder}. Each fold of {configuration} segments its own validation cases: train all its folds with "
            "the same trainer and plans, or fold 'all'"
        )


def log_plans(
    report: Callable[..., None], plans: Mapping[str, Any], configuration_name: str, configuration: object
) -> None:
    """Log a configuration, and the plans without the others."""
    general = {key: value for key, value in plans.items() if key != "configurations"}
    report(f"\nConfiguration {configuration_name}:\n{configuration}\n", add_timestamp=False)
    report(f"Plans:\n{general}\n", add_timestamp=False)
