"""Read the pickles of nnU-Net without running what they ask for.

They hold properties of cases.

A pickle is a program. The files that nnU-Net exchanges need containers, numbers, text and NumPy arrays only, so the
reader admits just the callables that rebuild these and refuses everything else before it is imported.
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

from nnunetv2.utilities.atomic_write import replacing

_HARMLESS = {
    "builtins": {
        "bytearray",
        "complex",
        "frozenset",
        "list",
        "dict",
        "tuple",
        "set",
        "int",
        "float",
        "bool",
        "str",
        "bytes",
        "range",
        "slice",
    },
    "collections": {"OrderedDict"},
    "_codecs": {"encode"},  # how old protocols spell bytes
    "numpy": {"ndarray", "dtype"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.numeric": {"_frombuffer"},
}
_OLD_MODULE_NAMES = {
    "__builtin__": "builtins",  # Python 2
    "numpy.core.multiarray": "numpy._core.multiarray",  # NumPy 1
    "numpy.core.numeric": "numpy._core.numeric",
}


class _RestrictedUnpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, admitted: Mapping[tuple[str, str], object]) -> None:
        super().__init__(file)
        self._admitted = admitted

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in self._admitted:
            return self._admitted[module, name]
        module = _OLD_MODULE_NAMES.get(module, module)
        is_dtype_class = module == "numpy.dtypes" and name.endswith("DType") and name.isidentifier()
        if name not in _HARMLESS.get(module, ()) and not is_dtype_class:
            raise pickle.UnpicklingError(
                f"it refers to {module}.{name}; only containers, numbers, text and NumPy arrays are admitted"
            )
        return getattr(_import_numpy_core(module), name)


def load_pickle_safely(
    path: str | os.PathLike[str], admitted: Mapping[tuple[str, str], object] = MappingProxyType({})
) -> object:
    """Read a pickle of builtin containers and NumPy values.

    Numbers, text and NumPy scalars, arrays and dtypes, nothing else.

    Args:
        admitted: What references to further (module, name) pairs yield. Nothing is imported for them.

    Raises:
        pickle.UnpicklingError: The file is no pickle, is truncated, or holds anything else. The message names the file.
    """
    with Path(path).open("rb") as file:
        return load_stream_safely(file, name=os.fspath(path), admitted=admitted)


def load_stream_safely(
    file: BinaryIO, *, name: str, admitted: Mapping[tuple[str, str], object] = MappingProxyType({})
) -> object:
    """Read a pickle from an open file.

    `name` is how error messages call it. See `load_pickle_safely`.
    """
    try:
        return _RestrictedUnpickler(file, admitted).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, ValueError, TypeError) as error:
        raise pickle.UnpicklingError(f"cannot read {name}: {error}") from error


def save_pickle(
    obj: object, path: str | os.PathLike[str], admitted: Mapping[tuple[str, str], object] = MappingProxyType({})
) -> None:
    """Write a pickle in one step, so that no reader finds half of it.

    Args:
        admitted: See `load_pickle_safely`.

    Raises:
        ValueError: It holds what `load_pickle_safely` refuses, so nobody could read it.
    """
    content = pickle.dumps(obj)
    try:
        _RestrictedUnpickler(io.BytesIO(content), admitted).load()
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not written: {error}. Have the reader or preprocessor that adds it to the properties of a case "
            "add it as text or numbers"
        ) from error
    with replacing(path) as written:
        written.write_bytes(content)


def _import_numpy_core(module: str):
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:  # NumPy below 1.26 has these functions in numpy.core only
        return importlib.import_module(module.replace("numpy._core", "numpy.core"))
