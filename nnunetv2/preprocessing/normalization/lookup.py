"""Find the normalization class that plans name."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization
from nnunetv2.utilities.trusted_names import check_name, find_class

_FIELD = "an entry of normalization_schemes in the plans"


def find_normalization_class(name: str) -> type[ImageNormalization]:
    """Return a normalization class by name, from the modules in this folder.

    Users may add their own there.

    Raises:
        RuntimeError: No module here defines it.
        UntrustedNameError: It is no normalization.
    """
    return _find(check_name(name, _FIELD))


@cache
def _find(name: str) -> type[ImageNormalization]:
    folder = Path(__file__).parent
    found = find_class(
        name, field=_FIELD, folder=folder, package="nnunetv2.preprocessing.normalization", base=ImageNormalization
    )
    if found is None:
        raise RuntimeError(f"the plans ask for the normalization {name}, which no module in {folder} defines")
    return found
