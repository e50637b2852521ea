"""Append lines to the log of a training."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

from nnunetv2.utilities.atomic_write import naming
from nnunetv2.utilities.plain_text import printable

ATTEMPTS = 5
PAUSE_S = 0.5

_RULE = 71 * "#"
CITATION = f"""
{_RULE}
If you publish results, please cite nnU-Net: Isensee, Jaeger, Kohl, Petersen, Maier-Hein. nnU-Net: a
self-configuring method for deep learning-based biomedical image segmentation. Nature Methods 18,
203-211 (2021).
{_RULE}
"""


def log_file_name(now: datetime) -> str:
    """Return the name of the log of a training that starts now."""
    return f"training_log_{now.year}_{now.month}_{now.day}_{now.hour:02}_{now.minute:02}_{now.second:02}.txt"


def format_log_line(arguments: tuple, now: datetime | None) -> str:
    """Join the arguments of a log call into a printable line.

    Each is followed by a space; the time comes first, if there is one.
    """
    words = printable("".join(f"{argument} " for argument in arguments), lines=True)
    return words if now is None else f"{now}: {words}"


def append_to_log(path: Path, text: str, *, header: str) -> None:
    """Append a line to a log; a new file begins with `header`.

    Network disks may fail for a moment: it is tried several times.

    Raises:
        OSError: The last attempt failed too.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with naming(path), path.open("a", encoding="utf-8") as file:
                file.write(f"{header}\n{text}\n" if file.tell() == 0 else f"{text}\n")
            return
        except OSError:
            if attempt == ATTEMPTS:
                raise
            time.sleep(PAUSE_S)
