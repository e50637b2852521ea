"""Lock a file for one process, without waiting."""

from __future__ import annotations

import sys


def lock_file(descriptor: int) -> None:
    """Lock an open file until it is closed, also by the death of this process.

    Raises:
        BlockingIOError: Another process has locked it.
        OSError: The file system knows no locks.
    """
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError(error.errno, error.strerror) from error
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
