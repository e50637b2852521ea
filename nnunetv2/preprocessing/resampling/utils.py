"""Find the resampling function that plans name."""
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from nnunetv2.utilities.find_class_by_name import recursive_find_python_class


@cache
def recursive_find_resampling_fn_by_name(resampling_fn: str) -> Callable:
    """Return the function of that name from the modules in this folder, to which users may add their own.

    Raises:
        RuntimeError: No module here defines it.
    """
    folder = Path(__file__).parent
    found = recursive_find_python_class(str(folder), resampling_fn, "nnunetv2.preprocessing.resampling")
    if found is None:
        raise RuntimeError(f"the plans ask for the resampling function {resampling_fn}, which no module in {folder} "
                           "defines; put the module that defines it into this folder")
    return found
