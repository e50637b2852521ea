"""The findings of a hospital's check, with a sentence and a remedy each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nnunetv2.utilities.plain_text import printable

State = Literal["ok", "note", "warning", "problem"]

_MARKS: dict[State, str] = {"ok": "ok", "note": "note", "warning": "WARNING", "problem": "PROBLEM"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    area: str
    """Part of the site: line, machine, data, permission or training."""
    name: str
    """Of the finding, for programs; it does not change between versions."""
    state: State
    """In order; not known or not needed; worth a look; in the way of a federation."""
    sentence: str
    remedy: str = ""
    """Empty where nothing is to be done."""

    def as_json(self) -> dict[str, str]:
        """Return it for `--json`."""
        return {
            "area": self.area,
            "name": self.name,
            "state": self.state,
            "sentence": self.sentence,
            "remedy": self.remedy,
        }


def describe(findings: Sequence[Finding], forecast: Sequence[str], *, seconds: float) -> Iterator[str]:
    """Yield the lines that people read: findings by area, remedies below, then the forecast."""
    area = ""
    for finding in findings:
        if finding.area != area:
            area = finding.area
            yield ""
            yield area.capitalize()
        yield printable(f"  {_MARKS[finding.state]:8} {finding.sentence}")
        if finding.remedy:
            yield printable(f"  {'':8} -> {finding.remedy}")
    if forecast:
        yield ""
        yield "Forecast"
        yield from (printable(f"  {line}") for line in forecast)
    yield ""
    yield f"{summarise(findings)} ({seconds:.0f} s)"


def summarise(findings: Sequence[Finding]) -> str:
    """Return one line on all findings."""
    counts = Counter(finding.state for finding in findings)
    parts = [
        f"{number} {noun}{'' if number == 1 else 's'}"
        for number, noun in ((counts["problem"], "problem"), (counts["warning"], "warning"))
        if number
    ]
    return "; ".join([*([" and ".join(parts)] if parts else []), f"{counts['ok']} in order"])


def has_problem(findings: Sequence[Finding]) -> bool:
    """Tell whether something is in the way of a federation."""
    return any(finding.state == "problem" for finding in findings)


def to_json(findings: Sequence[Finding], forecast: dict[str, Any], *, seconds: float) -> dict[str, Any]:
    """Return all of it for programs."""
    return {
        "version": 1,
        "in_order": not has_problem(findings),
        "seconds": round(seconds, 1),
        "findings": [finding.as_json() for finding in findings],
        "forecast": forecast,
    }
