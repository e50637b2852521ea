"""Apply a function to every case of a dataset, in processes of its own, and name the case that fails."""
from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import Any

# Held by each worker: entry i is the id of the process that began task i, 0 before that.
_began: Sequence[int] | None = None


class CaseError(RuntimeError):
    """A case could not be processed; the message begins with its name."""


def map_cases(function: Callable[..., Any], arguments: Mapping[str, tuple], *, num_processes: int,
              description: str, show_progress: bool = True) -> list[Any]:
    """Call `function(*arguments[case])` for every case and return the results in the order of the cases.

    Args:
        function: Importable by name, since workers are spawned.
        arguments: Case identifier -> positional arguments.
        num_processes: 1 works in this process, which is what a debugger wants.

    Raises:
        CaseError: A case raised an exception, or a worker died on it (most often for lack of memory). Raised as
            soon as it is noticed; the other workers are stopped.
    """
    if num_processes < 1:
        raise ValueError(f"num_processes must be at least 1, got {num_processes}")
    advance, close = _progress(len(arguments), description, show_progress)
    try:
        if num_processes == 1 or len(arguments) < 2:
            return [_call_here(function, case, values, advance) for case, values in arguments.items()]
        return _map_in_processes(function, arguments, min(num_processes, len(arguments)), advance)
    finally:
        close()


def _progress(total: int, description: str, show: bool) -> tuple[Callable[[], Any], Callable[[], None]]:
    from tqdm import tqdm
    bar = tqdm(desc=description, total=total, disable=not show)
    return bar.update, bar.close


def _call_here(function: Callable[..., Any], case: str, values: tuple, advance: Callable[[], Any]) -> Any:
    try:
        result = function(*values)
    except Exception as error:
        raise _case_error(case, error) from error
    advance()
    return result


def _map_in_processes(function: Callable[..., Any], arguments: Mapping[str, tuple], num_processes: int,
                      advance: Callable[[], Any]) -> list[Any]:
    context = multiprocessing.get_context("spawn")
    began = context.RawArray("q", len(arguments))
    cases = list(arguments)
    executor = ProcessPoolExecutor(num_processes, mp_context=context, initializer=_adopt, initargs=(began,))
    workers: list[BaseProcess] = []
    try:
        futures = [executor.submit(_begin, i, function, arguments[case]) for i, case in enumerate(cases)]
        workers = list(executor._processes.values())
        number_of = {future: i for i, future in enumerate(futures)}
        for future in as_completed(futures):
            _raise_if_failed(future, cases[number_of[future]])
            advance()
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        executor.shutdown(wait=True, cancel_futures=True)
        raise CaseError(_describe_death(cases, futures, list(began), workers)) from error
    finally:
        # After a failure nobody waits for what the others would still compute.
        for worker in workers:
            worker.terminate()
        executor.shutdown(wait=True, cancel_futures=True)


def _adopt(began: Sequence[int]) -> None:
    global _began
    _began = began


def _begin(index: int, function: Callable[..., Any], values: tuple) -> Any:
    _began[index] = os.getpid()
    return function(*values)


def _raise_if_failed(future: Future, case: str) -> None:
    error = future.exception()
    if isinstance(error, BrokenProcessPool):
        raise error
    if error is not None:
        raise _case_error(case, error) from error


def _case_error(case: str, error: BaseException) -> CaseError:
    kind = "" if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: "
    return CaseError(f"case {case}: {kind}{error}")


def _describe_death(cases: Sequence[str], futures: Sequence[Future], began: Sequence[int],
                    workers: Sequence[BaseProcess]) -> str:
    """Say which cases the dead workers held. The pool ends the survivors with SIGTERM, so any other code tells."""
    survivors_code = (None, 0, -signal.SIGTERM)
    dead = {worker.pid for worker in workers if worker.exitcode not in survivors_code}
    unfinished = {i: began[i] for i, future in enumerate(futures) if _is_lost(future) and began[i]}
    held = [cases[i] for i, pid in unfinished.items() if pid in dead] or [cases[i] for i in unfinished]
    if not held:
        return ("the worker processes died before the first case; a script that calls this needs "
                "`if __name__ == '__main__':` around its own code")
    codes = sorted({worker.exitcode for worker in workers if worker.pid in dead})
    return (f"a worker process died (exit code {', '.join(map(str, codes)) or 'unknown'}) on case "
            f"{', '.join(held)}. Most often the memory did not suffice: use fewer processes, or a machine with more")


def _is_lost(future: Future) -> bool:
    return future.cancelled() or not future.done() or isinstance(future.exception(), BrokenProcessPool)
