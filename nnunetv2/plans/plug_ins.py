"""Find the classes and functions named by plans, those of users too."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nnunetv2.utilities.plug_in_kinds import PlugIn
from nnunetv2.utilities.trusted_names import check_name, find_class, find_function

_PACKAGE = Path(__file__).parents[1]


class Preprocessor(Protocol):
    """The class of a configuration's `preprocessor_name`, as prediction and the planning commands use it."""

    def __init__(self, verbose: bool = True) -> None: ...

    def run_case(
        self,
        image_files: list[str],
        seg_file: str | None,
        plans_manager: Any,
        configuration_manager: Any,
        dataset_json: dict | str,
    ) -> tuple[np.ndarray, np.ndarray | None, dict]: ...

    def run(
        self, dataset_name_or_id: int | str, configuration_name: str, plans_identifier: str, num_processes: int | None
    ) -> None: ...


class Planner(Protocol):
    """The class of the plans' `experiment_planner_used`."""

    def plan_experiment(self) -> dict[str, Any]: ...


def find_plug_in(kind: PlugIn, class_name: str) -> Any:
    """Return the class of that name.

    Raises:
        RuntimeError: No module of the package defines it.
        UntrustedNameError: The name means something else.
    """
    package, folder = f"nnunetv2.{kind.package}", str(_PACKAGE / kind.package)
    found = find_class(
        class_name, field=f"{kind.key} in the plans", folder=folder, package=package, base=kind.base_class()
    )
    if found is None:
        raise RuntimeError(
            f"the plans ask for {kind.key} {class_name!r}, which no module in {folder} defines. Check the "
            "spelling in the plans, or add a module with this class to that folder"
        )
    return found


def recursive_find_resampling_fn_by_name(resampling_fn: str, key: str = "resampling_fn") -> Callable:
    """Return the function of that name from the modules of nnunetv2/preprocessing/resampling.

    Args:
        key: Where plans name it.

    Raises:
        RuntimeError: No module there defines it.
        UntrustedNameError: It is no function that a module there defines.
    """
    return _find_function(check_name(resampling_fn, f"{key} in the plans"), key)


@cache
def _find_function(resampling_fn: str, key: str) -> Callable:
    folder = _PACKAGE / "preprocessing" / "resampling"
    found = find_function(
        resampling_fn, field=f"{key} in the plans", folder=folder, package="nnunetv2.preprocessing.resampling"
    )
    if found is None:
        raise RuntimeError(
            f"the plans ask for the resampling function {resampling_fn}, which no module in {folder} "
            "defines; put the module that defines it into this folder"
        )
    return found
