"""Let file permissions count for a test that root runs."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_VERSION = 0x20080522
# To pass over permissions when writing, and when reading; see capabilities(7).
_OVERRIDES = 1 << 1 | 1 << 2


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Sets(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


@contextmanager
def privileges_dropped() -> Iterator[None]:
    """Give up root's privilege to pass over permissions in this thread and those it starts, and take it back after."""
    if not hasattr(os, "geteuid"):
        pytest.skip("this system has no such file permissions")
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = _Header(_VERSION, 0), (_Sets * 2)()
    if not hasattr(libc, "capget") or libc.capget(ctypes.byref(header), sets):
        pytest.skip("root's privileges cannot be given up here; run the tests as an ordinary user")
    before = sets[0].effective
    sets[0].effective = before & ~_OVERRIDES
    libc.capset(ctypes.byref(header), sets)
    try:
        yield
    finally:
        sets[0].effective = before
        libc.capset(ctypes.byref(header), sets)
