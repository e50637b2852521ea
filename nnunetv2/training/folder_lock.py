"""Keep two trainings from writing into one folder."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nnunetv2.utilities.file_lock import lock_file

logger = logging.getLogger(__name__)

LOCK_FILE = ".training.lock"


class FolderInUseError(RuntimeError):
    """Another process trains into the same folder."""


@contextmanager
def training_in(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a folder while training into it.

    The lock ends with the process, however that ends.

    Where the operating system or the file system knows no locks, nothing is held.

    Raises:
        FolderInUseError: Another process trains there; the message says which.
    """
    path = Path(folder) / LOCK_FILE
    descriptor = _lock(path)
    try:
        yield
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)
            os.close(descriptor)


def _lock(path: Path) -> int | None:
    """Create and lock the file; return its descriptor, or None where there are no locks."""
    if os.name == "nt":  # where a file that is open cannot be removed
        return None
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            lock_file(descriptor)
        except BlockingIOError as error:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip()
            os.close(descriptor)
            raise FolderInUseError(
                f"another training writes into {path.parent} already ({holder or 'unknown process'}); two would "
                "overwrite each other's checkpoints. Stop one of them"
            ) from error
        except OSError as error:  # some network file systems
            logger.debug("cannot lock %s: %s", path, error)
            os.close(descriptor)
            return None
        if _is_still(path, descriptor):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return descriptor
        os.close(descriptor)  # its holder has removed the file between our opening and our locking it


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
