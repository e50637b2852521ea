"""Find the normalization class that plans name."""
from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization


@cache
def find_normalization_class(name: str) -> type[ImageNormalization]:
    """Return the class of that name from the modules in this folder, to which users may add their own.

    Raises:
        RuntimeError: No module here defines it.
    """
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    folder = Path(__file__).parent
    found = recursive_find_python_class(str(folder), name, "nnunetv2.preprocessing.normalization")
    if found is None:
        raise RuntimeError(f"the plans ask for the normalization {name}, which no module in {folder} defines")
    return found
