"""Work on cases in several processes, and name the case that fails.

`multiprocessing.Pool` waits for ever when the system kills one of its workers; `concurrent.futures` notices, but cannot
tell the worker's case. Here each worker has a pipe of its own and one case at a time: a closed pipe is a dead
worker, and its case is known. Nothing is polled.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

from nnunetv2.utilities.plain_text import log_plainly
from nnunetv2.utilities.worker_traceback import WorkerTracebackError

_SECONDS_TO_EXIT = 10


class CaseFailedError(RuntimeError):
    """A case could not be processed.

    The message names it; the cause is the error of the worker.
    """


def process_cases(
    function: Callable[..., object], cases: Mapping[str, tuple], num_processes: int
) -> Iterator[tuple[str, Any]]:
    """Call `function(*arguments)` for each case; yield names and results as they come.

    Args:
        function: Picklable, for it is sent to each worker once. Its results are sent back.
        cases: Name -> arguments.
        num_processes: 1 works in this process.

    Raises:
        CaseFailedError: `function` raised, or a worker died. The other workers are stopped at once.
        ValueError: `num_processes` is below 1.
    """
    if num_processes < 1:
        raise ValueError(f"num_processes must be at least 1, got {num_processes}")
    if min(num_processes, len(cases)) <= 1:
        yield from _process_here(function, cases)
        return
    context = multiprocessing.get_context("spawn")
    waiting = iter(cases.items())
    workers: dict[Connection, _Worker] = {}
    try:
        for _ in range(min(num_processes, len(cases))):
            worker = _Worker(context, function)
            workers[worker.connection] = worker
            worker.begin(*next(waiting))
        while busy := [worker.connection for worker in workers.values() if worker.case is not None]:
            for connection in wait(busy):
                yield workers[connection].finish()
                following = next(waiting, None)
                if following is not None:
                    workers[connection].begin(*following)
    finally:
        for worker in workers.values():
            worker.stop()


def _process_here(function: Callable[..., object], cases: Mapping[str, tuple]) -> Iterator[tuple[str, Any]]:
    for name, arguments in cases.items():
        try:
            result = function(*arguments)
        except Exception as error:
            raise CaseFailedError(f"case {name}: {_in_words(error)}") from error
        yield name, result


class _Worker:
    """A process that works on one case at a time."""

    def __init__(self, context: multiprocessing.context.BaseContext, function: Callable[..., object]):
        self.connection, other_end = context.Pipe()
        self.case: str | None = None
        self.has_answered = False
        self.process = context.Process(target=_serve, args=(function, other_end), daemon=True)
        self.process.start()
        other_end.close()  # only the worker holds it now, so its death closes the pipe

    def begin(self, case: str, arguments: tuple) -> None:
        self.case = case
        try:
            self.connection.send(arguments)
        except OSError as error:
            raise self._describe_death() from error

    def finish(self) -> tuple[str, Any]:
        """Wait for the current case and return its name and result."""
        try:
            result, failure = self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._describe_death() from error
        case, self.case, self.has_answered = self.case, None, True
        if failure is not None:
            in_words, trace = failure
            raise CaseFailedError(f"case {case}: {in_words}") from WorkerTracebackError(trace)
        return case, result

    def stop(self) -> None:
        if self.case is not None:
            self.process.terminate()
        self.connection.close()  # an idle worker ends when it sees this
        self.process.join(_SECONDS_TO_EXIT)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _describe_death(self) -> CaseFailedError:
        self.process.join(_SECONDS_TO_EXIT)
        code = self.process.exitcode
        if code == -getattr(signal, "SIGKILL", 9):
            reason = (
                "was killed by the system, most likely because memory ran out. Use fewer processes (-np), "
                "or a machine with more memory"
            )
        elif not self.has_answered and code == 1:
            reason = (
                "could not start; its error is printed above. If this was called from a script, put the call "
                'below `if __name__ == "__main__":`'
            )
        else:
            reason = f"ended unexpectedly (exit code {code}). Memory may have run out: try fewer processes (-np)"
        return CaseFailedError(f"case {self.case}: the worker process {reason}")


def _serve(function: Callable[..., object], connection: Connection) -> None:
    """Run in the worker: take arguments from the pipe, answer the result and None, or None and the error."""
    from threadpoolctl import threadpool_limits

    log_plainly()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends us
    threading.Thread(target=end_with_parent, daemon=True).start()
    with threadpool_limits(1):  # as many processes as wanted work already
        while True:
            try:
                arguments = connection.recv()
            except (EOFError, OSError):  # the parent is done, or gone
                return
            result, failure = None, None
            try:
                result = function(*arguments)
            except Exception as error:  # noqa: BLE001  told to the parent process, whatever it is
                failure = (_in_words(error), traceback.format_exc())
            try:
                connection.send((result, failure))
            except OSError:
                sys.exit(0)


def end_with_parent() -> None:
    """End this process as soon as its parent is gone.

    Also in the middle of a case: another run may follow at once.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _in_words(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return f"memory ran out ({error}). Use fewer processes (-np)"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
