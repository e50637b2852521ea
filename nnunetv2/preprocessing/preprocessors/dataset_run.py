"""Gather the inputs of preprocessing a dataset for one configuration."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2.errors import InvalidInputError
from nnunetv2.plans.partial_labels import as_in_raw_data
from nnunetv2.preprocessing.normalization.lookup import find_normalization_class
from nnunetv2.utilities.json_files import read_json

if TYPE_CHECKING:
    from nnunetv2.plans.plans_manager import ConfigurationManager, PlansManager

logger = logging.getLogger(__name__)

# For networks and training. All other entries of plans count, also those that only a user's preprocessor knows.
_WITHOUT_INFLUENCE = {
    "configurations",
    "plans_name",
    "experiment_planner_used",
    "original_median_spacing_after_transp",
    "original_median_shape_after_transp",
    "architecture",
    "batch_size",
    "batch_dice",
    "median_image_size_in_voxels",
    "next_stage",
    "previous_stage",
    "inherits_from",
    "resampling_fn_probabilities",
    "resampling_fn_probabilities_kwargs",
}


@dataclass(frozen=True)
class DatasetRun:
    """One configuration of one dataset."""

    plans_manager: PlansManager
    configuration_manager: ConfigurationManager
    dataset_json: dict
    """As it was when the dataset was planned."""
    files: dict[str, dict]
    """Case -> its `images` (one per channel) and its `label`."""
    output_folder: Path

    @property
    def sources(self) -> dict[str, list[str]]:
        """All files of each case, those beside images included."""
        return {case: self.sources_of(case) for case in self.files}

    def sources_of(self, case: str) -> list[str]:
        images, label = self.files[case]["images"], self.files[case]["label"]
        list_side_cars = getattr(self.plans_manager.image_reader_writer_class(), "list_side_cars", None)
        if list_side_cars is None:  # readers need not be our subclasses
            return [*images, label]
        return [
            *images,
            label,
            *sorted(
                {*(name for image in images for name in list_side_cars(image)), *list_side_cars(label, is_label=True)}
            ),
        ]

    @property
    def fingerprint(self) -> dict | None:
        """The fingerprint of these cases, if it lies where it was made.

        That of a federation has others, too.
        """
        from nnunetv2.preprocessed_data.fingerprint_files import find_local_fingerprint

        file = find_local_fingerprint(self.output_folder.parent)
        return read_if_path(file) if file.is_file() else None


def find_run(dataset_name_or_id: int | str, configuration_name: str, plans_identifier: str) -> DatasetRun:
    """Read plans and list the training cases, without those on the list of bad ones.

    Raises:
        InvalidInputError: The dataset, its plans or its cases do not exist, or the plans name no proper folder.
    """
    from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
    from nnunetv2.plans.plans_manager import PlansManager
    from nnunetv2.preprocessed_data.bad_cases import list_training_cases
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    dataset_name = maybe_convert_to_dataset_name(dataset_name_or_id)
    raw_folder = Path(nnUNet_raw.require()) / dataset_name
    preprocessed_folder = Path(nnUNet_preprocessed.require()) / dataset_name
    plans_file = preprocessed_folder / f"{plans_identifier}.json"
    _require(raw_folder.is_dir(), f"there is no raw dataset {raw_folder}")
    _require(plans_file.is_file(), f"there is no plans file {plans_file}; run nnUNetv2_plan_experiment first")

    plans_manager = PlansManager(str(plans_file))
    configuration_manager = plans_manager.get_configuration(configuration_name)
    dataset_json = _read_planned_dataset_json(preprocessed_folder, raw_folder)
    files = list_training_cases(raw_folder, preprocessed_folder, dataset_json)
    _require(len(files) > 0, f"the dataset {raw_folder} has no training cases")
    # The name comes from the plans, maybe from elsewhere, and its folder is emptied.
    name = configuration_manager.data_identifier
    _require(
        Path(name).name == name and name not in (".", ".."),
        f"the plans' data_identifier must be the name of a folder, got {name!r}",
    )
    return DatasetRun(
        plans_manager,
        configuration_manager,
        dataset_json,
        {str(case): of_case for case, of_case in files.items()},
        preprocessed_folder / name,
    )


def digest_ingredients(run: DatasetRun, preprocessor: object) -> dict[str, str]:
    """Return digests of everything that decides a case's result, beside its files.

    Equal ones give equal results.
    """
    relevant = {
        key: value
        for part in (run.plans_manager.plans, run.configuration_manager.configuration)
        for key, value in part.items()
        if key not in _WITHOUT_INFLUENCE
    }
    settings = {
        name: value for name, value in vars(preprocessor).items() if name not in ("verbose", "show_progress_bar")
    }
    return {
        "plans": _digest(relevant),
        "dataset.json": _digest(run.dataset_json),
        "the preprocessor": _digest([type(preprocessor).__qualname__, settings]),
        "the code": _digest_files(_code_files(run, preprocessor)),
    }


def read_if_path(dataset_json: dict | str | os.PathLike[str]) -> dict:
    """Return the content of a JSON file, or the dict itself."""
    if isinstance(dataset_json, (str, os.PathLike)):
        return read_json(dataset_json)
    return dataset_json


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()


def _code_files(run: DatasetRun, preprocessor: object) -> set[Path]:
    """Return the modules that cases pass through, users' own classes and functions with their bases included."""
    from nnunetv2.preprocessed_data import blosc2_layout, datasets
    from nnunetv2.preprocessing.cropping import cropping
    from nnunetv2.preprocessing.preprocessors import foreground_locations
    from nnunetv2.preprocessing.resampling import label_resampling, separable

    configuration = run.configuration_manager
    classes = [
        type(preprocessor),
        run.plans_manager.image_reader_writer_class,
        run.plans_manager.label_manager_class,
        *map(find_normalization_class, configuration.normalization_schemes),
    ]
    parts: list[Any] = [base for of_class in classes for base in inspect.getmro(of_class)]
    resampling: list[Any] = [configuration.resampling_fn_data, configuration.resampling_fn_seg]
    parts += [function.func for function in resampling]
    parts += [blosc2_layout, cropping, foreground_locations, label_resampling, datasets, separable]
    files = set()
    for part in parts:
        try:
            files.add(Path(inspect.getfile(part)))
        except (TypeError, OSError):  # builtin, or typed into an interpreter
            continue
    return {file for file in files if file.is_file()}


def _digest_files(files: Iterable[Path]) -> str:
    return _digest(sorted([file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in files))


def _read_planned_dataset_json(preprocessed_folder: Path, raw_folder: Path) -> dict:
    """Return dataset.json as it was when the dataset was planned."""
    planned_file = preprocessed_folder / "dataset.json"
    _require(planned_file.is_file(), f"there is no {planned_file}; run nnUNetv2_plan_experiment first")
    planned, raw_file = read_if_path(planned_file), raw_folder / "dataset.json"
    if raw_file.is_file() and read_if_path(raw_file) != as_in_raw_data(planned):
        logger.warning(
            "%s was changed after planning; preprocessing uses the older copy %s. Plan again to use the change",
            raw_file,
            planned_file,
        )
    return planned


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidInputError(message)
