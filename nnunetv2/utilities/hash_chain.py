"""Chain lines by hashes, and find the first one that does not hold.

The hash of a line is the SHA-256 of the hash before it and of the line's content. Changing, removing or inserting a
line in the middle breaks the chain; a hash that was noted elsewhere shows whether its end was cut off.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

START = "0" * 64
"""Stands in for the hash before the first line."""


@dataclass(frozen=True)
class Broken:
    """The first line at which a chain does not hold."""

    number: int
    reason: str


def chained_hash(before: str, row: tuple[object, ...]) -> str:
    """Return the hash of a line, its number first, given the one before."""
    return hashlib.sha256(f"{before}\n{json.dumps(row)}".encode()).hexdigest()


def first_break(rows: Iterable[tuple[Any, ...]]) -> Broken | None:
    """Return where the chain of lines is broken, or None.

    Args:
        rows: Lines, each with its number first and its hash last.
    """
    before, expected = START, 1
    for *row, digest in rows:
        if row[0] != expected:
            return Broken(expected, f"line {expected} is missing")
        if chained_hash(before, tuple(row)) != digest:
            return Broken(expected, f"line {expected} has been changed, or the line before it")
        before, expected = digest, expected + 1
    return None
