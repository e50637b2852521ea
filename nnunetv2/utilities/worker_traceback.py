"""Let another process's error be the cause of one in this process.

Traceback and all.
"""

from __future__ import annotations


class WorkerTracebackError(Exception):
    """Carries the traceback of another process as text: `raise Error("one line") from WorkerTracebackError(text)`."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"
