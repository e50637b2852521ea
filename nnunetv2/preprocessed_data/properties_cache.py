"""Keep the properties of cases in memory.

A worker reads those of a case again and again.

The locations of the classes make up nearly all of them, up to 10,000 voxels per class, and unpickling them costs as
much as reading a small patch.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nnunetv2.utilities.restricted_pickle import load_pickle_safely

MAX_BYTES = 64 * 2**20
"""Per process. Enough for 200 cases of two classes."""


class PropertiesCache:
    """The properties that were read last, at most `max_bytes` of them.

    A file that has changed is read again.

    Locations of voxels are kept as int32, half of their size in the file. Every caller gets a dict of its own; the
    arrays in it are shared, and therefore read-only.
    """

    def __init__(self, max_bytes: int = MAX_BYTES, read: Callable[[Path], dict] = load_pickle_safely):
        self._max_bytes = max_bytes
        self._read = read
        self._entries: OrderedDict[Path, tuple[tuple[int, int], dict, int]] = OrderedDict()
        self._bytes = 0

    def load(self, path: Path) -> dict:
        """Return the content of a pickle of properties."""
        status = path.stat()
        version = (status.st_mtime_ns, status.st_size)
        entry = self._entries.get(path)
        if entry is None or entry[0] != version:
            self._remember(path, version, _compact(self._read(path)))
            entry = self._entries.get(path)
        self._entries.move_to_end(path)
        return _copy(entry[1])

    def _remember(self, path: Path, version: tuple[int, int], properties: dict) -> None:
        self._forget(path)
        size = _count_bytes(properties)
        self._entries[path] = (version, properties, size)
        self._bytes += size
        while self._bytes > self._max_bytes and len(self._entries) > 1:
            self._forget(next(iter(self._entries)))

    def _forget(self, path: Path) -> None:
        if path in self._entries:
            self._bytes -= self._entries.pop(path)[2]

    def __getstate__(self) -> dict:
        """Leave the properties behind: another process reads the ones that it needs."""
        return {"_max_bytes": self._max_bytes, "_read": self._read}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["_max_bytes"], state["_read"])


def _compact(properties: dict) -> dict:
    locations = properties.get("class_locations") if isinstance(properties, dict) else None
    if not isinstance(locations, dict):
        return properties
    return {**properties, "class_locations": {key: _compact_voxels(voxels) for key, voxels in locations.items()}}


def _compact_voxels(voxels: object) -> object:
    if not isinstance(voxels, np.ndarray) or voxels.dtype.kind not in "iu" or voxels.size == 0:
        return voxels
    if voxels.dtype.itemsize > 4 and np.abs(voxels).max() < 2**31:
        voxels = voxels.astype(np.int32)
    voxels.flags.writeable = False
    return voxels


def _copy(properties: dict) -> dict:
    copy = dict(properties)
    if isinstance(copy.get("class_locations"), dict):
        copy["class_locations"] = dict(copy["class_locations"])
    return copy


def _count_bytes(value: object) -> int:
    """Return roughly how much memory a nested value takes."""
    if isinstance(value, np.ndarray):
        return value.nbytes + 128
    if isinstance(value, dict):
        return sum(_count_bytes(entry) + 200 for entry in value.values())
    if isinstance(value, (list, tuple)):
        return sum(map(_count_bytes, value)) + 64
    return sys.getsizeof(value)
