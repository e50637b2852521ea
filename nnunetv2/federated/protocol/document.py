"""Turn a message and tensors into a document and back.

A document is one safetensors file that is safe to open.

    8 bytes      length n of the header, little-endian
    n bytes      JSON: {"__metadata__": {"message": <JSON text>}, <name>: {"dtype", "shape", "data_offsets"}, ...}
    the rest     tensor data, little-endian, C order, in the order of the header, without gaps

The writer streams: it holds one tensor at a time, where the library's own function wants all of them at once.
Tensors that a site has in memory anyway are sent from there.
The reader trusts nobody: it checks size, names, shapes, dtypes and offsets before it builds anything.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import mmap
import os
import re
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar, Union

import numpy as np
from pydantic import Field, TypeAdapter

from nnunetv2.federated.errors import WireError
from nnunetv2.federated.protocol.messages import MAX_TENSORS, PROTOCOL, TENSOR_NAME_PATTERN, Message, document_messages
from nnunetv2.federated.protocol.strict_json import parse_json, validated
from nnunetv2.utilities.atomic_write import replacing
from nnunetv2.utilities.early_writing import begin_writing

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("<u1"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "U64": np.dtype("<u8"),
}
"""Dtypes that may travel: safetensors' name -> numpy dtype."""
MAX_DIMENSIONS = 8
_PIECE_BYTES = 1 << 20
"""Bytes that are read or written at a time: they stay in the processor's cache."""
M = TypeVar("M", bound=Message, covariant=True)


@functools.cache
def _one_of(kinds: tuple[type[Message], ...]) -> TypeAdapter[Message]:
    union: Any = Annotated[Union[kinds], Field(discriminator="kind")]  # noqa: UP007 - made at run time
    return TypeAdapter(union)


@dataclass(frozen=True)
class TensorSpec:
    """Shape of a tensor, and its `dtype` by its name in safetensors."""

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise WireError(f"dtype {self.dtype!r:.40} does not travel; allowed are {', '.join(DTYPES)}")
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        if len(self.shape) > MAX_DIMENSIONS or any(not 0 <= size <= 2**40 for size in self.shape):
            raise WireError(f"shape {self.shape} is not allowed")

    @classmethod
    def of(cls, array: np.ndarray) -> TensorSpec:
        """Describe `array`."""
        for name, dtype in DTYPES.items():
            if array.dtype == dtype:
                return cls(name, array.shape)
        raise WireError(f"dtype {array.dtype} does not travel; allowed are {', '.join(DTYPES)}")

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Return the number of bytes of the values."""
        return self.size * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The largest content of a document, in bytes and number of tensors."""

    file_bytes: int = 8 << 30
    header_bytes: int = 64 << 20
    elements: int = 4_000_000
    """Brackets and commas of the header, and of the message in it."""
    quotes: int | None = None
    """Quotation marks in it, where it is nearly all numbers; None for any number."""
    tensors: int = MAX_TENSORS


