"""Notice that a NIfTI file was cut short: ITK writes on a full disk without an error."""
from __future__ import annotations

import errno
import gzip
import math
import struct
import zlib
from pathlib import Path

_HEADER_BYTES = 112  # up to and including the offset of the voxels


def require_complete_nifti(path: Path) -> None:
    """Check that a NIfTI file, compressed or not, is as long as its header says. Other files pass.

    The voxels are not read: gzip notes the length of what it holds in its last four bytes.

    Raises:
        OSError: It is not; the disk is most likely full.
    """
    is_compressed = path.name.endswith(".nii.gz")
    if not is_compressed and not path.name.endswith(".nii"):
        return
    try:
        expected = _expected_bytes(path, is_compressed)
        found = _length_in_trailer(path) if is_compressed else path.stat().st_size
    except (EOFError, zlib.error, gzip.BadGzipFile, struct.error):
        expected, found = 1, 0  # not even the header is whole
    if found != (expected % 2**32 if is_compressed else expected):
        raise OSError(errno.ENOSPC, "only a part of the file could be written; is the disk full?", str(path))


def _expected_bytes(path: Path, is_compressed: bool) -> int:
    with (gzip.open(path) if is_compressed else path.open("rb")) as file:
        header = file.read(_HEADER_BYTES)
    order = "<" if struct.unpack_from("<i", header)[0] == 348 else ">"
    axes, *sides = struct.unpack_from(f"{order}8h", header, 40)
    bits, = struct.unpack_from(f"{order}h", header, 72)
    offset, = struct.unpack_from(f"{order}f", header, 108)
    return int(offset) + math.prod(sides[:axes]) * bits // 8


def _length_in_trailer(path: Path) -> int:
    with path.open("rb") as file:
        file.seek(-4, 2)
        return struct.unpack("<I", file.read())[0]
