"""Export predictions in the background while the network goes on with the next case.

Threads do it: resampling, deciding and compressing release the interpreter lock, and threads neither copy the logits,
which are the largest arrays of a prediction, nor need seconds to start.
"""
from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any

logger = logging.getLogger(__name__)

# Logits that wait for a free worker must not fill the memory while the network runs ahead.
_MOST_WAITING_BYTES = 4 * 2**30
_MOST_WAITING_EXPORTS = 2


class ExportQueue:
    """Run exports in order of arrival; remember what they return and which of them failed.

    A failure is logged at once and does not keep other cases from being exported.
    """

    def __init__(self, num_workers: int) -> None:
        if num_workers < 0:
            raise ValueError(f"the number of export workers must be at least 0, got {num_workers}")
        self._num_workers = num_workers
        self._executor = ThreadPoolExecutor(max(1, num_workers), thread_name_prefix="export")
        self._exports: list[tuple[str, int, Future]] = []

    def __enter__(self) -> ExportQueue:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        # Exports that have been handed over are finished even if a later case failed.
        self._executor.shutdown(wait=True, cancel_futures=isinstance(error, KeyboardInterrupt))

    def submit(self, name: str, num_bytes: int, export: Callable[..., Any], *arguments: Any) -> None:
        """Hand over an export; waits while too many others, or too many bytes, are unfinished.

        Args:
            name: How messages call the case.
            num_bytes: Size of the logits.
        """
        self._wait_for_room(num_bytes)
        future = self._executor.submit(export, *arguments)
        future.add_done_callback(lambda done: _log_failure(name, done))
        self._exports.append((name, num_bytes, future))
        if self._num_workers == 0:
            wait([future])

    def results(self) -> list[Any]:
        """Wait for all exports and return their results in order.

        Raises:
            RuntimeError: Some failed; the message lists them.
        """
        wait([future for *_, future in self._exports])
        failed = {name: future.exception() for name, _, future in self._exports if future.exception() is not None}
        if failed:
            raise _failure(failed, len(self._exports)) from next(iter(failed.values()))
        return [future.result() for *_, future in self._exports]

    def _wait_for_room(self, num_bytes: int) -> None:
        while True:
            unfinished = {future: size for _, size, future in self._exports if not future.done()}
            has_room = len(unfinished) < self._num_workers + _MOST_WAITING_EXPORTS \
                and sum(unfinished.values()) + num_bytes <= _MOST_WAITING_BYTES
            if has_room or not unfinished:
                return
            wait(unfinished, return_when=FIRST_COMPLETED)


def _log_failure(name: str, done: Future) -> None:
    if not done.cancelled() and done.exception() is not None:
        logger.error("case %s could not be exported: %s", name, _describe(done.exception()))


def _failure(failed: dict[str, BaseException], total: int) -> RuntimeError:
    lines = "; ".join(f"{name}: {_describe(error)}" for name, error in failed.items())
    if any(isinstance(error, MemoryError) for error in failed.values()):
        return RuntimeError("Segmentation export worker died. The memory did not suffice: use fewer export workers "
                            f"(-nps). {len(failed)} of {total} cases are missing: {lines}")
    return RuntimeError(f"{len(failed)} of {total} cases could not be exported: {lines}")


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