class Document(Generic[M]):
    """An open document.

    Its message is parsed, its tensors are read one by one, whole or in pieces.

    The coordinator reads weights with `pieces` and `read_into`, whose memory does not depend on the number and size of
    documents. `read` maps the file: the pages count as the process's own until the array is gone.
    Several threads may read, one closes. Arrays that `read` has returned stay valid after `close`.
    """

    def __init__(
        self, path: Path, message: M, specs: dict[str, TensorSpec], offsets: dict[str, int], file: FileIO
    ) -> None:
        self.path = path
        self.message = message
        self.specs = specs
        self._offsets = offsets
        self._file = file
        self._lock = threading.Lock()
        self._map: mmap.mmap | None = None

    def spec(self, name: str) -> TensorSpec:
        """Return dtype and shape of a tensor.

        Raises WireError if the document does not hold it.
        """
        if name not in self.specs:
            raise WireError(f"{self.path.name} holds no tensor {name!r}")
        return self.specs[name]

    def read(self, name: str) -> np.ndarray:
        """Return tensor `name` as a read-only array that is a view of the file."""
        spec = self.spec(name)
        if spec.size == 0:
            return np.empty(spec.shape, DTYPES[spec.dtype])
        if self._map is None:
            self._map = mmap.mmap(self._open_file().fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(self._map, DTYPES[spec.dtype], spec.size, self._offsets[name]).reshape(spec.shape)

    def read_into(self, name: str, begin: int, out: np.ndarray) -> None:
        """Fill `out` with the elements of a tensor from `begin` on.

        `out` is contiguous and of the tensor's dtype.
        """
        spec = self.spec(name)
        assert out.dtype == DTYPES[spec.dtype] and 0 <= begin <= spec.size - out.size
        self._fill(self._offsets[name] + begin * out.itemsize, out.data.cast("B"))

    def pieces(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of tensor `name` in pieces of up to one MiB.

        Each is valid until the next is asked for.
        """
        start, stop = self._offsets[name], self._offsets[name] + self.specs[name].nbytes
        buffer = memoryview(bytearray(min(_PIECE_BYTES, stop - start)))
        for begin in range(start, stop, _PIECE_BYTES):
            piece = buffer[: min(_PIECE_BYTES, stop - begin)]
            self._fill(begin, piece)
            yield piece

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
        self._map = None  # unmapped as soon as no array looks at it any more

    def _fill(self, begin: int, buffer: memoryview) -> None:
        with self._lock:
            file = self._open_file()
            file.seek(begin)
            while len(buffer):
                count = file.readinto(buffer)
                if not count:
                    raise WireError(f"{self.path.name} has been cut off while it was read")
                buffer = buffer[count:]

    def _open_file(self) -> FileIO:
        if self._file.closed:
            raise ValueError(f"document {self.path.name} is closed")
        return self._file

    def __enter__(self) -> Document[M]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ------------------------------------------------------------------------------------------------------ writing
class OutgoingDocument(io.RawIOBase):
    """A document sent from memory, as a file readable from any byte.

    Its tensors must not change.

    Args:
        message: The message in its header.
        specs: Name -> dtype and shape of every tensor, in the order in which they travel.
        tensors: Name -> values.

    Raises:
        WireError: A name, dtype or shape is not allowed, or the tensors differ from specs.
    """

    def __init__(self, message: Message, specs: Mapping[str, TensorSpec], tensors: Mapping[str, np.ndarray]) -> None:
        self._pieces = [memoryview(encode_header(message, specs)), *_bytes_of_all(specs, map(tensors.get, specs))]
        self._ends = list(accumulate(map(len, self._pieces)))
        self._position = 0
        self.size = self._ends[-1]
        digest = hashlib.sha256()
        for piece in self._pieces:
            digest.update(piece)
        self.digest = digest.hexdigest()

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte and return its number."""
        self._position = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence])
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill the buffer with the next bytes of one tensor; return their number."""
        wanted, index = memoryview(buffer).cast("B"), bisect_right(self._ends, self._position)
        if index == len(self._pieces):
            return 0
        begin = self._position - (self._ends[index] - len(self._pieces[index]))
        found = self._pieces[index][begin : begin + len(wanted)]
        wanted[: len(found)] = found
        self._position += len(found)
        return len(found)


def write_document(path: Path, message: Message, specs: Mapping[str, TensorSpec], tensors: Iterable[np.ndarray]) -> str:
    """Write a document atomically, one tensor at a time; return its SHA-256.

    Args:
        path: Where the document appears once it is complete and on the disk.
        message: The message in its header.
        specs: Name -> dtype and shape of every tensor, in the order of `tensors`.
        tensors: The values, as many as specs; each is used before the next is asked for.

    Raises:
        WireError: A name, dtype or shape is not allowed, or the tensors differ from specs.
    """
    return _write(path, encode_header(message, specs), _bytes_of_all(specs, tensors))


def write_subset(source: Document[Message], path: Path, names: Iterable[str]) -> str:
    """Copy the message and some tensors of `source` into a document.

    Returns the SHA-256.
    """
    wanted = set(names)
    for name in sorted(wanted):
        source.spec(name)  # raises WireError unless the tensor is there
    specs = {name: spec for name, spec in source.specs.items() if name in wanted}
    pieces = (piece for name in specs for piece in source.pieces(name))
    return _write(path, encode_header(source.message, specs), pieces)


def encode_header(message: Message, specs: Mapping[str, TensorSpec]) -> bytes:
    """Return all bytes of a document that come before its tensors."""
    text = message.model_dump_json()
    entries: dict[str, Any] = {"__metadata__": {"message": text}}
    offset = 0
    for name, spec in specs.items():
        _check_name(name)
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, offset + spec.nbytes]}
        offset += spec.nbytes
    header = json.dumps(entries, separators=(",", ":"), allow_nan=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def document_size(message: Message, specs: Mapping[str, TensorSpec]) -> int:
    """Return how many bytes the document will have."""
    return len(encode_header(message, specs)) + sum(spec.nbytes for spec in specs.values())


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _write(path: Path, header: bytes, pieces: Iterable[bytes | memoryview]) -> str:
    digest, begun = hashlib.sha256(header), 0
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(header)
        for piece in pieces:
            file.write(piece)
            begun = begin_writing(file, begun)
            digest.update(piece)
    return digest.hexdigest()


def _bytes_of_all(specs: Mapping[str, TensorSpec], tensors: Iterable[np.ndarray | None]) -> Iterator[memoryview]:
    """Yield the bytes of tensors, checked against specs."""
    remaining = iter(tensors)
    for name, spec in specs.items():
        values = next(remaining, None)
        if values is None:
            raise WireError(f"tensor {name} is announced but not there")
        _check_spec(name, TensorSpec.of(np.asarray(values)), spec)
        yield _bytes_of(np.asarray(values), DTYPES[spec.dtype])
    if next(remaining, None) is not None:
        raise WireError("there are more tensors than announced")


def _bytes_of(values: np.ndarray, dtype: np.dtype) -> memoryview:
    """Return the bytes of an array as they travel, without a copy where it already has that form."""
    return np.ascontiguousarray(values, dtype).reshape(-1).view(np.uint8).data


# ------------------------------------------------------------------------------------------------------ reading
def open_document(path: Path, *, limits: Limits = Limits()) -> Document[Any]:
    """Check the whole header of a document and return it open.

    Raises:
        WireError: The file is larger than `limits`, or anything in it is not as this module would write it.
    """
    file = path.open("rb", buffering=0)  # stays readable if it is renamed or removed later
    try:
        size = _checked_size(file, limits)
        entries = parse_json(
            _read_header(file, size, limits), what="the header", elements=limits.elements, quotes=limits.quotes
        )
        data_begin = file.tell()
        if not isinstance(entries, dict):
            raise WireError("the header is not a JSON object")
        message = _decode_message(entries.pop("__metadata__", None), limits)
        if len(entries) > limits.tensors:
            raise WireError(f"the document has {len(entries)} tensors, at most {limits.tensors} are allowed")
        specs, offsets = _decode_entries(entries, data_begin=data_begin, file_size=size)
    except BaseException:
        file.close()
        raise
    return Document(path, message, specs, offsets, file)


def _checked_size(file: FileIO, limits: Limits) -> int:
    size = os.fstat(file.fileno()).st_size
    if size > limits.file_bytes:
        raise WireError(f"the document has {size} bytes, at most {limits.file_bytes} are allowed")
    if size < 8:
        raise WireError(f"a file of {size} bytes is no document")
    return size


def _read_header(file: FileIO, size: int, limits: Limits) -> bytearray:
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise WireError(f"a file of {size} bytes is cut off or no document")
    if length > limits.header_bytes:
        raise WireError(f"the header has {length} bytes, at most {limits.header_bytes} are allowed")
    header, filled = bytearray(length), 0
    while filled < length:
        count = file.readinto(memoryview(header)[filled:])
        if not count:
            raise WireError("the document was cut off while it was read")
        filled += count
    return header


def _decode_message(metadata: Any, limits: Limits) -> Message:
    if not isinstance(metadata, dict) or metadata.keys() != {"message"} or not isinstance(metadata["message"], str):
        raise WireError("__metadata__ must hold one text named message")
    text = metadata["message"]
    content = parse_json(text, what="the message", elements=limits.elements, quotes=limits.quotes)
    if not isinstance(content, dict) or content.get("protocol") != PROTOCOL:
        spoken = content.get("protocol") if isinstance(content, dict) else None
        raise WireError(
            f"the message is of protocol {spoken!r:.40}, this program speaks {PROTOCOL}: "
            "all sites and the coordinator need matching versions"
        )
    del content  # the message that is built next takes as much memory
    return validated(lambda: _one_of(document_messages()).validate_json(text, strict=True), "the message")


def _decode_entries(
    entries: dict[str, Any], *, data_begin: int, file_size: int
) -> tuple[dict[str, TensorSpec], dict[str, int]]:
    """Return specs and absolute offsets of the tensors, which must lie one after another and fill the file."""
    begins: list[tuple[int, int, str, TensorSpec]] = []
    for name, entry in entries.items():
        _check_name(name)
        begin, end, spec = _decode_entry(name, entry)
        begins.append((begin, end, name, spec))
    begins.sort(key=lambda item: item[:2])
    position = 0
    for begin, end, name, _ in begins:
        if begin != position:
            raise WireError(f"tensor {name} begins at byte {begin}, the data before it end at {position}")
        position = end
    if data_begin + position != file_size:
        raise WireError(f"the tensors need {position} bytes, the document holds {file_size - data_begin}")
    return ({name: spec for _, _, name, spec in begins}, {name: data_begin + begin for begin, _, name, _ in begins})


def _decode_entry(name: str, entry: Any) -> tuple[int, int, TensorSpec]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise WireError(f"tensor {name}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise WireError(f"tensor {name}: dtype, shape or data_offsets are malformed")
    try:
        spec = TensorSpec(dtype, tuple(shape))
    except WireError as error:
        raise WireError(f"tensor {name}: {error}") from None
    if offsets[1] - offsets[0] != spec.nbytes:
        raise WireError(f"tensor {name}: {spec} needs {spec.nbytes} bytes, its offsets span {offsets[1] - offsets[0]}")
    return offsets[0], offsets[1], spec


def _are_sizes(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= MAX_DIMENSIONS
        and all(type(value) is int and 0 <= value < 2**62 for value in values)
    )


# ----------------------------------------------------------------------------------------------------- checking
def check_tensors(document: Document[Message], expected: Mapping[str, TensorSpec]) -> None:
    """Raise WireError, naming the tensor, unless the document holds exactly `expected`, finite throughout."""
    missing, unexpected = expected.keys() - document.specs.keys(), document.specs.keys() - expected.keys()
    if missing:
        raise WireError(f"tensor {min(missing)} is missing ({len(missing)} in all)")
    if unexpected:
        raise WireError(f"tensor {min(unexpected)} is not expected ({len(unexpected)} in all)")
    for name, spec in document.specs.items():
        _check_spec(name, spec, expected[name])
    check_finite(document)


def check_finite(document: Document[Message]) -> None:
    """Raise WireError, naming the tensor, if any value of the document is NaN or infinite."""
    elements = _PIECE_BYTES // 4
    verdicts = np.empty(elements, bool)
    for name, spec in document.specs.items():
        if DTYPES[spec.dtype].kind != "f":
            continue
        values = np.empty(min(elements, spec.size), DTYPES[spec.dtype])
        for begin in range(0, spec.size, elements):
            block = values[: spec.size - begin]
            document.read_into(name, begin, block)
            if not np.isfinite(block, out=verdicts[: block.size]).all():
                raise WireError(f"tensor {name} holds NaN or infinite values")


def _check_spec(name: str, found: TensorSpec, expected: TensorSpec) -> None:
    if found != expected:
        raise WireError(f"tensor {name} is {found}, expected {expected}")


def _check_name(name: str) -> None:
    if not _TENSOR_NAME.fullmatch(name) or name == "__metadata__":
        raise WireError(f"{name!r:.80} is no name for a tensor: use at most 255 letters, digits, '_', '.', '-' and '#'")


_TENSOR_NAME = re.compile(TENSOR_NAME_PATTERN)
