"""Write files for their owner only, and let one process at a time change them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nnunetv2.federated.errors import FederationError
from nnunetv2.utilities.atomic_write import flush_to_disk, replacing
from nnunetv2.utilities.file_lock import lock_file

LOCK_PATIENCE_S = 60.0
"""The holder of the lock writes a small file: only a stopped process takes longer."""


def write_private(path: Path, content: bytes) -> None:
    """Write a file atomically and durably, for its owner only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    flush_to_disk(path.parent)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, made if it is not there, against other processes and threads.

    Where the file system knows no locks, nothing is held.

    Raises:
        FederationError: Somebody else has held it for a minute.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _wait_for(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def _wait_for(descriptor: int, path: Path) -> None:
    deadline = time.monotonic() + LOCK_PATIENCE_S
    with suppress(OSError):  # some network file systems
        while True:
            try:
                return lock_file(descriptor)
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise FederationError(
                        f"{path} has been held by another process for {LOCK_PATIENCE_S:g} s: end that one"
                    ) from error
                time.sleep(0.02)
