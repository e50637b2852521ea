"""Apply a function to every case, in several processes where that pays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from nnunetv2.utilities.case_workers import process_cases
from nnunetv2.utilities.device import usable_cpu_count
from nnunetv2.utilities.progress import follow

PROCESSES_PAY_FROM = 4 * 2**20
"""Bytes of (compressed) label maps above which processes finish earlier than one that starts at once: reading and
counting takes about a second per MiB, starting a process and its imports half a second."""


def map_cases(
    function: Callable[..., Any], cases: Mapping[str, tuple], num_processes: int, files: Iterable[str] | None = None
) -> dict[str, Any]:
    """Return the results of `function(*arguments)`, in the order of `cases`.

    Args:
        function: Picklable, as are the arguments and results.
        cases: Name -> arguments.
        num_processes: At most so many processes; 1 works in this one.
        files: The files that will be read; if they are small altogether, this process does everything. None: unknown,
            start processes.

    Raises:
        CaseFailedError: The work failed in another process, or the process died. The message names the case.
        Exception: Whatever `function` raises, if this process does the work.
    """
    workers = max(1, min(num_processes, usable_cpu_count(), len(cases)))
    if workers == 1 or (files is not None and _total_size(files) < PROCESSES_PAY_FROM):
        return {name: function(*arguments) for name, arguments in cases.items()}
    results = dict(process_cases(function, cases, workers))
    return {name: results[name] for name in cases}


def map_cases_visibly(
    function: Callable[..., Any],
    cases: Mapping[str, tuple],
    *,
    num_processes: int,
    description: str,
    show_progress: bool = True,
    verbose: bool = False,
) -> list[Any]:
    """Return the results of `function(*arguments)` in the order of the cases.

    Show how it gets on.

    Args:
        function: Importable by name, since workers are spawned.
        cases: Case identifier -> positional arguments.
        num_processes: 1 works in this process, as a debugger needs.
        verbose: Log a line per case in place of the progress bar.

    Raises:
        CaseFailedError: A case raised an exception, or a worker died on it. The message names the case.
    """
    with closing(process_cases(function, cases, num_processes)) as done:
        results = dict(
            follow(done, total=len(cases), description=description, show_bar=show_progress, log_cases=verbose)
        )
    return [results[case] for case in cases]


def _total_size(files: Iterable[str]) -> int:
    """Return the bytes of those files that exist."""
    return sum(path.stat().st_size for path in map(Path, files) if path.is_file())
