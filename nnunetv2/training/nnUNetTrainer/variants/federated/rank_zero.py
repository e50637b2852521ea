"""Let the first process of a site ask the coordinator for all.

In a distributed training only process 0 talks to the coordinator. It does so in a thread, and tells the others every
few seconds that it is still waiting, so that none of them runs into the timeout of the process group:

    process 0    question in a thread ......................... answer
                 |  waiting  waiting  waiting  waiting  waiting  |
    the others   v     v        v        v        v        v     v   -> the same answer, or an error

Without further processes, the question is simply asked.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import Any, TypeVar

from torch import distributed

from nnunetv2.federated.errors import FederationError
from nnunetv2.training.distributed import is_distributed

Answer = TypeVar("Answer")

HEARTBEAT_S = 20.0
"""Well below the timeout of any process group; torchrun users may have set a short one."""


class FirstProcessError(FederationError):
    """The first process of this site failed; it has reported that itself."""


def ask_first_process(question: Callable[[], Answer], *, heartbeat_s: float = HEARTBEAT_S) -> Answer:
    """Return the first process's answer in all processes.

    Args:
        question: Called in the first process only. It takes part in no collective operation.

    Raises:
        Exception: The error of the question, in the first process.
        FirstProcessError: The same, in the others.
    """
    if not is_distributed():
        return question()
    if distributed.get_rank() != 0:
        return _listen()
    future = in_thread(question, name="exchange")
    while not wait([future], heartbeat_s).done:
        _broadcast(("waiting", None))
    error = future.exception()
    if error is not None:
        _broadcast(("failed", f"{type(error).__name__}: {error}"))
        raise error
    _broadcast(("answered", future.result()))
    return future.result()


def in_thread(question: Callable[[], Answer], *, name: str) -> Future[Answer]:
    """Ask in a thread that the end of the program does not wait for."""
    future: Future[Answer] = Future()

    def ask() -> None:
        try:
            future.set_result(question())
        except BaseException as error:  # noqa: BLE001  raised by whoever asks for the result
            future.set_exception(error)

    Thread(target=ask, name=name, daemon=True).start()
    return future


def _listen() -> Any:
    while True:
        state, content = _broadcast(None)
        if state == "failed":
            raise FirstProcessError(f"process 0 of this site failed: {content}")
        if state == "answered":
            return content


def _broadcast(content: Any) -> Any:
    """Return the first process's content in all processes."""
    box = [content]
    distributed.broadcast_object_list(box, src=0)
    return box[0]
