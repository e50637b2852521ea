"""Decide between two epochs whether a training ends early, with a complete model.

    nnUNetv2_stop FOLDER      writes a request beside the lock of the training
    kill -USR1 PROCESS        as schedulers do some minutes before the end of a job
    --stop_after TIME         no epoch begins that would be over later than that
    --early_stopping N        N epochs brought no better EMA pseudo Dice

The schedule of the learning rate stays as it is: the present epoch is the last one of this command, and `--c` goes on
with the next one.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from nnunetv2.utilities.atomic_write import replacing
from nnunetv2.utilities.durations import format_duration

REQUEST_FILE = ".stop_requested"
SIGNAL: signal.Signals | None = getattr(signal, "SIGUSR1", None)
"""The signal that asks a training to stop; None where the system has none."""

_signalled = threading.Event()


@contextmanager
def listening() -> Iterator[None]:
    """Note SIGUSR1 during the block, instead of being killed by it.

    Nothing is changed where signals are not handled, which is in all threads but the main one.
    """
    if SIGNAL is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(SIGNAL) is _note:  # the caller listens already
        yield
        return
    previous = signal.signal(SIGNAL, _note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {SIGNAL})  # whoever started this process may have held it back
    try:
        yield
    finally:
        signal.signal(SIGNAL, previous)
        _signalled.clear()  # the request was meant for this training, and not for the next one of a program


@contextmanager
def holding_back() -> Iterator[None]:
    """Hold SIGUSR1 back from this thread during the block.

    Processes started in it hold it back until they listen.
    """
    if SIGNAL is None:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {SIGNAL})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def was_signalled() -> bool:
    """Tell whether SIGUSR1 has come since this process listens."""
    return _signalled.is_set()


def forward_signal(processes: Iterable[int]) -> None:
    """Send SIGUSR1 to processes by their numbers; those that have ended do not matter."""
    assert SIGNAL is not None  # or it would not have come
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, SIGNAL)


def request_stop(folder: Path, holder: str) -> None:
    """Ask the training that holds the lock of a folder to stop after its epoch.

    Args:
        holder: The training, as its lock names it; no other one heeds the request.
    """
    with replacing(folder / REQUEST_FILE) as written:
        Path(written).write_text(holder, encoding="utf-8")


class StopConditions:
    """The conditions on which one training ends early.

    Args:
        folder: Its output folder.
        holder: The training, as its lock names it.
        started: Time at which it began, in seconds.
        stop_after_s: Seconds from then on within which epochs end.
        patience: Epochs without a new best; 0: any number.
    """

    def __init__(
        self, folder: Path, *, holder: str, started: float, stop_after_s: float | None = None, patience: int = 0
    ) -> None:
        self._request, self._holder = folder / REQUEST_FILE, holder
        self._started, self._stop_after_s = started, stop_after_s
        self._patience = patience
        self._epoch_began: float | None = None

    def reason(self, ema_dice: Sequence[float], *, now: float) -> str | None:
        """Return why no further epoch shall begin, or None. Called before each epoch.

        Args:
            ema_dice: The curve so far, an entry per epoch.
            now: Time in seconds, of the same clock as `started`.
        """
        latest_epoch_s = None if self._epoch_began is None else now - self._epoch_began
        self._epoch_began = now
        if was_signalled():
            return "SIGUSR1"
        if self._is_requested():
            return "nnUNetv2_stop"
        if self._stop_after_s is not None and latest_epoch_s is not None:
            left_s = self._started + self._stop_after_s - now
            if latest_epoch_s > left_s:
                return (
                    f"--stop_after: {format_duration(max(0, left_s))} are left, and the latest epoch took "
                    f"{format_duration(latest_epoch_s)}"
                )
        waited = epochs_without_best(ema_dice)
        if 0 < self._patience <= waited:
            return (
                f"--early_stopping: {waited} epochs without a better EMA pseudo Dice; --c needs a larger number, or 0, "
                "to go on"
            )
        return None

    def forget_request(self) -> None:
        """Remove a request, also one that came too late or was for another training."""
        with suppress(FileNotFoundError):
            self._request.unlink()

    def _is_requested(self) -> bool:
        try:
            return self._request.read_text(encoding="utf-8", errors="replace") == self._holder
        except OSError:
            return False


def epochs_without_best(curve: Sequence[float]) -> int:
    """Count the entries of a curve after its best; NaN is never best."""
    best, since = float("-inf"), 0
    for value in curve:
        since += 1
        if value > best:
            best, since = value, 0
    return since


def _note(number: int, frame: FrameType | None) -> None:
    _signalled.set()
