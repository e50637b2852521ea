"""Apply a function to every case of a dataset and collect what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

from nnunetv2.preprocessing.case_workers import process_cases
from nnunetv2.preprocessing.progress import follow


def map_cases(
    function: Callable[..., Any],
    cases: Mapping[str, tuple],
    *,
    num_processes: int,
    description: str,
    show_progress: bool = True,
    verbose: bool = False,
) -> list[Any]:
    """Call `function(*arguments)` for every case and return the results in the order of the cases.

    Args:
        function: Importable by name, since workers are spawned.
        cases: Case identifier -> positional arguments.
        num_processes: 1 works in this process, which is what a debugger wants.
        verbose: Log a line per case in place of the progress bar.

    Raises:
        CaseFailedError: A case raised an exception, or a worker died on it. The message names the case.
    """
    with closing(process_cases(function, cases, num_processes)) as done:
        results = dict(
            follow(done, total=len(cases), description=description, show_bar=show_progress, log_cases=verbose)
        )
    return [results[case] for case in cases]
