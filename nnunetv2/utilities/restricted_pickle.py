"""Read the pickles of nnU-Net in little memory, without running anything in them.

They hold properties of cases.

A pickle is a program. The files that nnU-Net exchanges need containers, numbers, text and NumPy arrays only, so the
reader admits just the callables that rebuild these and refuses everything else before it is imported. Each of them is
replaced by a function of this module, since `bytes(10**10)` needs few bytes in a file and many in memory.
"""

from __future__ import annotations

import importlib
import io
import math
import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, ClassVar

import numpy as np

from nnunetv2.utilities.atomic_write import replacing

_MEMORY_FACTOR, _MEMORY_ALLOWANCE = 16, 1 << 20
"""Objects take at most so many bytes for each byte of the file, and some more. An object takes one byte in the
file at least and 8 in an array; text is copied up to three times."""
_LONGEST_CODE = 64
"""Characters of a dtype's code, such as `f8` or `V24`."""
_OLD_MODULE_NAMES = {
    "__builtin__": "builtins",  # Python 2
    "numpy.core.multiarray": "numpy._core.multiarray",  # NumPy 1
    "numpy.core.numeric": "numpy._core.numeric",
}

Take = Callable[[int], None]
"""Called with the bytes that are about to be allocated; raises UnpicklingError when a file asks for too many."""


# ------------------------------------------------------------------------------------------------- rebuilding objects
def _rebuild_bytes(take: Take) -> bytes:
    return b""  # others are opcodes, or encoded


def _rebuild_bytearray(take: Take, content: bytes | str = b"", encoding: str = "latin-1") -> bytearray:
    return bytearray(_encode(take, content, encoding) if isinstance(content, str) else _copy(take, content))


