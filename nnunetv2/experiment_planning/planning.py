"""Plan one dataset from its fingerprint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner


def make_planner(
    dataset_id: int | str,
    experiment_planner_class: type[ExperimentPlanner] = ExperimentPlanner,
    gpu_memory_target_in_gb: float | None = None,
    preprocess_class_name: str = "DefaultPreprocessor",
    overwrite_target_spacing: Sequence[float] | None = None,
    overwrite_plans_name: str | None = None,
) -> ExperimentPlanner:
    """Return the planner of a dataset whose fingerprint is there; see `plan_experiment_dataset`."""
    chosen: dict[str, Any] = {}
    if gpu_memory_target_in_gb is not None:
        chosen["gpu_memory_target_in_gb"] = gpu_memory_target_in_gb
    if overwrite_plans_name is not None:
        chosen["plans_name"] = overwrite_plans_name
    if overwrite_target_spacing is not None:
        overwrite_target_spacing = [float(spacing) for spacing in overwrite_target_spacing]
    return experiment_planner_class(
        dataset_id,
        preprocessor_name=preprocess_class_name,
        overwrite_target_spacing=overwrite_target_spacing,
        suppress_transpose=False,
        **chosen,
    )


def plan_experiment_dataset(
    dataset_id: int | str,
    experiment_planner_class: type[ExperimentPlanner] = ExperimentPlanner,
    gpu_memory_target_in_gb: float | None = None,
    preprocess_class_name: str = "DefaultPreprocessor",
    overwrite_target_spacing: Sequence[float] | None = None,
    overwrite_plans_name: str | None = None,
    *,
    dataset_json: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], str]:
    """Plan a dataset from its fingerprint.

    Args:
        gpu_memory_target_in_gb: None leaves it to the planner, as does None for `overwrite_plans_name`.
        overwrite_target_spacing: Array order, before transposition.
        dataset_json: To plan with, and to be written; that of the raw data if None.

    Returns:
        The plans and their name.
    """
    planner = make_planner(
        dataset_id,
        experiment_planner_class,
        gpu_memory_target_in_gb,
        preprocess_class_name,
        overwrite_target_spacing,
        overwrite_plans_name,
    )
    if dataset_json is not None:
        planner.dataset_json = dataset_json
    return planner.plan_experiment(), planner.plans_identifier
