"""Tell the patient or group of each case, by its name or by a table."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

_SHOWN = 5
_MOST_SIBLINGS = 12
"""More scans of one patient are taken for cases of one hospital or one part of a dataset."""
_DELIMITERS = ",;\t"
_VISITS = (
    "scan|visit|session|ses|run|frame|frm|time|timepoint|tp|tpt|fu|follow-?up|baseline|bl|pre-?op|post-?op|pre|post|"
    "left|right|lt|rt|l|r|ed|es|v|t|phase|acq|repeat|rep|retest|test"
)
# From the surest on; the first that fits a name says how it is read.
_SIBLING_PATTERNS = (
    r"^(sub-[A-Za-z0-9]+)(?:_.*)?$",
    rf"(?i)^(.*\d.*?)(?:[_.\- ]|(?<=\d))(?:{_VISITS})[_.\-]?\d*$",
    r"^(.*\d)[_.\-]?[a-dA-D]$",
    r"^(.*\d.*)[_.\-]\d+$",
)


# ------------------------------------------------------------------------------------------------ rules and tables


def assign_patients(cases: Sequence[str], rule: str) -> dict[str, str]:
    """Return case -> patient, by a table or by a regular expression.

    A table is a path that exists or ends in .csv or .tsv.

    Raises:
        ValueError: The rule makes no sense, or some cases have no patient by it.
        FileNotFoundError: There is no such table.
    """
    if _is_table(rule):
        return read_table(Path(rule), cases, what="patient")
    return match_patients(cases, rule)


def _is_table(rule: str) -> bool:
    try:
        return rule.lower().endswith((".csv", ".tsv")) or Path(rule).is_file()
    except OSError:  # an expression longer than file names may be
        return False


def match_patients(cases: Sequence[str], pattern: str) -> dict[str, str]:
    """Return case -> patient by a regular expression.

    The group named `patient` counts, or the first group, or the whole match.

    Raises:
        ValueError: It is no regular expression, or some names do not match.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--patients {pattern!r} is neither a file nor a regular expression: {error}") from error
    group: str | int = "patient" if "patient" in expression.groupindex else min(expression.groups, 1)
    matches = {case: expression.search(case) for case in cases}
    without = [case for case, match in matches.items() if not match or not match[group]]
    if without:
        raise ValueError(
            f"--patients {pattern!r} names no patient for {len(without)} of {len(cases)} cases: {_some(without)}. "
            "Let the expression match every case, or give a table with the columns case and patient"
        )
    return {case: match[group] for case, match in matches.items() if match}


def read_table(
    file: Path, cases: Sequence[str], *, what: str, patients: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return case -> its patient or group by a table.

    The table has a line of headings. Columns are parted by commas, semicolons or tabulators. `what` is the column of
    that name, or the only one besides `case` (or `patient`). Cases that the dataset does not have are passed over.

    Args:
        what: The wanted column, "patient" or "group".
        patients: Case -> patient, where rows may be about patients.

    Raises:
        ValueError: A column is missing, a case has no row, or two that disagree.
        FileNotFoundError: There is no such table.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no table {file}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not encoded in UTF-8: {error}. Save it as CSV in UTF-8") from error
    try:
        headings, *rows = list(csv.reader(StringIO(text, newline=""), delimiter=_delimiter(text))) or [[]]
    except csv.Error as error:
        raise ValueError(f"{file} is no table in CSV: {error}. Save it as CSV in UTF-8") from error
    names = [heading.strip().lower() for heading in headings]
    key, value = _find_columns(file, names, what, may_be_patients=patients is not None)
    said: dict[str, str] = {}
    for line, row in enumerate(rows, start=2):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if len(cells) <= max(key, value) or not cells[key] or not cells[value]:
            raise ValueError(f"{file}, line {line}: {names[key]} or {names[value]} is empty")
        if said.setdefault(cells[key], cells[value]) != cells[value]:
            raise ValueError(
                f"{file}, line {line}: {names[key]} {cells[key]} is in {said[cells[key]]} and in {cells[value]}. "
                "Keep one of the lines"
            )
    keys = {case: patients[case] for case in cases} if patients and names[key] == "patient" else dict(zip(cases, cases))
    without = [case for case in cases if keys[case] not in said]
    if without:
        raise ValueError(
            f"{file} names no {what} for {len(without)} of {len(cases)} cases: {_some(without)}. Add a line for each"
        )
    return {case: said[keys[case]] for case in cases}


def _find_columns(file: Path, names: Sequence[str], what: str, *, may_be_patients: bool) -> tuple[int, int]:
    keys = ("case", "patient") if may_be_patients else ("case",)
    key = next((name for name in keys if name in names), None)
    others = [name for name in names if name and name not in ("case", "patient")] if what == "group" else [what]
    value = what if what in names else others[0] if len(others) == 1 and others[0] in names else None
    if key is None or value is None:
        raise ValueError(
            f"{file} has the columns {', '.join(filter(None, names)) or 'none'} in its first line; it needs "
            f"{' or '.join(keys)}, and {what}"
        )
    return names.index(key), names.index(value)


def _delimiter(text: str) -> str:
    first = text.splitlines()[0] if text.strip() else ""
    return max(_DELIMITERS, key=first.count)


# ------------------------------------------------------------------------------------------------ guesses


@dataclass(frozen=True)
class Siblings:
    """Cases whose names look like several scans of one patient."""

    patient: str
    cases: tuple[str, ...]
    pattern: str
    """The regular expression by which they do."""


def guess_siblings(cases: Iterable[str]) -> list[Siblings]:
    """Find names that look like several scans of one patient, such as `patient012_frame01` and `patient012_frame12`.

    Numbers alone say nothing (`liver_001`), nor does a beginning of more than twelve names, which is rather the name of
    a hospital.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for case in sorted(cases):
        for pattern in _SIBLING_PATTERNS:
            match = re.match(pattern, case)
            if match:
                found.setdefault((pattern, match[1]), []).append(case)
                break
    largest = dict.fromkeys(_SIBLING_PATTERNS, 0)
    patients_of = dict.fromkeys(_SIBLING_PATTERNS, 0)
    for (pattern, _), members in found.items():
        largest[pattern] = max(largest[pattern], len(members))
        patients_of[pattern] += 1
    by_number_alone = _SIBLING_PATTERNS[-1]
    return [
        Siblings(patient, tuple(members), pattern)
        for (pattern, patient), members in found.items()
        if len(members) > 1
        and largest[pattern] <= _MOST_SIBLINGS
        and (pattern != by_number_alone or patients_of[pattern] > 1)
    ]


def suggest_rule(siblings: Sequence[Siblings], cases: Sequence[str]) -> str | None:
    """Return the expression that finds all siblings, if it matches every case."""
    patterns = {one.pattern for one in siblings}
    pattern = next(iter(patterns)) if len(patterns) == 1 else None
    return pattern if pattern and all(re.match(pattern, case) for case in cases) else None


def _some(cases: Sequence[str]) -> str:
    return ", ".join(cases[:_SHOWN]) + (f" and {len(cases) - _SHOWN} more" if len(cases) > _SHOWN else "")
