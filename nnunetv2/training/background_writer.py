"""Write files in a thread, in order, while the training goes on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)


class WriteError(RuntimeError):
    """A file that the training needs could not be written."""


class _Task(NamedTuple):
    name: str
    function: Callable[..., Any]
    arguments: tuple
    is_vital: bool


class BackgroundWriter:
    """Run functions in one thread, in the order in which they came.

    A newer task takes the place of one of its name that still waits: of a file that is written again and again, only
    the newest content matters. The thread lives while there is something to do, and is no daemon: tasks that were
    handed over are done even if the program ends meanwhile.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[_Task] = []
        self._thread: threading.Thread | None = None
        self._failure: WriteError | None = None

    def submit(self, name: str, function: Callable[..., Any], *arguments: Any, is_vital: bool = True) -> None:
        """Hand over a task.

        Args:
            name: The task's, say that of a file; replaces a waiting task of that name.
            function: Called with `arguments`, which must not change until then.
            is_vital: Its failure ends the training, at the next `raise_failure`. Of others the log tells.
        """
        with self._changed:
            task = _Task(name, function, arguments, is_vital)
            names = [waiting.name for waiting in self._waiting]
            if name in names:  # in its place, so that a file does not wait for ever behind others
                self._waiting[names.index(name)] = task
            else:
                self._waiting.append(task)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="background-writer", daemon=False)
                self._thread.start()

    def raise_failure(self) -> None:
        """Raise the failure of a vital task, once.

        Raises:
            WriteError: There was one; the message names the file and the cause.
        """
        with self._changed:
            failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def wait(self) -> None:
        """Return as soon as all tasks are done, without raising their errors."""
        with self._changed:
            while self._thread is not None:
                self._changed.wait()

    def __getstate__(self) -> dict:
        """Leave the thread behind: a trainer that is sent to another process starts its own."""
        return {}

    def __setstate__(self, state: dict) -> None:
        self.__init__()

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._thread = None
                    self._changed.notify_all()
                    return
                task = self._waiting.pop(0)
            try:
                task.function(*task.arguments)
            except Exception as error:  # noqa: BLE001  kept for the thread that trains, whatever it is
                self._note_failure(task, error)
            del task  # lets go of the arguments, which may be large

    def _note_failure(self, task: _Task, error: Exception) -> None:
        message = f"could not write {task.name}: {type(error).__name__}: {error}"
        if not task.is_vital:
            logger.warning("%s. The training goes on", message)
            return
        failure = WriteError(f"{message}. Is the disk full, or a quota reached? Make room, then go on with --c")
        failure.__cause__ = error
        with self._changed:
            self._failure = self._failure or failure
