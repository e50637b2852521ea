"""Write predictions in other processes while the next ones are computed."""
from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType

QUEUED_PER_POOL = 2


class ExportQueue:
    """Run functions in a few worker processes, holding back whoever submits faster than they work.

    Use it in a `with` block, which ends when all work is done. Workers start when first needed: each of them imports
    torch, which takes seconds, so small jobs are better done in this process (`in_background=False`).

    Raises:
        RuntimeError: A job failed, or the worker that did it died. The message names the job.
    """

    def __init__(self, num_workers: int) -> None:
        self._executor = ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn"))
        self._most_pending = num_workers + QUEUED_PER_POOL
        self._pending: dict[Future, str] = {}

    def submit(self, job: str, function: Callable, *args: object, in_background: bool = True) -> None:
        """Call `function(*args)`, now or in a worker; `job` is how errors name it."""
        if not in_background:
            function(*args)
            return
        self._wait_until_pending(fewer_than=self._most_pending)
        try:
            self._pending[self._executor.submit(function, *args)] = job
        except BrokenProcessPool as error:
            raise _worker_death([*self._pending.values(), job]) from error

    def __enter__(self) -> ExportQueue:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        try:
            if error is None:
                self._wait_until_pending(fewer_than=1)
        finally:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def _wait_until_pending(self, *, fewer_than: int) -> None:
        while len(self._pending) >= fewer_than:
            done, _ = wait(self._pending, return_when=FIRST_COMPLETED)
            jobs = {future: self._pending.pop(future) for future in done}
            for future, job in jobs.items():
                try:
                    future.result()
                except BrokenProcessPool as error:
                    raise _worker_death([*jobs.values(), *self._pending.values()]) from error
                except Exception as error:
                    raise RuntimeError(f"{job} failed: {error}") from error


def _worker_death(jobs: list[str]) -> RuntimeError:
    names = " or ".join(sorted(set(jobs)))
    return RuntimeError(f"a worker process died during {names}, most often because the machine "
                        "ran out of memory: set the environment variable nnUNet_def_n_proc to a smaller number of "
                        "processes than it has now")
