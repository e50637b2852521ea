"""Append to and verify the audit log, whose lines are chained by hashes.

The hash of a line is the SHA-256 of the hash before it and of the line's content. Whoever changes, removes or inserts a
line in the middle breaks the chain; whoever cuts off its end is found out by a hash that was noted elsewhere, such as
on paper or in a mail to the sites.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

START = "0" * 64
"""What stands in for the hash before the first line."""
LOGGED_CHARACTERS = 1000
"""Of a text that a site is the cause of, written as JSON: why it failed, or why it was refused. Lines stay for good."""
LINES = "SELECT number, time, kind, site, key, detail, hash FROM events"
"""Query of the lines as they are chained; the detail is JSON text."""
Row = tuple[int, float, str, str | None, str | None, str, str]
"""Number, time, kind, site, key, detail and hash of a line."""


@dataclass(frozen=True)
class Event:
    """One line of the audit log."""

    time: float
    """Seconds since 1970, by the coordinator's clock."""
    kind: str
    """For example join, contribution, closing, failure, refusal, model, control, revocation."""
    site: str | None
    """Who did it: a site, an observer or an operator; None for the coordinator itself."""
    key: str | None
    """The exchange or run that it was about."""
    detail: Mapping[str, Any]


@dataclass(frozen=True)
class Broken:
    """The first line at which a chain does not hold."""

    number: int
    reason: str


def add_event(connection: sqlite3.Connection, event: Event) -> None:
    """Append a line, inside the caller's transaction."""
    last = connection.execute("SELECT number, hash FROM events ORDER BY number DESC LIMIT 1").fetchone() or (0, START)
    row = (last[0] + 1, float(event.time), event.kind, event.site, event.key, json.dumps(event.detail))
    connection.execute(
        "INSERT INTO events (number, time, kind, site, key, detail, hash) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (*row, chained_hash(last[1], row)),
    )


def chained_hash(before: str, row: tuple[object, ...]) -> str:
    """Return the hash of a line, given the one before.

    A line is number, time, kind, site, key, detail.
    """
    return hashlib.sha256(f"{before}\n{json.dumps(row)}".encode()).hexdigest()


def first_break(rows: Iterable[Row]) -> Broken | None:
    """Return where the chain of a log's lines is broken, or None."""
    before, expected = START, 1
    for *row, digest in rows:
        if row[0] != expected:
            return Broken(expected, f"line {expected} is missing")
        if chained_hash(before, tuple(row)) != digest:
            return Broken(expected, f"line {expected} has been changed, or the line before it")
        before, expected = digest, expected + 1
    return None


def chain_all(connection: sqlite3.Connection) -> None:
    """Number and chain the lines of a log that was kept without hashes."""
    before = START
    rows = connection.execute("SELECT number, time, kind, site, key, detail FROM events ORDER BY number").fetchall()
    for number, row in enumerate(rows, start=1):
        before = chained_hash(before, (number, *row[1:]))
        connection.execute("UPDATE events SET number = ?, hash = ? WHERE number = ?", (number, before, row[0]))
