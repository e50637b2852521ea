"""Keep partial uploads of broken connections, to be resumed at that byte.

There is one file per exchange and site. The newest request writes it: a connection that is half dead, and whose sender
has begun anew, finds that out at its next piece. A complete upload belongs to the request that has completed it: nobody
else touches it between its check and its place in the store.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from nnunetv2.federated.errors import RefusedError
from nnunetv2.utilities.early_writing import begin_writing

WORTH_KEEPING_BYTES = 1 << 20
"""Smaller uploads are sent again."""
KEPT_FOR_S = 2 * 86_400.0
WHOLE = ".whole"
"""Suffix of complete uploads; of the others, it is `.part`."""
KEPT_PER_SITE = 8
"""Uploads of one site that nobody goes on with at the moment."""
_READ_BYTES = 4 << 20


class PartialUploads:
    """The uploads that have begun, in a folder of their own. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._writers: dict[Path, PartialUpload] = {}
        self._being_stored: set[Path] = set()

    def offset(self, key: str, site: str, digest: str) -> int:
        """Return how many bytes of a document have arrived already."""
        path = self._path(key, site, digest)
        return path.stat().st_size if path.exists() else 0

    @contextmanager
    def writing(self, key: str, site: str, digest: str, *, offset: int) -> Iterator[PartialUpload]:
        """Resume an upload at a byte; its content stays if the block fails.

        Raises:
            RefusedError: Less than `offset` bytes are here, and the code is `wrong_offset`; or all of them came on
                another connection just now, and the code is `taken_over`.
        """
        path = self._path(key, site, digest)
        with self._lock:
            if path in self._being_stored:
                raise RefusedError(
                    "this document has arrived on another connection, and is being stored", code="taken_over"
                )
            self._remove_others(path)
            if offset > (path.stat().st_size if path.exists() else 0):
                raise RefusedError(f"the upload cannot go on at byte {offset}: less has arrived", code="wrong_offset")
            if path in self._writers:
                self._writers[path].close()  # waits for the piece that it is writing: it is the same file
            upload = self._writers[path] = PartialUpload(self, path, offset)
        try:
            yield upload
        finally:
            upload.close()
            with self._lock:
                if upload.is_complete:
                    self._being_stored.discard(path)
                if self._writers.get(path) is upload:
                    del self._writers[path]
                    if path.exists() and path.stat().st_size < WORTH_KEEPING_BYTES:
                        path.unlink()
                    self._make_room(site)

    def in_progress(self, key: str | None = None) -> dict[tuple[str, str], int]:
        """Return the uploads being received: (exchange's hash, site) -> bytes.

        Args:
            key: Only of this exchange.
        """
        wanted = None if key is None else _hash_of(key)
        found: dict[tuple[str, str], int] = {}
        for path, upload in list(self._writers.items()):
            exchange, site = path.name.split(".")[:2]
            if wanted in (None, exchange):
                found[exchange, site] = upload.size
        return found

    def is_writer(self, upload: PartialUpload) -> bool:
        """Return whether no newer request has taken over."""
        return self._writers.get(upload.path) is upload

    def complete(self, upload: PartialUpload) -> None:
        """Give a complete upload to the request that has completed it.

        Raises:
            RefusedError: A newer request has taken over; the code is `taken_over`.
        """
        with self._lock:
            if not self.is_writer(upload):
                raise _taken_over()
            path, upload.path = upload.path, upload.path.replace(upload.path.with_suffix(WHOLE))
            del self._writers[path]
            self._being_stored.add(path)

    def remove_old(self, now: float | None = None) -> None:
        """Remove uploads of two days ago, or complete and never stored.

        Those that are being written or stored stay.
        """
        latest = (time.time() if now is None else now) - KEPT_FOR_S
        with self._lock:
            in_use = {*self._writers, *(path.with_suffix(WHOLE) for path in self._being_stored)}
            for path in set(self._folder.iterdir()) - in_use:
                if path.suffix == WHOLE or path.stat().st_mtime < latest:
                    path.unlink()

    def _remove_others(self, path: Path) -> None:
        """Remove other documents of the same site for the same exchange."""
        for other in self._folder.glob(f"{path.name.rsplit('.', 2)[0]}.*.part"):
            if other != path:
                self._writers.pop(other, None)
                other.unlink()

    def _make_room(self, site: str) -> None:
        """Keep only the newest of a site's uploads that nobody writes."""
        left = [path for path in self._folder.glob(f"*.{site}.*.part") if path not in self._writers]
        for path in sorted(left, key=lambda path: path.stat().st_mtime)[:-KEPT_PER_SITE]:
            path.unlink()

    def _path(self, key: str, site: str, digest: str) -> Path:
        return self._folder / f"{_hash_of(key)}.{site}.{digest[:24]}.part"


class PartialUpload:
    """One request's hold on an upload."""

    def __init__(self, uploads: PartialUploads, path: Path, offset: int) -> None:
        self.path = path
        self.size = offset
        """Bytes that are here."""
        self.is_complete = False
        self._uploads = uploads
        self._lock = threading.Lock()
        self._file: FileIO | None = path.open("r+b" if path.exists() else "w+b", buffering=0)
        self._file.truncate(offset)
        self._file.seek(offset)
        self._begun = offset
        self._digest = hashlib.sha256()

    def read_beginning(self) -> None:
        """Hash the bytes that have arrived already, and go to their end.

        Raises:
            RefusedError: A newer request has taken over; the code is `taken_over`.
        """
        begin = 0
        while begin < self.size:
            with self._lock:  # per piece: a newer request waits for one of them, not for all
                if self._file is None:
                    raise _taken_over()
                self._file.seek(begin)
                piece = self._file.read(min(_READ_BYTES, self.size - begin))
            self._digest.update(piece)
            begin += len(piece)

    def append(self, *pieces: bytes | memoryview, hashed: bool = True) -> None:
        """Write the next pieces.

        Args:
            hashed: Whether to take them into the digest; not where a later request reads all of it.

        Raises:
            RefusedError: A newer request has taken over; the code is `taken_over`.
            OSError: The disk is full. The bytes written so far stay, and the upload can resume behind them.
        """
        with self._lock:
            if self._file is None or not self._uploads.is_writer(self):
                raise _taken_over()
            for piece in pieces:
                _write_all(self._file, piece)
                if hashed:
                    self._digest.update(piece)
                self.size += len(piece)
            self._begun = begin_writing(self._file, self._begun)

    def hexdigest(self) -> str:
        """Return the SHA-256 of everything up to here."""
        return self._digest.hexdigest()

    def complete(self) -> None:
        """Mark the upload as complete and verified: `path` is this request's alone.

        Raises:
            RefusedError: A newer request has taken over; the code is `taken_over`.
        """
        self.close()
        self._uploads.complete(self)
        self.is_complete = True

    def discard(self) -> None:
        """Remove the file: its content is of no use."""
        self.close()
        if self.is_complete or self._uploads.is_writer(self):
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file; its content stays."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None


def _taken_over() -> RefusedError:
    return RefusedError("this upload has been begun anew on another connection", code="taken_over")


def _write_all(file: FileIO, piece: bytes | memoryview) -> None:
    """Write all of a piece, in several writes where the disk fills up."""
    remaining = memoryview(piece)
    while len(remaining):
        remaining = remaining[file.write(remaining) :]


def _hash_of(key: str) -> str:
    """Return the hash that stands for an exchange in file names."""
    return hashlib.sha256(key.encode()).hexdigest()[:24]
