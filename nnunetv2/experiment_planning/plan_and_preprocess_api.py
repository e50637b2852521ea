"""Fingerprint, plan and preprocess datasets: the commands as functions."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nnunetv2
from nnunetv2.configuration import default_num_processes
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.plans_file import warn_of_shared_folders
from nnunetv2.experiment_planning.planning import plan_experiment_dataset as plan_experiment_dataset
from nnunetv2.experiment_planning.prerequisites import require_dataset
from nnunetv2.experiment_planning.verify_dataset_integrity import leave_out_bad_cases, verify_dataset_integrity
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.plans.partial_labels import as_in_raw_data, common_numbers
from nnunetv2.preprocessed_data.bad_cases import (
    BAD_CASES_FILE,
    describe_bad_cases,
    list_training_cases,
    load_bad_cases,
    save_bad_cases,
)
from nnunetv2.preprocessed_data.fingerprint_files import find_local_fingerprint, forget_pooled_fingerprint
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.json_files import read_json
from nnunetv2.utilities.plain_text import show
from nnunetv2.utilities.trusted_names import find_class

if TYPE_CHECKING:
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

logger = logging.getLogger(__name__)

ProcessCounts = int | Sequence[int | None] | None
# Where neither the user nor the preprocessor decides. 3d_fullres takes the most memory per process.
PROCESSES = {"2d": 8, "3d_fullres": 4, "3d_lowres": 8}
PROCESSES_OTHERWISE = 4

# ------------------------------------------------------------------------------------------------ fingerprint


def extract_fingerprint_dataset(
    dataset_id: int | str,
    fingerprint_extractor_class: type = DatasetFingerprintExtractor,
    num_processes: int | None = default_num_processes,
    check_dataset_integrity: bool = False,
    clean: bool = True,
    verbose: bool = True,
    show_progress_bar: bool = True,
    without_bad_cases: bool = False,
) -> dict:
    """Return the fingerprint of a dataset; `clean` computes it anew even if there is one.

    Args:
        dataset_id: The number of the dataset or its name.
        num_processes: None takes as many as the machine has cores and free memory for.
        without_bad_cases: Check all cases, and do without those that have errors; see `choose_cases`.
    """
    dataset_name = require_dataset(dataset_id)
    show(dataset_name)
    clean |= choose_cases(
        dataset_name, num_processes, check=check_dataset_integrity, without_bad_cases=without_bad_cases
    )
    if num_processes is None and not issubclass(fingerprint_extractor_class, DatasetFingerprintExtractor):
        num_processes = default_num_processes  # an extractor of a user's own may not know how to choose
    extractor = fingerprint_extractor_class(dataset_id, num_processes, verbose=verbose)
    if hasattr(extractor, "show_progress_bar"):
        extractor.show_progress_bar = show_progress_bar
    if clean:
        forget_pooled_fingerprint(Path(nnUNet_preprocessed) / dataset_name)
    return extractor.run(overwrite_existing=clean)


def extract_fingerprints(
    dataset_ids: Iterable[int | str],
    fingerprint_extractor_class_name: str = "DatasetFingerprintExtractor",
    num_processes: int | None = default_num_processes,
    check_dataset_integrity: bool = False,
    clean: bool = True,
    verbose: bool = True,
    show_progress_bar: bool = True,
    without_bad_cases: bool = False,
) -> None:
    """Extract the fingerprints of several datasets, with an extractor given by its class name."""
    extractor_class = find_planning_class(fingerprint_extractor_class_name)
    for dataset_id in dataset_ids:
        extract_fingerprint_dataset(
            dataset_id,
            extractor_class,
            num_processes,
            check_dataset_integrity,
            clean,
            verbose,
            show_progress_bar,
            without_bad_cases,
        )


def choose_cases(dataset_name: str, num_processes: int | None, *, check: bool, without_bad_cases: bool) -> bool:
    """Check a dataset as far as asked for, and settle the cases that are used.

    With `without_bad_cases` a list in the preprocessed folder names those left out, each with its reason. Without, a
    list of an earlier run is removed, so that all cases are used again.

    Returns:
        Whether other cases are used than before.

    Raises:
        InvalidDatasetError: Errors were found, and none of them may be left out.
    """
    raw, preprocessed = Path(nnUNet_raw) / dataset_name, Path(nnUNet_preprocessed) / dataset_name
    if without_bad_cases:
        return leave_out_bad_cases(str(raw), num_processes or default_num_processes)
    before = load_bad_cases(preprocessed)
    if before:
        save_bad_cases([], preprocessed)
        logger.warning(
            "%s is removed: its %d cases are used again. --without_bad_cases leaves out what cannot be used",
            preprocessed / BAD_CASES_FILE,
            len(before),
        )
    if check:
        verify_dataset_integrity(str(raw), num_processes or default_num_processes)
    return bool(before)


# ------------------------------------------------------------------------------------------------ planning


def plan_experiments(
    dataset_ids: Iterable[int | str],
    experiment_planner_class_name: str = "ExperimentPlanner",
    gpu_memory_target_in_gb: float | None = None,
    preprocess_class_name: str = "DefaultPreprocessor",
    overwrite_target_spacing: Sequence[float] | None = None,
    overwrite_plans_name: str | None = None,
) -> str | None:
    """Plan several datasets and return the name of the plans of the last one."""
    planner_class = find_planner_class(experiment_planner_class_name)
    plans_identifier = None
    for dataset_id in dataset_ids:
        _, plans_identifier = plan_experiment_dataset(
            dataset_id,
            planner_class,
            gpu_memory_target_in_gb,
            preprocess_class_name,
            overwrite_target_spacing,
            overwrite_plans_name,
        )
    return plans_identifier


def plan_federated_experiments(
    dataset_ids: Iterable[int | str],
    mode: str,
    fingerprint_extractor_class_name: str = "DatasetFingerprintExtractor",
    experiment_planner_class_name: str = "ExperimentPlanner",
    *,
    num_processes: int | None = default_num_processes,
    check_dataset_integrity: bool = False,
    clean: bool = False,
    share_extrema: bool = False,
    verbose: bool = True,
    show_progress_bar: bool = True,
    without_bad_cases: bool = False,
    **planning: Any,
) -> str | None:
    """Fingerprint and plan datasets together with the other sites of the federation.

    Args:
        mode: "ffe" plans from the pooled fingerprint, "asym" lets every site plan for itself.
        clean: With "asym", extract the local fingerprint even if there is one; with "ffe" that is always done.
        without_bad_cases: See `choose_cases`.
        share_extrema: With "ffe", let the smallest and largest voxel of each channel leave the site too.
        planning: Further keywords of `plan_experiment_dataset`.

    Returns:
        The name of the plans of the last dataset.
    """
    from nnunetv2.experiment_planning.federated_planning import PlanningOptions, plan_federated

    options = PlanningOptions(
        mode=mode,
        extractor_class=find_planning_class(fingerprint_extractor_class_name),
        num_processes=num_processes,
        clean=clean,
        share_extrema=share_extrema,
        show_progress_bar=show_progress_bar,
        verbose=verbose,
        planner={"experiment_planner_class": find_planner_class(experiment_planner_class_name), **planning},
    )
    plans_identifier = None
    for dataset_id in dataset_ids:
        has_changed = choose_cases(
            require_dataset(dataset_id),
            num_processes,
            check=check_dataset_integrity,
            without_bad_cases=without_bad_cases,
        )
        plans_identifier = plan_federated(dataset_id, replace(options, clean=options.clean or has_changed))
    return plans_identifier


def find_planner_class(name: str) -> type[ExperimentPlanner]:
    """Find a planner by name.

    Those who take the default are told of the stronger presets.
    """
    if name == ExperimentPlanner.__name__:
        _recommend_presets()
    return find_planning_class(name)


@cache
def _recommend_presets() -> None:
    """Say it once, however many datasets are planned."""
    logger.info(
        "The residual encoder presets train better networks than the default planner: try -pl "
        "nnUNetPlannerResEncM, nnUNetPlannerResEncL or nnUNetPlannerResEncXL, the largest that your GPU holds "
        "(about 10, 24 and 40 GB)."
    )


def find_planning_class(name: str) -> type:
    """Find a fingerprint extractor or planner by name.

    It is one of ours, or one that a user has put below experiment_planning.

    Raises:
        RuntimeError: There is no class of that name.
    """
    for standard in (DatasetFingerprintExtractor, ExperimentPlanner):
        if name == standard.__name__:
            return standard  # without importing every module on the way
    folder = Path(nnunetv2.__path__[0]) / "experiment_planning"
    found = find_class(
        name,
        field="the planner or fingerprint extractor",
        folder=folder,
        package="nnunetv2.experiment_planning",
        base=(DatasetFingerprintExtractor, ExperimentPlanner),
    )
    if found is None:
        raise RuntimeError(
            f"there is no class {name} in {folder} or below. Check its spelling, or put the module that "
            f"defines it there"
        )
    return found


# ------------------------------------------------------------------------------------------------ preprocessing


def preprocess_dataset(
    dataset_id: int | str,
    plans_identifier: str = "nnUNetPlans",
    configurations: Sequence[str] = ("2d", "3d_fullres", "3d_lowres"),
    num_processes: ProcessCounts = (8, 4, 8),
    verbose: bool = False,
    show_progress_bar: bool = True,
    without_bad_cases: bool = False,
) -> None:
    """Preprocess a dataset for the given configurations.

    One that the plans do not have is passed over.

    Args:
        num_processes: One number for all configurations, or one for each. None leaves it to the preprocessor, which
            takes as many as the machine has cores and memory for.
        without_bad_cases: Check all cases, and do without those that have errors. Without it, those left out when the
            dataset was planned stay out.

    Raises:
        RuntimeError: The numbers of processes and configurations differ.
        FileNotFoundError: There are no such plans.
    """
    from nnunetv2.plans.plans_manager import PlansManager

    processes = _one_per_configuration(num_processes, configurations)
    dataset_name = maybe_convert_to_dataset_name(dataset_id)
    preprocessed = Path(nnUNet_preprocessed) / dataset_name
    plans_file = preprocessed / f"{plans_identifier}.json"
    if not plans_file.is_file():
        raise FileNotFoundError(f"{plans_file} is missing: plan {dataset_name} first, or check the name of the plans")
    _warn_if_dataset_json_changed(dataset_name)
    plans_manager = PlansManager(str(plans_file))
    warn_of_shared_folders(plans_manager.plans, plans_file)
    if without_bad_cases:
        leave_out_bad_cases(str(Path(nnUNet_raw) / dataset_name))
    show(f"Preprocessing {dataset_name} with {plans_identifier}")
    left_out = describe_bad_cases(preprocessed)
    if left_out is not None:
        logger.warning("%s", left_out)
    for configuration, count in zip(configurations, processes):
        if configuration not in plans_manager.available_configurations:
            show(f"INFO: {plans_file.name} has no configuration {configuration}, which is therefore passed over.")
            continue
        show(f"Configuration {configuration}")
        preprocessor = plans_manager.get_configuration(configuration).preprocessor_class(verbose=verbose)
        if hasattr(preprocessor, "show_progress_bar"):
            preprocessor.show_progress_bar = show_progress_bar
        preprocessor.run(
            dataset_id,
            configuration,
            plans_identifier,
            num_processes=count_for(preprocessor, configuration) if count is None else count,
        )
    copy_labels(dataset_name, plans_manager.image_reader_writer_class())
    copy_patients(dataset_name)


def preprocess(
    dataset_ids: Iterable[int | str],
    plans_identifier: str = "nnUNetPlans",
    configurations: Sequence[str] = ("2d", "3d_fullres", "3d_lowres"),
    num_processes: ProcessCounts = (8, 4, 8),
    verbose: bool = False,
    show_progress_bar: bool = True,
    without_bad_cases: bool = False,
) -> None:
    """Preprocess several datasets."""
    for dataset_id in dataset_ids:
        preprocess_dataset(
            dataset_id, plans_identifier, configurations, num_processes, verbose, show_progress_bar, without_bad_cases
        )


def copy_labels(dataset_name: str, reader: BaseReaderWriter | None = None) -> None:
    """Copy the missing or changed labels of a dataset to gt_segmentations.

    Args:
        reader: Knows which files belong to a label, and writes those with other values than the raw ones. None: there
            are no such files.
    """
    from nnunetv2.experiment_planning.reference_labels import copy_references, write_renumbered_references

    raw, preprocessed = Path(nnUNet_raw) / dataset_name, Path(nnUNet_preprocessed) / dataset_name
    dataset_json = read_json(raw / "dataset.json")
    labels = {case: files["label"] for case, files in list_training_cases(raw, preprocessed, dataset_json).items()}
    planned = preprocessed / "dataset.json"
    numbers = common_numbers(read_json(planned)) if planned.is_file() else {}
    ending, target = dataset_json["file_ending"], preprocessed / "gt_segmentations"
    if numbers:
        if reader is None:
            raise ValueError(f"{planned} numbers labels otherwise than the raw data: a reader has to write the copies")
        write_renumbered_references(labels, target, ending, reader, numbers)
    else:
        copy_references(labels, target, ending, reader)


def copy_patients(dataset_name: str) -> None:
    """Copy the file that names the patient of each case, if the dataset has one."""
    from nnunetv2.preprocessed_data.patients_file import PATIENTS_FILE
    from nnunetv2.utilities.atomic_write import copy_atomically

    source = Path(nnUNet_raw) / dataset_name / PATIENTS_FILE
    if source.is_file():
        copy_atomically(source, Path(nnUNet_preprocessed) / dataset_name / PATIENTS_FILE)


def _one_per_configuration(num_processes: ProcessCounts, configurations: Sequence[str]) -> list[int | None]:
    counts = [num_processes] if num_processes is None or isinstance(num_processes, int) else list(num_processes)
    if len(counts) == 1:
        counts *= len(configurations)
    if len(counts) != len(configurations):
        raise RuntimeError(
            f"num_processes needs one number, or one for each of the configurations "
            f"{', '.join(configurations)}; got {counts}"
        )
    return counts


def count_for(preprocessor: object, configuration: str) -> int | None:
    """Return the number of processes to tell a preprocessor.

    It is None if the preprocessor chooses for itself, a number if it has a `run` of its own.
    """
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    chooses = getattr(type(preprocessor), "run", None) is DefaultPreprocessor.run
    return None if chooses else PROCESSES.get(configuration, PROCESSES_OTHERWISE)


def _warn_if_dataset_json_changed(dataset_name: str) -> None:
    files = [Path(root) / dataset_name / "dataset.json" for root in (nnUNet_raw, nnUNet_preprocessed)]
    if not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return
    if read_json(files[0]) != as_in_raw_data(read_json(files[1])):
        logger.warning(
            "%s has changed since %s was planned. Preprocessing goes by the copy made then, %s; plan again "
            "for the change to take effect.",
            files[0],
            dataset_name,
            files[1],
        )


# ------------------------------------------------------------------------------------------------ results


def print_summary(dataset_id: int | str, plans_identifier: str, *, trainer: str | None = None) -> None:
    """Print the configurations of a dataset's plans.

    Beside them stand the cases preprocessed so far, and at the end the next command.
    """
    from nnunetv2.experiment_planning.summary import summarise
    from nnunetv2.plans.plans_manager import PlansManager

    dataset_name = maybe_convert_to_dataset_name(dataset_id)
    folder = Path(nnUNet_preprocessed) / dataset_name
    num_cases = len(list_training_cases(Path(nnUNet_raw) / dataset_name, folder))
    summary = summarise(PlansManager(str(folder / f"{plans_identifier}.json")), folder, num_cases, trainer=trainer)
    show(*summary.split("\n"))
    left_out = describe_bad_cases(folder)
    if left_out is not None:
        show(left_out)


def write_overview(dataset_id: int | str) -> None:
    """Write `dataset_overview.png` to a dataset's preprocessed folder. It shows the cases of this site.

    A picture that cannot be drawn is reported and no error: nothing else depends on it.
    """
    from nnunetv2.experiment_planning.dataset_overview import OVERVIEW_FILE, write_dataset_overview

    dataset_name = maybe_convert_to_dataset_name(dataset_id)
    folder = Path(nnUNet_preprocessed) / dataset_name
    try:
        write_dataset_overview(Path(nnUNet_raw) / dataset_name, find_local_fingerprint(folder), folder / OVERVIEW_FILE)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        logger.warning("%s could not be drawn: %s", folder / OVERVIEW_FILE, error)
        return
    show(f"Look at your data: {folder / OVERVIEW_FILE}")
