"""Export predictions in the background while the network goes on with the next case.

Threads do it: resampling, deciding and compressing release the interpreter lock, and threads neither copy the logits,
which are the largest arrays of a prediction, nor need seconds to start, nor can be killed one by one.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any

from nnunetv2.inference.preprocessing_jobs import UnpreparedCaseError
from nnunetv2.utilities.free_memory import free_memory_bytes

logger = logging.getLogger(__name__)

# Logits that wait for a free worker must not fill the memory while the network runs ahead.
_SHARE_OF_FREE_MEMORY = 0.5
_MOST_WAITING_EXPORTS = 2
_NO_OTHER_CASE_WILL_DO_BETTER = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class ExportQueue:
    """Run exports in order of arrival; remember what they return and which cases failed.

    A failure is logged at once and does not keep other cases from being exported, unless the disk is full.

    Args:
        num_workers: Exports that run at the same time; 0 exports each case before `submit` returns.
        most_bytes: Memory that unfinished exports may take together; one that needs more runs alone. Default: half of
            what is free.
    """

    def __init__(self, num_workers: int, most_bytes: int | None = None) -> None:
        if num_workers < 0:
            raise ValueError(f"the number of export workers must be at least 0, got {num_workers}")
        self._num_workers = num_workers
        self._most_bytes = int(free_memory_bytes() * _SHARE_OF_FREE_MEMORY) if most_bytes is None else most_bytes
        self._executor = ThreadPoolExecutor(max(1, num_workers), thread_name_prefix="export")
        self._exports: list[tuple[str, int, Future]] = []

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
        self._require_disk_space()
        future = self._executor.submit(export, *arguments)
        future.add_done_callback(lambda done: _log_failure(name, done))
        self._exports.append((name, num_bytes, future))
        if self._num_workers == 0:
            wait([future])

    def fail(self, name: str, error: BaseException) -> None:
        """Note down that a case failed before it came here."""
        future: Future = Future()
        future.set_exception(error)
        _log_failure(name, future)
        self._exports.append((name, 0, future))

    def results(self) -> list[Any]:
        """Wait for all exports and return their results in order.

        Raises:
            RuntimeError: Cases failed; the message lists them.
        """
        wait([future for *_, future in self._exports])
        failed = self._failed()
        if failed:
            raise _failure(failed, len(self._exports)) from next(iter(failed.values()))
        return [future.result() for *_, future in self._exports]

    def _failed(self) -> dict[str, BaseException]:
        return {
            name: error
            for name, _, future in self._exports
            if future.done() and (error := future.exception()) is not None
        }

    def _wait_for_room(self, num_bytes: int) -> None:
        while True:
            unfinished = {future: size for _, size, future in self._exports if not future.done()}
            has_room = (
                len(unfinished) < self._num_workers + _MOST_WAITING_EXPORTS
                and sum(unfinished.values()) + num_bytes <= self._most_bytes
            )
            if has_room or not unfinished:
                return
            wait(unfinished, return_when=FIRST_COMPLETED)

    def _require_disk_space(self) -> None:
        failed = self._failed()
        for error in failed.values():
            if isinstance(error, OSError) and error.errno in _NO_OTHER_CASE_WILL_DO_BETTER:
                raise _failure(failed, len(self._exports)) from error


def _log_failure(name: str, done: Future) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        logger.error("case %s failed: %s", name, _describe(error))


def _failure(failed: dict[str, BaseException], total: int) -> RuntimeError:
    """Return one error for all cases that failed. Programs look for how the message about memory begins."""
    lines = "; ".join(f"{name}: {_describe(error)}" for name, error in failed.items())
    missing = f"{len(failed)} of {total} cases could not be predicted: {lines}"
    if any(isinstance(error, MemoryError) for error in failed.values()):
        return RuntimeError(
            f"Segmentation export worker died. The memory did not suffice: use fewer export workers (-nps). {missing}"
        )
    return RuntimeError(missing)


def _describe(error: BaseException) -> str:
    if isinstance(error, UnpreparedCaseError):
        return error.reason
    return f"{type(error).__name__}: {error}"
