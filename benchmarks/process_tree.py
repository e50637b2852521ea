"""Measure a command: how long it takes, and how much memory it and all its children hold together at most."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_SECONDS_BETWEEN_SAMPLES = 0.05


@dataclass(frozen=True)
class Measured:
    seconds: float
    peak_mb: float
    """Proportional set size of the whole tree: pages that processes share count once. Sampled, Linux only."""
    output: str


def measure(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Measured:
    """Run a command in an empty folder, so that no package is found by accident.

    Raises:
        RuntimeError: It failed. The message holds the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        process = subprocess.Popen(
            list(command),
            cwd=folder,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        peak = _Peak(process.pid)
        with peak:
            output, _ = process.communicate()
        seconds = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{output[-4000:]}")
    return Measured(seconds, peak.kilobytes / 1e3, output)


class _Peak:
    """Samples a process tree in a thread while the `with` block lasts."""

    def __init__(self, pid: int):
        self.kilobytes = 0
        self._pid = pid
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> _Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._is_over.wait(_SECONDS_BETWEEN_SAMPLES):
            self.kilobytes = max(self.kilobytes, sum(map(_proportional_kilobytes, _tree(self._pid))))


def _tree(pid: int) -> list[int]:
    found, remaining = [], [pid]
    while remaining:
        current = remaining.pop()
        found.append(current)
        for children in Path(f"/proc/{current}/task").glob("*/children"):
            remaining += map(int, _read(children).split())
    return found


def _proportional_kilobytes(pid: int) -> int:
    lines = _read(Path(f"/proc/{pid}/smaps_rollup")).splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the process has ended meanwhile
        return ""
