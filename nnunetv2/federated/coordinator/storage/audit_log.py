"""Append to and verify the audit log, whose lines are chained by hashes.

See `utilities/hash_chain.py`. A hash may be noted on paper, say, or in a mail to the sites.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nnunetv2.utilities.hash_chain import START, Broken, chained_hash, first_break

__all__ = ["START", "Broken", "Event", "add_event", "chain_all", "chained_hash", "first_break"]

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


def add_event(connection: sqlite3.Connection, event: Event) -> None:
    """Append a line, inside the caller's transaction."""
    last = connection.execute("SELECT number, hash FROM events ORDER BY number DESC LIMIT 1").fetchone() or (0, START)
    row = (last[0] + 1, float(event.time), event.kind, event.site, event.key, json.dumps(event.detail))
    connection.execute(
        "INSERT INTO events (number, time, kind, site, key, detail, hash) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (*row, chained_hash(last[1], row)),
    )


def chain_all(connection: sqlite3.Connection) -> None:
    """Number and chain the lines of a log that was kept without hashes."""
    before = START
    rows = connection.execute("SELECT number, time, kind, site, key, detail FROM events ORDER BY number").fetchall()
    for number, row in enumerate(rows, start=1):
        before = chained_hash(before, (number, *row[1:]))
        connection.execute("UPDATE events SET number = ?, hash = ? WHERE number = ?", (number, before, row[0]))
