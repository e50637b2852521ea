"""Open, migrate and change the SQLite database of a federation."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnunetv2.federated.coordinator.storage import audit_log
from nnunetv2.federated.errors import FederationError

SCHEMA_VERSION = 2

_TABLES_1 = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE gatherings (
    key TEXT PRIMARY KEY,
    opened REAL NOT NULL,
    required TEXT NOT NULL,         -- JSON list of sites
    outcome TEXT                    -- JSON; NULL while open
) WITHOUT ROWID;
CREATE TABLE contributions (
    key TEXT NOT NULL, site TEXT NOT NULL, digest TEXT NOT NULL, size INTEGER NOT NULL, received REAL NOT NULL,
    PRIMARY KEY (key, site)
) WITHOUT ROWID;
CREATE TABLE results (
    key TEXT NOT NULL, subset TEXT NOT NULL, digest TEXT NOT NULL, PRIMARY KEY (key, subset)
) WITHOUT ROWID;
CREATE TABLE traffic (
    site TEXT NOT NULL, key TEXT NOT NULL, received INTEGER NOT NULL, sent INTEGER NOT NULL, last_seen REAL NOT NULL,
    PRIMARY KEY (site, key)
) WITHOUT ROWID;
"""
_EVENTS_1 = """
CREATE TABLE events (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    time REAL NOT NULL, kind TEXT NOT NULL, site TEXT, key TEXT, detail TEXT NOT NULL
);
"""
_TABLES_2 = """
CREATE TABLE members (
    name TEXT PRIMARY KEY,
    role TEXT NOT NULL,             -- site, observer or operator
    state TEXT NOT NULL,            -- invited, active or revoked
    token_hash TEXT,                -- NULL until the member has joined, and after it was revoked
    since REAL NOT NULL             -- of the state
) WITHOUT ROWID;
CREATE TABLE invitations (
    hash TEXT PRIMARY KEY,
    member TEXT NOT NULL,
    secret TEXT,                    -- in plain until it is used, expired or withdrawn, then NULL
    expires REAL NOT NULL,
    token_hash TEXT                 -- of the token that used it
) WITHOUT ROWID;
CREATE TABLE runs (run TEXT PRIMARY KEY, control TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE rounds (run TEXT NOT NULL, number INTEGER NOT NULL, record TEXT NOT NULL, PRIMARY KEY (run, number))
    WITHOUT ROWID;
CREATE TABLE validations (run TEXT NOT NULL, number INTEGER NOT NULL, record TEXT NOT NULL, PRIMARY KEY (run, number))
    WITHOUT ROWID;
"""
_EVENTS_2 = """
ALTER TABLE events ADD COLUMN hash TEXT NOT NULL DEFAULT '';
"""
_EVENTS_GUARD = """
CREATE TRIGGER events_stay BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
CREATE TRIGGER events_remain BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
"""
_ADDITIONS = """
CREATE INDEX IF NOT EXISTS events_of_kind ON events (kind);
CREATE TABLE IF NOT EXISTS identities (member TEXT PRIMARY KEY, identity TEXT NOT NULL) WITHOUT ROWID;
"""
"""They change no data: versions that do not know them go on as before."""
_SCHEMA = _TABLES_1 + _EVENTS_1 + _TABLES_2 + _EVENTS_2 + _EVENTS_GUARD

FOREVER = 4_000_000_000.0
"""Expiry, in seconds since 1970, of invitations that were made when invitations did not expire."""


class Database:
    """The database of one federation. Safe for use by several threads.

    Raises:
        FederationError: It was written by a version that this one does not know, or by another program.
        OSError: It cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()
        path.touch(mode=0o600)  # SQLite gives the files beside it the same mode
        path.chmod(0o600)
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            with _trouble_as_os_error():  # a disk that is full or read-only is no reason to restore a backup
                self._prepare()
        except sqlite3.DatabaseError as error:
            self.close()
            raise FederationError(
                f"{path} cannot be used: {error}. Restore a backup (nnUNetv2_fed_admin restore), or "
                "choose another folder"
            ) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run the block as one transaction, durable when the block has ended.

        Raises:
            OSError: The disk is full or broken; nothing has changed, and it can be tried again.
        """
        with self._lock, _trouble_as_os_error():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # SQLite has ended it already if the disk is full
                    self._connection.execute("ROLLBACK")
                raise

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Return the rows that a query finds."""
        with self._lock, _trouble_as_os_error():
            return self._connection.execute(query, values).fetchall()

    def first_rows(self, query: str, *values: object, characters: int, least: int) -> list[tuple[Any, ...]]:
        """Return the first rows of a query, bounded by characters, but `least`."""
        with self._lock, _trouble_as_os_error():
            found: list[tuple[Any, ...]] = []
            for row in self._connection.execute(query, values):
                characters -= len(row[-1])
                if characters < 0 and len(found) >= least:
                    break
                found.append(row)
            return found

    def _prepare(self) -> None:
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "secure_delete = ON", "busy_timeout = 10000"):
            self._connection.execute(f"PRAGMA {pragma}")
        version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            if self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise sqlite3.DatabaseError("it belongs to another program")
            self._connection.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version = {SCHEMA_VERSION};COMMIT;")
        elif version == 1:
            with self.transaction() as connection:
                _migrate_from_1(connection)
        elif version != SCHEMA_VERSION:
            raise FederationError(
                f"{self._path.parent} was written by another version of the coordinator (schema "
                f"{version}, not {SCHEMA_VERSION}): go on with that version, or use another folder"
            )
        self._connection.executescript(_ADDITIONS)


@contextmanager
def _trouble_as_os_error() -> Iterator[None]:
    """Translate SQLite's operational errors into OSError: sites then try again."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise OSError(f"the database of the federation: {error}") from error


def _migrate_from_1(connection: sqlite3.Connection) -> None:
    """Take over a federation of 2.8.1+fed.1: all members were sites, and events were not chained."""
    connection.execute("DROP TRIGGER events_stay")
    connection.execute("DROP TRIGGER events_remain")
    for statement in _statements(_TABLES_2 + _EVENTS_2):
        connection.execute(statement)
    connection.execute(
        "INSERT INTO members SELECT name, 'site', CASE WHEN token_hash IS NULL THEN 'invited' ELSE "
        "'active' END, token_hash, 0 FROM sites"
    )
    connection.execute(
        "INSERT INTO invitations SELECT invitation_hash, name, invitation, ?, token_hash FROM sites", (FOREVER,)
    )
    connection.execute("DROP TABLE sites")
    audit_log.chain_all(connection)
    for statement in _EVENTS_GUARD.strip().split("\n"):
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _statements(script: str) -> list[str]:
    return [statement for statement in script.split(";") if statement.strip()]
