"""Tune glibc malloc so that freed memory is returned to the system."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def return_what_is_freed() -> bool:
    """Make glibc malloc return freed memory at once; return whether it does.

    By default it keeps a store of its own for every thread and, once blocks of a few hundred KiB have come and gone,
    keeps those too. Downloads are sent in blocks of 256 KiB: those stay in the store, as asking the system for each
    would double the coordinator's work.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    options = ((_M_ARENA_MAX, 2), (_M_MMAP_THRESHOLD, 1 << 20), (_M_TRIM_THRESHOLD, 16 << 20))
    return all(set_option(option, value) == 1 for option, value in options)
