"""Offer the file helpers of batchgenerators under module names that scripts import them from.

Scripts write `from nnunetv2.utilities.utils import join, load_json`. The modules concerned bind `__getattr__` to the
function below instead of importing dozens of names that they do not use.
"""
from __future__ import annotations

from collections.abc import Callable


def file_helpers_of(module_name: str) -> Callable[[str], object]:
    """Return a module `__getattr__` that looks names up in batchgenerators' file_and_folder_operations."""

    def look_up(name: str) -> object:
        if not name.startswith("__"):
            from batchgenerators.utilities import file_and_folder_operations

            if hasattr(file_and_folder_operations, name):
                return getattr(file_and_folder_operations, name)
        raise AttributeError(f"module {module_name!r} has no attribute {name!r}")

    return look_up
