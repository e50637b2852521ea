"""Show the progress of a run over many cases.

As a bar, or with a line per case.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import TypeVar

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
# "1.30 cases/s" also where that is below 1, and never seconds per case
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"


def follow(
    done: Iterator[tuple[str, Item]], *, total: int, description: str, show_bar: bool = True, log_cases: bool = False
) -> Iterator[tuple[str, Item]]:
    """Pass on (case, result) pairs and show progress.

    That is their number, cases per second and the time left.

    Args:
        log_cases: Log a line per case in place of the bar, which lines of a log would tear apart.
    """
    if log_cases:
        yield from _log_each(done, total, description)
        return
    from tqdm import tqdm

    yield from tqdm(done, desc=description, total=total, disable=not show_bar, unit=" cases", bar_format=_BAR)


def _log_each(done: Iterator[tuple[str, Item]], total: int, description: str) -> Iterator[tuple[str, Item]]:
    start = time.monotonic()
    for number, (case, result) in enumerate(done, start=1):
        per_case = (time.monotonic() - start) / number
        logger.info(
            "%s: %s done, %d of %d, %.2f cases/s, about %.0f s left",
            description,
            case,
            number,
            total,
            1 / max(per_case, 1e-9),
            per_case * (total - number),
        )
        yield case, result
