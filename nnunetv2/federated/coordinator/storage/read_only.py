"""Open the database of a federation for reading only.

Looking at a log changes nothing, not even in a folder that was restored.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nnunetv2.federated.coordinator.storage import audit_log
from nnunetv2.federated.errors import FederationError

DATABASE_FILE = "coordinator.sqlite"


@contextmanager
def open_read_only(folder: Path) -> Iterator[sqlite3.Connection]:
    """Open the database of a federation so that nothing in its folder changes.

    Raises:
        FederationError: The folder holds no federation, or one that is written in another way.
    """
    path = folder / DATABASE_FILE
    if not path.is_file():
        raise FederationError(f"{folder} holds no federation: there is no {DATABASE_FILE}. Name its folder (--folder)")
    # Without a journal beside it, nobody is writing, and SQLite need not make the files that writers share.
    is_at_rest = not path.with_name(f"{DATABASE_FILE}-wal").exists()
    mode = "mode=ro&immutable=1" if is_at_rest else "mode=ro"
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?{mode}", uri=True, timeout=10.0)
        try:
            yield connection
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise FederationError(
            f"{path} cannot be read as the database of a federation: {error}. If its coordinator is "
            "of an older version, start it once with this one"
        ) from error


def read_log(connection: sqlite3.Connection) -> Iterator[audit_log.Row]:
    """Yield the lines of a log in order, as `audit_log.LINES` has them."""
    yield from connection.execute(f"{audit_log.LINES} ORDER BY number")
