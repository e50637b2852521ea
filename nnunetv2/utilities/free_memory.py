"""Tell how much main memory this process may still take, and how much there is."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP_2 = ("memory.max", "memory.current", "inactive_file")
_CGROUP_1 = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file")
_UNKNOWN_BYTES = 4 * 2**30


def free_memory_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the memory that the machine can give without swapping.

    Or the rest of a container's limit, if less.

    4 GiB where the system does not tell.
    """
    known = [_machine(proc), *(_container(cgroup, *names) for names in (_CGROUP_2, _CGROUP_1))]
    return min((value for value in known if value is not None), default=_UNKNOWN_BYTES)


def total_memory_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the memory of the machine with its swap space.

    Or a container's limit, if less; None if unknown.
    """
    known = [_whole_machine(proc), *(_limit(cgroup / names[0]) for names in (_CGROUP_2, _CGROUP_1))]
    return min((value for value in known if value is not None), default=None)


def _whole_machine(proc: Path) -> int | None:
    sizes = dict(line.split(":", 1) for line in _read(proc / "meminfo").splitlines() if ":" in line)
    if "MemTotal" in sizes:
        return sum(int(sizes[name].split()[0]) * 1024 for name in ("MemTotal", "SwapTotal") if name in sizes)
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:  # other Unix systems
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _limit(file: Path) -> int | None:
    limit = _read(file).strip()
    return int(limit) if limit.isdecimal() else None  # no such limit, or "max"


def _machine(proc: Path) -> int | None:
    for line in _read(proc / "meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:  # other Unix systems
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _container(cgroup: Path, limit_file: str, usage_file: str, cache: str) -> int | None:
    limit, usage = _read(cgroup / limit_file).strip(), _read(cgroup / usage_file).strip()
    if not (limit.isdecimal() and usage.isdecimal()):  # no such limit, or "max"
        return None
    statistics = dict(line.split() for line in _read((cgroup / usage_file).parent / "memory.stat").splitlines())
    # Files that were read count as usage, but the system drops them when memory is wanted.
    return max(0, int(limit) - int(usage) + int(statistics.get(cache, 0)))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
