"""Find faults of image files that reading does not report.

Files cut short, flipped bits, lost NaN.

ITK reads NIfTI files through a library that fills up missing bytes and puts 0 in the place of NaN and infinity, both
in silence. So sizes are compared whenever a file is read, and contents when a dataset is checked.
"""

from __future__ import annotations

import gzip
import itertools
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DAMAGED = "damaged file"
COPY_AGAIN = "copy the file again from where it came from, or leave the case out"
REPLACE_NON_FINITE = (
    "replace these values by numbers that mean nothing is there, such as the lowest of the image "
    "(numpy.nan_to_num), and save the file"
)
FORMS_REMEDY = (
    "find out in a viewer which of the two is right, and write it into the other (fslorient, or set_qform "
    "and set_sform of nibabel); programs choose differently, so that predictions lie elsewhere for some"
)
_GZIP_MAGIC = b"\x1f\x8b"
_BYTES_AT_ONCE = 1 << 22
# codes of the types of NIfTI that hold real numbers
_FLOATS = {16: "f4", 64: "f8"}
# size of the header of NIfTI-1 and NIfTI-2: where the code of the type and the offset of the voxels are, and its type
_HEADERS = {348: (70, 108, "f4"), 540: (12, 168, "i8")}


class Fault(NamedTuple):
    """Fault of a file.

    `what` and `remedy` are the same for all faults of a kind, so that a report can group them.
    """

    what: str
    found: str
    expected: str
    remedy: str
    is_error: bool = True
    """Otherwise it is only worth a warning."""


class DamagedFileError(RuntimeError):
    """A file is shorter than its header says, or its checksum is wrong."""


def require_complete(file: str, num_bytes: int) -> None:
    """Check that a file, gzipped or not, holds as many bytes as its header announces.

    A gzip file ends with its size, so this costs nothing. Only where that size differs is the file decompressed, since
    padding is allowed and gzip files may have several parts.

    Raises:
        DamagedFileError: It holds fewer.
    """
    held = _size_without_decompressing(file)
    if held == num_bytes % (1 << 32):
        return
    held = sum(map(len, _decompressed(file)))
    if held < num_bytes:
        raise DamagedFileError(
            f"{file} is cut short: it holds {held} bytes, its header announces {num_bytes}; {COPY_AGAIN}"
        )


def find_damage(file: str) -> list[Fault]:
    """Decompress a gzipped file, whatever its format, and compare its checksum."""
    try:
        for _ in _decompressed(file):
            pass
    except DamagedFileError as error:
        return [_damage(error)]
    return []


def find_faults_in_nifti(file: str) -> list[Fault]:
    """Find damage, NaN and infinity in a NIfTI file.

    SimpleITK reads it as if they were not there.
    """
    try:
        num_non_finite = _count_non_finite(_decompressed(file))
    except DamagedFileError as error:
        return [_damage(error)]
    return [describe_non_finite(num_non_finite)] if num_non_finite else []


def find_form_faults(file: str) -> list[Fault]:
    """Find a qform and sform that disagree by half a voxel.

    They are the two ways of a NIfTI header to say where the image lies.
    """
    import nibabel

    try:
        image: Any = nibabel.load(file)
        (qform, has_qform), (sform, has_sform) = image.header.get_qform(coded=True), image.header.get_sform(coded=True)
    except Exception:  # noqa: BLE001  whatever is wrong with the file, reading it will say so
        return []
    if not (has_qform and has_sform):
        return []
    corners = np.array(list(itertools.product(*((0, size - 1) for size in image.shape[:3]), (1,))), dtype=np.float64)
    corners = np.hstack([corners[:, :-1], np.zeros((len(corners), 4 - corners.shape[1])), corners[:, -1:]])
    apart = np.linalg.norm((corners @ (qform - sform).T)[:, :3], axis=1).max()
    if apart <= 0.5 * min(np.linalg.norm(sform[:3, :3], axis=0)):
        return []
    return [
        Fault(
            "qform and sform of a header disagree",
            f"up to {apart:.3g} mm apart",
            "the same place",
            FORMS_REMEDY,
            is_error=False,
        )
    ]


def describe_non_finite(count: int) -> Fault:
    """Return the fault of a file in which `count` voxels are NaN or infinite."""
    return Fault("NaN or infinite values", f"{count} voxels", "numbers", REPLACE_NON_FINITE)


def _count_non_finite(chunks: Iterator[bytes]) -> int:
    """Count NaN and infinity in the uncompressed bytes of a NIfTI file, all of which are read."""
    header = next(chunks, b"")
    voxels = _find_float_voxels(header)
    if voxels is None:
        for _ in chunks:
            pass
        return 0
    dtype, offset = voxels
    num_non_finite, rest = 0, header
    for chunk in itertools.chain(chunks, [b""]):
        whole = max(0, len(rest) - offset) // dtype.itemsize
        if whole:
            num_non_finite += whole - int(np.count_nonzero(np.isfinite(np.frombuffer(rest, dtype, whole, offset))))
        used = offset + whole * dtype.itemsize
        rest, offset = rest[used:] + chunk, max(0, offset - len(rest))
    return num_non_finite


def _find_float_voxels(header: bytes) -> tuple[np.dtype, int] | None:
    """Return type and offset of the voxels of a NIfTI file that holds real numbers, otherwise None."""
    for order in "<>":
        size = int.from_bytes(header[:4], "little" if order == "<" else "big")
        if size in _HEADERS and len(header) >= size:
            type_at, offset_at, offset_type = _HEADERS[size]
            code = int(np.frombuffer(header, f"{order}i2", 1, type_at)[0])
            offset = int(np.frombuffer(header, order + offset_type, 1, offset_at)[0])
            return (np.dtype(order + _FLOATS[code]), offset) if code in _FLOATS else None
    return None


def _damage(error: DamagedFileError) -> Fault:
    return Fault(DAMAGED, str(error.__cause__ or error), "a complete file", COPY_AGAIN)


def _size_without_decompressing(file: str) -> int:
    """Return the number of bytes in a file, without decompressing it.

    For a gzip file, that is the size of its last part, from its last four bytes.
    """
    with Path(file).open("rb") as stream:
        is_gzipped = stream.read(2) == _GZIP_MAGIC
        size = stream.seek(0, 2)
        if not is_gzipped or size < 4:
            return size
        stream.seek(-4, 2)
        return int.from_bytes(stream.read(4), "little")


def _decompressed(file: str) -> Iterator[bytes]:
    """Yield the bytes of a file, decompressed if it is gzipped.

    Raises:
        DamagedFileError: It is cut short, or its checksum is wrong.
    """
    with Path(file).open("rb") as stream:
        is_gzipped = stream.read(2) == _GZIP_MAGIC
        stream.seek(0)
        source = gzip.GzipFile(fileobj=stream) if is_gzipped else stream
        try:
            while chunk := source.read(_BYTES_AT_ONCE):
                yield chunk
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DamagedFileError(f"{file} is damaged ({error}); {COPY_AGAIN}") from error
