"""Export predictions in the background while the network goes on with the next case.

Threads do it: resampling, deciding and compressing release the interpreter lock, and threads neither copy the logits,
which are the largest arrays of a prediction, nor need seconds to start, nor can be killed one by one.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from traceback import clear_frames
from types import TracebackType
from typing import Any, NamedTuple

from nnunetv2.inference.errors import FailedCasesError, describe_failure
from nnunetv2.utilities.free_memory import free_memory_bytes

logger = logging.getLogger(__name__)

# Logits that wait for a free worker must not fill the memory while the network runs ahead.
_SHARE_OF_FREE_MEMORY = 0.5
_MOST_WAITING_EXPORTS = 2
_NO_OTHER_CASE_WILL_DO_BETTER = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class _Export(NamedTuple):
    """An export that is not known to be done."""

    number: int
    name: str
    num_bytes: int
    future: Future


class ExportQueue:
    """Run exports in order of arrival; keep results and errors of cases.

    A failure is logged at once and does not keep other cases from being exported, unless the disk is full.

    Cases are named by their output paths, as far as these are known. Messages give the last part of a path, or all of
    it where several cases that failed share that part.

    Args:
        num_workers: Exports that run at the same time; 0 exports each case before `submit` returns.
        most_bytes: Memory that unfinished exports may take together; one that needs more runs alone. Default: half of
            the free memory.
    """

    def __init__(self, num_workers: int, most_bytes: int | None = None) -> None:
        if num_workers < 0:
            raise ValueError(f"the number of export workers must be at least 0, got {num_workers}")
        self._num_workers = num_workers
        self._most_bytes = int(free_memory_bytes() * _SHARE_OF_FREE_MEMORY) if most_bytes is None else most_bytes
        self._executor = ThreadPoolExecutor(max(1, num_workers), thread_name_prefix="export")
        self._unfinished: list[_Export] = []
        self._results: list[Any] = []  # of all cases; None until there is one
        self._failures: dict[int, tuple[str, BaseException]] = {}
        self._full_disk: BaseException | None = None

    def __enter__(self) -> ExportQueue:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Exports that have been handed over are finished even if a later case failed, but not after Ctrl-C.
        is_interrupted = isinstance(error, KeyboardInterrupt)
        self._executor.shutdown(wait=not is_interrupted, cancel_futures=is_interrupted)

    def submit(self, name: str, num_bytes: int, export: Callable[..., Any], *arguments: Any) -> None:
        """Hand over an export; waits while too many others, or too many bytes, are unfinished.

        Args:
            name: How messages call the case.
            num_bytes: Memory that the export will take, logits included.

        Raises:
            RuntimeError: An earlier export found the disk full; the message lists all cases that failed.
        """
        self._wait_for_room(num_bytes)
        if self._full_disk is not None:
            raise RuntimeError(str(self._failure())) from self._full_disk
        future = self._executor.submit(export, *arguments)
        future.add_done_callback(lambda done: _report_failure(name, done))
        self._unfinished.append(_Export(len(self._results), name, num_bytes, future))
        self._results.append(None)
        if self._num_workers == 0:
            wait([future])

    def fail(self, name: str, error: BaseException) -> None:
        """Note down that a case failed before it came here."""
        _report(name, error)
        self._note_failure(len(self._results), name, error)
        self._results.append(None)

    def results(self) -> list[Any]:
        """Wait for all exports and return their results in order.

        Raises:
            FailedCasesError: Cases failed; the message lists them.
        """
        wait([export.future for export in self._unfinished])
        self._settle()
        if self._failures:
            failure = self._failure()
            raise failure from failure.failures[0][1]
        return self._results

    def _settle(self) -> None:
        """Note down how those exports ended that are done by now."""
        done = [export for export in self._unfinished if export.future.done()]
        self._unfinished = [export for export in self._unfinished if export not in done]
        for number, name, _, future in done:
            error = future.exception()
            if error is None:
                self._results[number] = future.result()
            else:
                self._note_failure(number, name, error)

    def _note_failure(self, number: int, name: str, error: BaseException) -> None:
        self._failures[number] = name, error
        if isinstance(error, OSError) and error.errno in _NO_OTHER_CASE_WILL_DO_BETTER:
            self._full_disk = self._full_disk or error

    def _failure(self) -> FailedCasesError:
        return FailedCasesError([failure for _, failure in sorted(self._failures.items())], len(self._results))

    def _wait_for_room(self, num_bytes: int) -> None:
        while True:
            self._settle()
            has_room = (
                len(self._unfinished) < self._num_workers + _MOST_WAITING_EXPORTS
                and sum(export.num_bytes for export in self._unfinished) + num_bytes <= self._most_bytes
            )
            if has_room or not self._unfinished:
                return
            wait([export.future for export in self._unfinished], return_when=FIRST_COMPLETED)


def _report_failure(name: str, done: Future) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        _report(name, error)


def _report(name: str, error: BaseException) -> None:
    """Log a failure, and let go of the logits and images that the frames of its traceback hold, maybe on a GPU."""
    logger.error("case %s failed: %s", Path(name).name, describe_failure(error))
    chain: list[BaseException | None] = [error]
    for one in chain:
        if one is not None:
            clear_frames(one.__traceback__)
            chain += [other for other in (one.__cause__, one.__context__) if other not in chain]
