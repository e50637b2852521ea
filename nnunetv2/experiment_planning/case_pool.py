"""Apply a function to every case of a dataset and collect what it returns."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

from nnunetv2.preprocessing.case_workers import process_cases


def map_cases(function: Callable[..., Any], cases: Mapping[str, tuple], *, num_processes: int, description: str,
              show_progress: bool = True) -> list[Any]:
    """Call `function(*arguments)` for every case and return the results in the order of the cases.

    Args:
        function: Importable by name, since workers are spawned.
        cases: Case identifier -> positional arguments.
        num_processes: 1 works in this process, which is what a debugger wants.

    Raises:
        CaseFailedError: A case raised an exception, or a worker died on it. The message names the case.
    """
    from tqdm import tqdm
    with closing(process_cases(function, cases, num_processes)) as done:
        results = dict(tqdm(done, desc=description, total=len(cases), disable=not show_progress))
    return [results[case] for case in cases]
