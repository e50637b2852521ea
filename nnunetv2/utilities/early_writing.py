"""Let the disk begin with a file while its rest is being made.

The system keeps written data in memory for up to half a minute. A sync at the end then waits for the whole file;
with this, for its last few MiB.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import IO

STEP_BYTES = 8 << 20
"""Less is not worth the call."""
_SYNC_FILE_RANGE_WRITE = 2


def begin_writing(file: IO[bytes], begun: int) -> int:
    """Let the disk begin with the data behind byte `begun`.

    Return the byte behind which it has not begun.

    A hint: it waits for nothing, fails in silence and does nothing outside Linux.
    """
    end = file.tell()
    if end - begun < STEP_BYTES:
        return begun
    if (sync_file_range := _sync_file_range()) is not None:
        sync_file_range(file.fileno(), begun, end - begun, _SYNC_FILE_RANGE_WRITE)
    return end


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Return Linux's sync_file_range(2), or None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function
