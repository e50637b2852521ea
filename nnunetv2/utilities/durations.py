"""Write durations for people."""

from __future__ import annotations

_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def format_duration(seconds: float) -> str:
    """Return a duration in its largest unit, and the next one while it is below 10: `1 h 12 min`, `25 min`, `40 s`."""
    seconds = max(0, round(seconds))
    index = next((index for index, (size, _) in enumerate(_UNITS) if seconds >= size), len(_UNITS) - 1)
    size, unit = _UNITS[index]
    count, rest = divmod(seconds, size)
    if index + 1 == len(_UNITS) or count >= 10 or rest < _UNITS[index + 1][0]:
        return f"{count} {unit}"
    smaller, smaller_unit = _UNITS[index + 1]
    return f"{count} {unit} {rest // smaller} {smaller_unit}"
