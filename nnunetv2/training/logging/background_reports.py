"""Write reports of a training beside it rather than in its way."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from nnunetv2.training.logging.curve_files import Curves

logger = logging.getLogger(__name__)

Report = Callable[[Curves, Path], None]


class BackgroundReporter:
    """Write reports of the newest curves in a thread of its own.

    Epochs shorter than a drawing are left out.

    The thread lives while there is something to write. It is no daemon, so the last reports are complete when the
    program ends.

    Args:
        reports: Called one after the other as `report(curves, folder)`. One that fails is reported, and does not stop
            the others or the training.
    """

    def __init__(self, reports: Sequence[Report]) -> None:
        self._reports = tuple(reports)
        self._lock = threading.Lock()
        self._pending: tuple[Curves, Path] | None = None
        self._thread: threading.Thread | None = None

    def write_soon(self, curves: Curves, folder: Path) -> None:
        """Write reports of a copy of the curves, taken now, into a folder."""
        with self._lock:
            self._pending = {key: list(values) for key, values in curves.items()}, folder
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_pending, name="progress", daemon=False)
                self._thread.start()

    def wait(self) -> None:
        """Return as soon as everything asked for is written."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def __getstate__(self) -> dict:
        """Leave the thread behind: a copy of the logger that goes to another process starts its own."""
        return {"reports": self._reports}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["reports"])

    def _write_pending(self) -> None:
        while True:
            with self._lock:
                if self._pending is None:
                    self._thread = None
                    return
                (curves, folder), self._pending = self._pending, None
            for report in self._reports:
                try:
                    report(curves, folder)
                except Exception as error:  # noqa: BLE001  a full disk, or an odd value in a curve of the user
                    logger.warning("%s of %s failed: %s", getattr(report, "__name__", report), folder, error)
