"""Write durations and moments for people."""

from __future__ import annotations

import time

_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))
_ENDLESS_S = 1e12
"""Nothing lasts so long; a broken coordinator may say so."""


def format_duration(seconds: float) -> str:
    """Return a duration in its largest unit, such as `1 h 12 min`.

    The next unit is added while it is below 10.
    """
    if not seconds < _ENDLESS_S:
        return "ages"
    seconds = max(0, round(seconds))
    index = next((index for index, (size, _) in enumerate(_UNITS) if seconds >= size), len(_UNITS) - 1)
    size, unit = _UNITS[index]
    count, rest = divmod(seconds, size)
    if index + 1 == len(_UNITS) or count >= 10 or rest < _UNITS[index + 1][0]:
        return f"{count} {unit}"
    smaller, smaller_unit = _UNITS[index + 1]
    return f"{count} {unit} {rest // smaller} {smaller_unit}"


def format_moment(seconds: float) -> str:
    """Return a time in seconds since 1970 as date and local time.

    One that no clock shows stays a number.
    """
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (OverflowError, OSError, ValueError):
        return f"{seconds:g} s after 1970"
