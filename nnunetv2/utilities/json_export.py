"""Turn NumPy and torch values into ones that the json module can write."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import PurePath

import numpy as np


def recursive_fix_for_json_export(my_dict: dict) -> None:
    """Replace values that JSON cannot hold, in place and at any depth.

    NumPy numbers become Python numbers, arrays of any rank become (nested) lists, paths and torch devices become text.
    Lists and tuples keep their type, dicts their order; integer keys become Python integers. Anything else stays.
    """
    fixed = {_plain_key(key): _plain(value) for key, value in my_dict.items()}
    my_dict.clear()
    my_dict.update(fixed)


def fix_types_iterable(iterable: Iterable, output_type: Callable[[list], object]) -> object:
    """Return the elements of `iterable`, fixed in the same way, as a new `output_type`."""
    return output_type([_plain(element) for element in iterable])


def _plain_key(key: object) -> object:
    return key.item() if isinstance(key, (np.integer, np.bool_, np.floating)) else key


def _plain(value: object) -> object:
    if isinstance(value, dict):
        recursive_fix_for_json_export(value)
        return value
    if isinstance(value, np.ndarray):
        return fix_types_iterable(value, list) if value.ndim else _plain(value[()])
    if isinstance(value, (list, tuple)):
        return fix_types_iterable(value, _constructor(value))
    if isinstance(value, np.str_):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, PurePath) or _is_torch_device(value):
        return str(value)
    return value


def _constructor(sequence: list | tuple) -> Callable[[list], object]:
    """Return the constructor of a sequence's type.

    Named tuples take their entries one by one.
    """
    kind = type(sequence)
    return (lambda entries: kind(*entries)) if hasattr(kind, "_fields") else kind


def _is_torch_device(value: object) -> bool:
    torch = sys.modules.get("torch")  # a device cannot exist before torch is imported
    return torch is not None and isinstance(value, torch.device)
