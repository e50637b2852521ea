"""Act on SIGTERM before the process ends, as schedulers send it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def before_termination(act: Callable[[], object]) -> Iterator[None]:
    """Call `act` before SIGTERM has its usual effect, during the block.

    Nothing is changed where signals are not handled, which is in all threads but the main one, and where somebody has
    decided that SIGTERM is ignored.

    Args:
        act: Called once, at most, and in this process only: workers that are forked meanwhile just end.
    """
    previous = signal.getsignal(signal.SIGTERM) if threading.current_thread() is threading.main_thread() else None
    if previous in (None, signal.SIG_IGN):
        yield
        return
    process = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, previous)  # first, so that a second signal does not wait for `act`
        if os.getpid() == process:
            act()
        if callable(previous):
            previous(number, frame)
        else:
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is handle:
            signal.signal(signal.SIGTERM, previous)
