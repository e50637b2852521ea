"""Findings of the integrity check, and the table that shows them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nnunetv2.utilities.plain_text import printable

ROWS_PER_KIND = 10
"""Rows shown of each kind of finding. A fault of all cases must not push the others off the screen."""

_HEADINGS = ("CASE", "FILE", "FOUND", "EXPECTED")
_CELL_WIDTH = 90


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or looks wrong, with a dataset.

    Findings of equal `what` and `remedy` are of one kind and shown together.
    """

    case: str
    """Empty if it concerns the dataset as a whole."""
    file: str
    """Relative to the dataset's folder where it lies in it."""
    what: str
    found: str
    expected: str
    remedy: str
    is_error: bool = True
    """Errors fail the check, warnings do not."""

    def __str__(self) -> str:
        place = ", ".join(part for part in (self.case, self.file) if part)
        details = ", ".join(
            part
            for part in (
                f"found {self.found}" if self.found else "",
                f"expected {self.expected}" if self.expected else "",
            )
            if part
        )
        return f"{place}: {self.what}" + (f" ({details})" if details else "") + f". Remedy: {self.remedy}"


def format_findings(title: str, findings: Sequence[Finding], *, rows_per_kind: int = ROWS_PER_KIND) -> str:
    """Lay out findings as one small table per kind, each with its remedy; printable."""
    kinds: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        kinds.setdefault((finding.what, finding.remedy), []).append(finding)
    lines = [title]
    for number, ((what, remedy), members) in enumerate(kinds.items(), start=1):
        times = f" ({len(members)} times)" if len(members) > 1 else ""
        lines += ["", f"{number}. {what[:1].upper()}{what[1:]}{times}"]
        lines += _format_rows(sorted(members, key=lambda member: (member.case, member.file)), rows_per_kind)
        lines.append(f"   Remedy: {remedy}.")
    return "\n".join(map(printable, lines))


def count(number: int, noun: str) -> str:
    """Return "1 case", "2 cases"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def enumerate_some(values: Iterable[object], at_most: int = 10) -> str:
    """Return the first values as text, with commas, and how many there are besides."""
    texts = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    more = f" and {len(texts) - at_most} more" if len(texts) > at_most else ""
    return ", ".join(texts[:at_most]) + more


def _format_rows(findings: Sequence[Finding], at_most: int) -> list[str]:
    rows = [(f.case, f.file, _shorten(f.found), _shorten(f.expected)) for f in findings[:at_most]]
    # a column in which no row says anything is left out
    shown = [column for column in zip(_HEADINGS, *rows) if any(column[1:])]
    widths = [max(map(len, column)) for column in shown]
    lines = [("   " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths))).rstrip() for row in zip(*shown)]
    return lines + ([f"   ... and {len(findings) - at_most} more"] if len(findings) > at_most else [])


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _CELL_WIDTH else f"{text[: _CELL_WIDTH - 4]} ..."