def _encode(take: Take, text: str, encoding: str) -> bytes:
    """Encode text as old protocols spell bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it encodes text as {encoding}")
    take(len(text))
    return text.encode("latin-1")


def _copy(take: Take, content: bytes) -> bytes:
    if not isinstance(content, bytes):
        raise pickle.UnpicklingError(f"it makes bytes of a {type(content).__name__}")
    take(len(content))
    return content


def _rebuild_set(take: Take, items: list[Any] | tuple[Any, ...] = ()) -> set[Any]:
    return set(_items(take, items))


def _rebuild_frozenset(take: Take, items: list[Any] | tuple[Any, ...] = ()) -> frozenset[Any]:
    return frozenset(_items(take, items))


def _rebuild_ordered(take: Take, items: list[Any] | tuple[Any, ...] = ()) -> OrderedDict[Any, Any]:
    return OrderedDict(_items(take, items))


def _items(take: Take, items: list[Any] | tuple[Any, ...]) -> list[Any] | tuple[Any, ...]:
    if not isinstance(items, (list, tuple)):
        raise pickle.UnpicklingError(f"it makes a container of a {type(items).__name__}")
    take(8 * len(items))
    return items


def _rebuild_complex(take: Take, real: float, imaginary: float) -> complex:
    return complex(real, imaginary)


def _rebuild_slice(take: Take, *ends: Any) -> slice:
    return slice(*ends)


def _rebuild_dtype(take: Take, code: str, align: object = False, copy: object = True) -> np.dtype:
    if not isinstance(code, str) or len(code) > _LONGEST_CODE:
        raise pickle.UnpicklingError("it holds a dtype without a code")
    return np.dtype(code, bool(align), True)  # type: ignore[call-overload,no-any-return]


def _rebuild_empty_array(take: Take, kind: object, shape: tuple[int, ...], code: bytes) -> np.ndarray:
    """Return an array to which `__setstate__` gives shape and values."""
    if shape != (0,):
        raise pickle.UnpicklingError(f"it holds an array of shape {shape} without values")
    return np.empty(0, np.int8)


def _rebuild_scalar(take: Take, dtype: np.dtype, content: Any) -> Any:
    _check_dtype(dtype)
    take(dtype.itemsize)
    return _import_numpy_core("numpy._core.multiarray").scalar(dtype, content)


def _rebuild_from_buffer(take: Take, buffer: bytes, dtype: np.dtype, shape: tuple[int, ...], *order: Any) -> np.ndarray:
    _check_dtype(dtype)
    array: np.ndarray = _import_numpy_core("numpy._core.numeric")._frombuffer(buffer, dtype, shape, *order)
    return array


def _check_dtype(dtype: object) -> None:
    if not isinstance(dtype, np.dtype):
        raise pickle.UnpicklingError(f"it takes a {type(dtype).__name__} for a dtype")


_REBUILT: dict[tuple[str, str], Callable[..., Any]] = {
    ("builtins", "bytearray"): _rebuild_bytearray,
    ("builtins", "bytes"): _rebuild_bytes,
    ("builtins", "complex"): _rebuild_complex,
    ("builtins", "frozenset"): _rebuild_frozenset,
    ("builtins", "set"): _rebuild_set,
    ("builtins", "slice"): _rebuild_slice,
    ("collections", "OrderedDict"): _rebuild_ordered,
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _rebuild_dtype,
    ("numpy._core.multiarray", "_reconstruct"): _rebuild_empty_array,
    ("numpy._core.multiarray", "scalar"): _rebuild_scalar,
    ("numpy._core.numeric", "_frombuffer"): _rebuild_from_buffer,
}


# ------------------------------------------------------------------------------------------------------ the unpicklers
class FrugalUnpickler(pickle._Unpickler):
    """Allocate no more bytes than a file holds.

    The unpickler that is written in Python: that in C keeps a table of references as long as six bytes ask for.
    """

    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]

    def _load_bytearray(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))  # pickle makes one of this size before it reads

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        pickle.BYTEARRAY8[0]: _load_bytearray,
    }


class _RestrictedUnpickler(FrugalUnpickler):
    """Build the objects that files of nnU-Net hold, and nothing else."""

    def __init__(self, content: bytes, admitted: Mapping[tuple[str, str], object]) -> None:
        super().__init__(io.BytesIO(content))
        self._admitted = admitted
        self._bytes_left = _MEMORY_FACTOR * len(content) + _MEMORY_ALLOWANCE

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._admitted:
            return self._admitted[module, name]
        module = _OLD_MODULE_NAMES.get(module, module)
        if (module, name) in _REBUILT:
            return _REBUILT[module, name]
        is_dtype_class = module == "numpy.dtypes" and name.endswith("DType") and name.isidentifier()
        if is_dtype_class or (module, name) == ("numpy", "ndarray"):  # named, never called
            return getattr(importlib.import_module(module), name)
        raise pickle.UnpicklingError(
            f"it refers to {module}.{name}; only containers, numbers, text and NumPy arrays are admitted"
        )

    def _take(self, count: int) -> None:
        self._bytes_left -= count
        if self._bytes_left < 0:
            raise pickle.UnpicklingError("it asks for far more memory than its size accounts for")

    def _load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not any(function is one for one in _REBUILT.values()):
            raise pickle.UnpicklingError(f"it calls {function!r:.100}")
        self.append(function(self._take, *arguments))

    def _load_build(self) -> None:
        state, instance = self.stack[-1], self.stack[-2]
        if isinstance(instance, np.ndarray):
            self._check_array(*state[-4:])
        elif not isinstance(instance, np.dtype):
            raise pickle.UnpicklingError(f"it changes a {type(instance).__name__}")
        instance.__setstate__(self.stack.pop())

    def _check_array(self, shape: tuple[int, ...], dtype: np.dtype, is_fortran: object, values: Any) -> None:
        """Refuse an array that has other values than the file holds."""
        _check_dtype(dtype)
        size = math.prod(shape)
        if min(shape, default=0) < 0 or (isinstance(values, list) and len(values) != size):
            raise pickle.UnpicklingError(f"it holds an array of shape {shape} without its values")
        self._take(size * max(1, dtype.itemsize))

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("it holds objects of classes")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **FrugalUnpickler.dispatch,
        pickle.REDUCE[0]: _load_reduce,
        pickle.BUILD[0]: _load_build,
        **dict.fromkeys((pickle.INST[0], pickle.OBJ[0], pickle.NEWOBJ[0], pickle.NEWOBJ_EX[0]), _refuse),
    }


_DAMAGES = (
    AssertionError,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)
"""Errors in which reading a damaged pickle may end."""


def load_pickle_safely(
    path: str | os.PathLike[str], admitted: Mapping[tuple[str, str], object] = MappingProxyType({})
) -> object:
    """Read a pickle of builtin containers and NumPy values.

    Numbers, text and NumPy scalars, arrays and dtypes, nothing else.

    Args:
        admitted: The objects to which references to further (module, name) pairs resolve. Nothing is imported for them.

    Raises:
        pickle.UnpicklingError: The file is no pickle, is truncated, holds anything else, or asks for far more memory
            than its size accounts for. The message names the file.
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
        return _RestrictedUnpickler(file.read(), admitted).load()
    except pickle.UnpicklingError as error:
        raise pickle.UnpicklingError(f"cannot read {name}: {error}") from error
    except _DAMAGES as error:
        raise pickle.UnpicklingError(f"cannot read {name}: it is no pickle, or damaged ({error!r})") from error


def save_pickle(
    obj: object, path: str | os.PathLike[str], admitted: Mapping[tuple[str, str], object] = MappingProxyType({})
) -> None:
    """Write a pickle in one step, so that no reader finds half of it.

    Args:
        admitted: See `load_pickle_safely`.

    Raises:
        ValueError: It holds objects that `load_pickle_safely` refuses, so nobody could read it.
    """
    content = pickle.dumps(obj)
    try:
        _RestrictedUnpickler(content, admitted).load()
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
