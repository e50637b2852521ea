"""Back up a federation at work into one file, and restore it.

    nnUNetv2_fed_admin --folder F backup FILE         nnUNetv2_fed_admin restore FILE FOLDER

A backup is a tar file: the database as it was at one moment, every document that its rows speak of and that may still
be asked for, the models, the keys of TLS, and last `backup.json` with the SHA-256 of each. Documents never change once
a row speaks of them, so they are linked at once and copied at leisure. A backup holds the same secrets as the folder:
keep it as safe.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from nnunetv2.federated.coordinator.storage import audit_log
from nnunetv2.federated.coordinator.storage.read_only import DATABASE_FILE, open_read_only, read_log
from nnunetv2.federated.errors import FederationError

VERSION = 1
CONTENTS_FILE = "backup.json"
LARGEST_CONTENTS = 256 << 20
FURTHER_FOLDERS = ("models", "tls", "given")
"""Folders beside the database and the documents."""
ATTEMPTS = 10
"""A document may be deleted, because its round has been closed, between the copy of the database and its link."""
_SCRATCH = ".backup-"
_RESTORED = ".restored-"
_LEFT_BEHIND_S = 86_400.0
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Backup:
    """The content that was saved or restored."""

    federation: str
    created: float
    """Seconds since 1970 at which the database was copied."""
    files: Mapping[str, str]
    """Path in the folder -> SHA-256."""


class _DeletedError(Exception):
    """A document has gone since the database was copied."""


# ------------------------------------------------------------------------------------------------------------ backup
def backup(folder: Path, target: Path) -> Backup:
    """Write a consistent copy of a federation, verified by digest, to a file.

    Raises:
        FederationError: The folder holds no federation, or a document in it is damaged.
        FileExistsError: The file exists.
    """
    from nnunetv2.utilities.atomic_write import replacing

    if target.exists():
        raise FileExistsError(f"{target} exists: choose another name, so that an older backup stays what it is")
    _remove_leftovers(folder, _SCRATCH)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder) as name:
        scratch = Path(name)
        created, digests = _collect(folder, scratch)
        with replacing(target) as partial:
            partial.touch(mode=0o600)
            with tarfile.open(partial, "w") as archive:
                files = {path: _add(archive, scratch, path, digests.get(path)) for path in _files_below(scratch)}
                saved = Backup(_federation_of(scratch), created, files)
                _add_contents(archive, saved)
    return saved


def _collect(folder: Path, scratch: Path) -> tuple[float, dict[str, str]]:
    """Gather all files of one moment in `scratch`; return that moment, and the digests that the database knows."""
    for _ in range(ATTEMPTS):
        created = time.time()
        with open_read_only(folder) as connection, closing(sqlite3.connect(scratch / DATABASE_FILE)) as copy:
            connection.backup(copy)
        try:
            with closing(sqlite3.connect(scratch / DATABASE_FILE)) as copy:
                digests = dict(_documents(copy))
            for path in digests:
                _link(folder / path, scratch / path)
        except _DeletedError:
            shutil.rmtree(scratch / "gatherings", ignore_errors=True)
            continue
        for part in FURTHER_FOLDERS:
            for path in _files_below(folder / part):
                _link(folder / part / path, scratch / part / path)
        return created, digests
    raise FederationError(
        f"the documents of {folder} have changed {ATTEMPTS} times while they were listed: try again "
        "when less is going on, or pause the run for a moment (nnUNetv2_fed_admin pause RUN)"
    )


def _documents(database: sqlite3.Connection) -> Iterator[tuple[str, str]]:
    """Yield path and SHA-256 of every document that may be asked for again."""
    from nnunetv2.federated.coordinator.storage.store import contribution_name, result_name
    from nnunetv2.federated.exchanges.steps import parse_key, step_of

    closed = {
        parse_key(key)
        for key, outcome in database.execute("SELECT key, outcome FROM gatherings")
        if outcome is not None and json.loads(outcome)["closed"]
    }
    gone = {
        str(key) for key in closed if step_of(key).policy.first_stays and (step_of(key).used_by(key) or key) in closed
    }
    for key, site, digest in database.execute("SELECT key, site, digest FROM contributions ORDER BY key, site"):
        if key not in gone:
            yield f"gatherings/{key}/{contribution_name(site, digest)}", digest
    for key, subset, digest in database.execute("SELECT key, subset, digest FROM results ORDER BY key, subset"):
        yield f"gatherings/{key}/{result_name(subset)}", digest


def _link(source: Path, target: Path) -> None:
    """Link a file, or copy it where the file system has no hard links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        try:
            os.link(source, target)
        except FileNotFoundError:
            raise
        except OSError:
            shutil.copyfile(source, target)
    except FileNotFoundError as error:
        raise _DeletedError(source) from error


def _add(archive: tarfile.TarFile, scratch: Path, path: str, expected: str | None) -> str:
    """Add a file and return its SHA-256, checked against the database's."""
    information = tarfile.TarInfo(path)
    information.size, information.mode = (scratch / path).stat().st_size, 0o600
    with (scratch / path).open("rb") as file:
        reader = _HashingReader(file)
        archive.addfile(information, reader)
    digest = reader.digest.hexdigest()
    if expected not in (None, digest):
        raise FederationError(f"{path} is damaged: its SHA-256 is not the one that was written down when it came")
    return digest


