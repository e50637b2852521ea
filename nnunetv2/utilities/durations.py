"""Write durations and moments for people, and read durations that they type."""

from __future__ import annotations

import re
import time

_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))
_SECONDS = {"d": 86_400, "h": 3600, "m": 60, "min": 60, "s": 1}
_PART = r"(\d+(?:\.\d+)?)(d|h|min|m|s)"
_DURATION = re.compile(f"(?:{_PART})+")
_ENDLESS_S = 1e12
"""Nothing lasts so long; a broken coordinator may say so."""


def parse_duration(text: str) -> float:
    """Return the seconds of a duration such as `90m`, `1h30m` or `2d`.

    Raises:
        ValueError: It is none, or has no unit.
    """
    compact = text.replace(" ", "")
    if not _DURATION.fullmatch(compact):
        raise ValueError(f"{text!r} is no duration: expected numbers with units d, h, m or s, such as 90m or 1h30m")
    return sum(float(number) * _SECONDS[unit] for number, unit in re.findall(_PART, compact))


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
