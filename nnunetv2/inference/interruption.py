"""End a command within seconds of Ctrl-C, whatever its threads are at.

Python waits for threads before it ends, and one that resamples a large image may take long. Each file is written beside
its name, so a thread that is cut short leaves nothing that looks like a result.
"""

from __future__ import annotations

import concurrent.futures.thread
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SECONDS_TO_FINISH_CASES = 5
# KeyboardInterrupt can get lost: exceptions in a destructor or a callback of C code are printed and dropped.
_SECONDS_TO_STOP = 9
_INTERRUPTED = 130


def run_until_interrupted(command: Callable[[], None]) -> None:
    """Run a command so that, after Ctrl-C, its process ends within seconds."""
    is_over = threading.Event()
    try:
        with _noticing_interrupts(lambda: _in_background(_end_unless, is_over)):
            command()
    except KeyboardInterrupt:
        _in_background(_end_after_main_thread)
        raise
    finally:
        is_over.set()


@contextmanager
def _noticing_interrupts(on_interrupt: Callable[[], None]) -> Iterator[None]:
    """Call a function on Ctrl-C, before KeyboardInterrupt; handlers that a program has set stay in place."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        on_interrupt()
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _in_background(function: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=function, args=arguments, daemon=True).start()


def _end_unless(is_over: threading.Event) -> None:
    """End the process if the command is not over a while after Ctrl-C."""
    if not is_over.wait(_SECONDS_TO_STOP):
        os._exit(_INTERRUPTED)


def _end_after_main_thread() -> None:
    """End the process a while after its main thread has begun to wait for the others, at the end of the program.

    A program that called the command may go on for long before; concurrent.futures notes when the end has come.
    """
    while threading.main_thread().is_alive() and not getattr(concurrent.futures.thread, "_shutdown", False):
        time.sleep(0.1)
    time.sleep(_SECONDS_TO_FINISH_CASES)
    os._exit(_INTERRUPTED)
