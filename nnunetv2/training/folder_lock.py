"""Keep two trainings from writing into one folder."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nnunetv2.utilities.atomic_write import remove_leftovers
from nnunetv2.utilities.file_lock import lock_file

logger = logging.getLogger(__name__)

LOCK_FILE = ".training.lock"


class FolderInUseError(RuntimeError):
    """Another process trains into the same folder."""


@dataclass(frozen=True)
class RunningTraining:
    """A training as the lock of its folder describes it."""

    holder: str
    """Process and machine, one line; empty where there are no locks."""
    refuses_to_stop: str = ""
    """Why it is not to be stopped on its own; empty if it may be."""


@contextmanager
def training_in(folder: str | os.PathLike[str], *, refuses_to_stop: str = "") -> Iterator[str]:
    """Hold a folder while training into it, and yield the name of the holder.

    The lock ends with the process, however that ends. Partial files of a killed training are removed.

    Where the operating system or the file system knows no locks, nothing is held, and the name is empty.

    Args:
        refuses_to_stop: Why nobody shall ask this training to stop, one line.

    Raises:
        FolderInUseError: Another process trains there; the message says which.
    """
    path = Path(folder) / LOCK_FILE
    descriptor = _lock(path)
    holder = ""
    if descriptor is None:
        remove_leftovers(folder)
    else:
        remove_leftovers(folder, older_than_s=0)
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{holder}\n{refuses_to_stop}\n".encode())
    try:
        yield holder
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)
            os.close(descriptor)


def find_training(folder: str | os.PathLike[str]) -> RunningTraining | None:
    """Return who trains into a folder, or None if nobody does.

    Where there are no locks, the writer of a lock file counts as a training.
    """
    try:
        descriptor = os.open(Path(folder) / LOCK_FILE, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        if os.name != "nt":
            lock_file(descriptor)
            return None
    except BlockingIOError:
        return _read(descriptor)
    except OSError as error:
        logger.debug("cannot lock the file %s of %s: %s", LOCK_FILE, folder, error)
    finally:
        os.close(descriptor)
    return RunningTraining("")


def _read(descriptor: int) -> RunningTraining:
    """Read a lock file, which another training may be about to write."""
    lines = os.read(descriptor, 2000).decode(errors="replace").splitlines()
    holder, refuses_to_stop = [*lines, "", ""][:2]
    return RunningTraining(holder.strip(), refuses_to_stop.strip())


def _lock(path: Path) -> int | None:
    """Create and lock the file; return its descriptor, or None where there are no locks."""
    if os.name == "nt":  # where a file that is open cannot be removed
        return None
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            lock_file(descriptor)
        except BlockingIOError as error:
            holder = _read(descriptor).holder
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
            return descriptor
        os.close(descriptor)  # its holder has removed the file between our opening and our locking it


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
