"""Keep compressed arrays open.

For small patches, opening a file takes longer than reading from it.
"""

from __future__ import annotations

import platform
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_OPEN = 128
"""Arrays per process, two for each case. Each takes a file handle, of which a process often has 1024."""


class ArrayCache:
    """The arrays that were opened last. A file that has changed is opened again.

    For one thread: simultaneous readers of an array would share its buffers. On Windows nothing is kept,
    as an open file cannot be replaced there.
    """

    def __init__(self, max_open: int | None = None) -> None:
        self._max_open = max_open if max_open is not None else 0 if platform.system() == "Windows" else MAX_OPEN
        self._entries: OrderedDict[Path, tuple[tuple[int, ...], Any]] = OrderedDict()

    def get(self, path: Path, open_array: Callable[[Path], Any]) -> Any:
        """Return the array of a file, opened with `open_array` unless it is open already."""
        version = _version(path)
        entry = self._entries.get(path)
        if entry is None or entry[0] != version:
            entry = version, open_array(path)
            self._entries[path] = entry
        self._entries.move_to_end(path)
        while len(self._entries) > self._max_open:
            self._entries.popitem(last=False)
        return entry[1]

    def __getstate__(self) -> dict:
        """Leave the arrays behind: another process opens the ones that it needs."""
        return {"max_open": self._max_open}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)


def _version(path: Path) -> tuple[int, ...]:
    """Return a file's inode, time and size, empty if there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return ()
    return status.st_ino, status.st_mtime_ns, status.st_size
