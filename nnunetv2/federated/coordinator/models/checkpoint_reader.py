"""Read the weights of a checkpoint without torch, and without running its pickle.

The layout of the file is that of `checkpoint_file.py`. The pickle may name anything; only containers are built, tensors
become descriptions of where their bytes lie, and all else becomes an object that does nothing. No file asks for more
memory than its own size accounts for.
"""

from __future__ import annotations

import math
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2.federated.aggregation.codecs import codec_of
from nnunetv2.federated.aggregation.matching import normalise_name
from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.protocol.document import TensorSpec, write_document
from nnunetv2.federated.protocol.messages import MAX_TENSORS, Aggregate, Precision
from nnunetv2.utilities.restricted_pickle import FrugalUnpickler

_MOST_VALUES = 16
"""Numbers in all tensors together, for each byte of the file. Networks name a parameter up to four times."""
_MOST_DIMENSIONS = 8
"""As in the documents that weights become."""
LARGEST_PICKLE = 256 << 20
"""Bytes of the pickle, which holds all but the values of tensors: curves, plans, names."""
_STORAGES = {"DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2", "BFloat16Storage": "<u2"}
"""Kinds of storages of floating-point numbers -> numpy dtype; bfloat16 has the upper half of a float32."""


@dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor's values in a checkpoint."""

    storage: str
    """Name of the file in the archive, without its folder."""
    kind: str
    """Class of the storage."""
    offset: int
    """Elements of the storage before its first one."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Elements from one to the next along each axis."""

    @property
    def size(self) -> int:
        """Return how many elements it has."""
        return math.prod(self.shape)

    def lies_within(self, count: int) -> bool:
        """Tell whether it can be part of a storage, no element used twice.

        Args:
            count: Elements of the storage.
        """
        if len(self.shape) != len(self.strides) or min((*self.shape, *self.strides, self.offset)) < 0:
            return False
        last = self.offset + sum((size - 1) * step for size, step in zip(self.shape, self.strides))
        return self.size == 0 or (self.size <= count and last < count)


class CheckpointReader:
    """The network weights of a checkpoint; close it, or use it in a `with` statement.

    Raises:
        FederationError: The file is none that torch has written, or holds no `network_weights`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, IsADirectoryError) as error:
            raise self._wrong("it is no complete zip archive") from error
        try:
            self._folder, self.tensors = self._read_names()
        except BaseException:
            self._archive.close()
            raise

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()

    def read(self, name: str) -> np.ndarray:
        """Return a tensor of floating-point numbers as float32, in C order.

        Raises:
            FederationError: Its bytes are not there, or not finite.
        """
        tensor = self.tensors[name]
        dtype = np.dtype(_STORAGES[tensor.kind])
        try:
            values = np.frombuffer(self._read_file(f"{self._folder}data/{tensor.storage}"), dtype)
        except (KeyError, zipfile.BadZipFile, ValueError) as error:
            raise self._wrong(f"the values of {name} are missing or damaged") from error
        if not tensor.lies_within(len(values)):
            raise self._wrong(f"{name} reaches beyond its values, or has more than are there")
        strides = tuple(step * dtype.itemsize for step in tensor.strides)
        array = np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.shape, strides)
        if tensor.kind == "BFloat16Storage":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        array = np.ascontiguousarray(array, np.float32)
        if not np.isfinite(array).all():
            raise self._wrong(f"{name} holds NaN or infinity")
        return array.reshape(tensor.shape)

    def _read_names(self) -> tuple[str, dict[str, StoredTensor]]:
        """Return the folder in the archive, and name -> tensor, of floating-point numbers only."""
        found = [name for name in self._archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
        if len(found) != 1 or self._archive.getinfo(found[0]).file_size > LARGEST_PICKLE:
            raise self._wrong("it holds no data.pkl, or a very large one")
        folder = found[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in self._archive.namelist() and self._read_file(f"{folder}byteorder") != b"little":
            raise self._wrong("its numbers are big-endian")
        try:
            with self._archive.open(found[0]) as file:
                content = _Unpickler(file).load()
        except Exception as error:  # whatever a damaged pickle ends in
            raise self._wrong("its data.pkl is damaged") from error
        weights = content.get("network_weights") if isinstance(content, dict) else None
        if not isinstance(weights, Mapping):
            raise self._wrong("it has no network_weights")
        tensors = {
            normalise_name(str(name)): tensor
            for name, tensor in weights.items()
            if isinstance(tensor, StoredTensor) and tensor.kind in _STORAGES
        }
        if not 0 < len(tensors) <= MAX_TENSORS:
            raise self._wrong(f"it has {len(tensors)} tensors")
        for name, tensor in tensors.items():
            if len(tensor.shape) > _MOST_DIMENSIONS or min(tensor.shape, default=0) < 0:
                raise self._wrong(f"{name} has the shape {tensor.shape!s:.100}")
        if sum(tensor.size for tensor in tensors.values()) > _MOST_VALUES * self.path.stat().st_size:
            raise self._wrong("its tensors have far more values than the file")
        return folder, tensors

    def _read_file(self, name: str) -> bytes:
        """Read a file of the archive, which torch does not compress."""
        entry = self._archive.getinfo(name)
        if entry.file_size > entry.compress_size:
            raise self._wrong(f"{name} is compressed")
        return self._archive.read(entry)

    def _wrong(self, problem: str) -> FederationError:
        return FederationError(f"{self.path} is no checkpoint to start from: {problem}")


def write_weights(checkpoint: Path, target: Path, precision: Precision = "float32") -> None:
    """Write the weights of a checkpoint as a document, float32 under their own names.

    Args:
        precision: How they are to travel.

    Raises:
        FederationError: The file is no checkpoint.
        PrecisionError: A weight is too large to travel.
    """
    codec = codec_of(precision)
    with CheckpointReader(checkpoint) as reader:
        specs = {name: TensorSpec("F32", tensor.shape) for name, tensor in sorted(reader.tensors.items())}

        def values() -> Iterator[np.ndarray]:
            for name in specs:
                tensor = reader.read(name)
                if not codec.is_relative:  # with a relative codec, the first weights travel in float32
                    codec.encode({name: tensor})
                yield tensor

        write_document(target, Aggregate(round=None, contributors={}), specs, values())


class _Nothing:
    """Stands for everything that a pickle names and that is no tensor."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *_: Any, **__: Any) -> _Nothing:
        return self

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...

    def add(self, item: Any) -> None: ...


@dataclass(frozen=True)
class _StorageClass:
    kind: str


@dataclass(frozen=True)
class _Storage:
    name: str
    kind: str


class _Unpickler(FrugalUnpickler):
    """Build containers, numbers and texts; see the module."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _describe_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name.endswith("Storage"):
            return _StorageClass(name)
        return _Nothing

    def persistent_load(self, identity: Any) -> Any:
        word, kind, key, *_ = identity
        if word != "storage" or not isinstance(kind, _StorageClass) or "/" in str(key):
            return _Nothing()
        return _Storage(str(key), kind.kind)


def _describe_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Any:
    if not isinstance(storage, _Storage):
        return _Nothing()
    return StoredTensor(
        storage=storage.name,
        kind=storage.kind,
        offset=int(offset),
        shape=tuple(map(int, shape)),
        strides=tuple(map(int, strides)),
    )