def _add_contents(archive: tarfile.TarFile, saved: Backup) -> None:
    content = json.dumps(
        {"version": VERSION, "federation": saved.federation, "created": saved.created, "files": dict(saved.files)},
        indent=1,
    ).encode()
    information = tarfile.TarInfo(CONTENTS_FILE)
    information.size, information.mode = len(content), 0o600
    archive.addfile(information, io.BytesIO(content))


class _HashingReader:
    """A file that is hashed while it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """Read the next bytes."""
        piece = self._file.read(size)
        self.digest.update(piece)
        return piece


def _files_below(folder: Path) -> list[str]:
    """List the complete files below a folder, with slashes, in order."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in found if not any(part.startswith(".partial-") for part in path.parts))


def _federation_of(folder: Path) -> str:
    with closing(sqlite3.connect(folder / DATABASE_FILE)) as database:
        row = database.execute("SELECT value FROM meta WHERE name = 'settings'").fetchone()
    if row is None:
        raise FederationError(f"{folder} holds no federation yet")
    return str(json.loads(row[0])["federation"])


def _remove_leftovers(folder: Path, prefix: str) -> None:
    """Remove the scratch folders that killed commands left a day ago."""
    for scratch in folder.glob(f"{glob.escape(prefix)}*"):
        if time.time() - scratch.stat().st_mtime > _LEFT_BEHIND_S:
            shutil.rmtree(scratch, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------- restore
def restore(source: Path, folder: Path) -> Backup:
    """Restore a folder from a backup, and verify every file before it appears.

    Raises:
        FederationError: The file is no backup, is damaged, or the folder is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FederationError(f"{folder} is not empty: a federation is restored into a folder of its own")
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{_RESTORED}{folder.name}-"
    _remove_leftovers(folder.parent, prefix)
    scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        restored = _unpack(source, scratch)
        _check(scratch, restored)
        if folder.exists():
            folder.rmdir()
        scratch.replace(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return restored


def _unpack(source: Path, scratch: Path) -> Backup:
    digests: dict[str, str] = {}
    try:
        with tarfile.open(source, "r:") as archive:
            for member in archive:
                if member.name == CONTENTS_FILE:
                    contents = _read_contents(archive, member)
                    break
                digests[member.name] = _extract(archive, member, scratch, digests)
            else:
                raise FederationError(f"{source} is cut off, or no backup of a federation: {CONTENTS_FILE} is missing")
    except (tarfile.TarError, EOFError) as error:
        raise FederationError(f"{source} is damaged, or no backup of a federation: {error}") from error
    different = sorted({*digests.items()} ^ {*contents.files.items()})
    if different:
        raise FederationError(f"{source} is damaged: {different[0][0]} is not what was saved")
    return contents


def _read_contents(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Backup:
    if member.size > LARGEST_CONTENTS:
        raise FederationError(f"{CONTENTS_FILE} is too large")
    try:
        file = archive.extractfile(member)
        if file is None:
            raise FederationError(f"{CONTENTS_FILE} cannot be read: it is no file")
        content = json.loads(file.read())
        version = content["version"]
        saved = Backup(str(content["federation"]), float(content["created"]), dict(content["files"]))
    except (ValueError, KeyError, TypeError) as error:
        raise FederationError(f"{CONTENTS_FILE} cannot be read: {error}") from error
    if version != VERSION:
        raise FederationError(f"this is a backup of version {version}, which this program does not know")
    return saved


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, scratch: Path, known: Mapping[str, str]) -> str:
    """Write one file, and return its SHA-256."""
    path = PurePosixPath(member.name)
    is_safe = path.parts and not path.is_absolute() and ".." not in path.parts and not set(member.name) & set("\\:\0")
    if not member.isreg() or not is_safe or member.name in known:
        raise FederationError(f"{member.name!r} does not belong into a backup")
    digest = hashlib.sha256()
    target = scratch / path
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    content = archive.extractfile(member)
    assert content is not None  # only members that are no regular files have none
    with content as file, target.open("xb") as out:
        target.chmod(0o600)
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
            out.write(piece)
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()


def _check(folder: Path, restored: Backup) -> None:
    """Raise FederationError unless the database is whole and every document that it speaks of is there."""
    if DATABASE_FILE not in restored.files:
        raise FederationError(f"there is no {DATABASE_FILE} in the backup")
    with closing(sqlite3.connect(folder / DATABASE_FILE)) as database:
        try:
            if database.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:
                raise FederationError(f"{DATABASE_FILE} in the backup is damaged")
            documents = dict(_documents(database))
            broken = audit_log.first_break(read_log(database))
        except sqlite3.Error as error:
            raise FederationError(f"{DATABASE_FILE} in the backup cannot be read: {error}") from error
    for path, digest in documents.items():
        if restored.files.get(path) != digest:
            raise FederationError(f"{path} is missing in the backup, or is not what the database says")
    if broken is not None:
        raise FederationError(f"the audit log in the backup is broken: {broken.reason}")
