"""Find the resampling function that plans name."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from nnunetv2.utilities.trusted_names import check_name, find_function


def recursive_find_resampling_fn_by_name(resampling_fn: str, key: str = "resampling_fn") -> Callable:
    """Return the function of that name from the modules in this folder, to which users may add their own.

    Args:
        key: Where plans name it.

    Raises:
        RuntimeError: No module here defines it.
        UntrustedNameError: It is no function that a module here defines.
    """
    return _find(check_name(resampling_fn, f"{key} in the plans"), key)


@cache
def _find(resampling_fn: str, key: str) -> Callable:
    folder = Path(__file__).parent
    found = find_function(
        resampling_fn, field=f"{key} in the plans", folder=folder, package="nnunetv2.preprocessing.resampling"
    )
    if found is None:
        raise RuntimeError(
            f"the plans ask for the resampling function {resampling_fn}, which no module in {folder} "
            "defines; put the module that defines it into this folder"
        )
    return found
