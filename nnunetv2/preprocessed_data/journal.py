"""Remember which cases of a preprocessed folder are finished.

An interrupted run goes on where it was.

Beside a folder such as `nnUNetPlans_3d_fullres` lies the journal `.nnUNetPlans_3d_fullres.finished.jsonl`: not in the
folder, where nnU-Net takes every file for part of a case. Its first line names the ingredients of the run, each further
one a finished case with the files it came from and the files it became:

    {"format": 2, "made_from": {"plans": "9f...", "dataset.json": "c0...", "code": "11..."}}
    {"case": "liver_0", "sources": [["/raw/imagesTr/liver_0_0000.nrrd", 13922, 1790, 1795, "5e..."]], "outputs": [...]}

A case counts as finished only while all of that is still so. Of a source file the journal holds size, time of
modification, time of any change (ctime), and a digest. Anybody can set the former time, and archives do; nobody the
latter. A file of which only the latter differs is read again, and counts if its digest is the same. Lines are appended
once the files are complete, and the last one of a case holds; half a line at the end, left by a killed run, is cut off.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from nnunetv2.errors import FolderInUseError
from nnunetv2.utilities.file_lock import lock_file

logger = logging.getLogger(__name__)

FORMAT = 2
_OUTPUT_ENDINGS = (".b2nd", "_seg.b2nd", ".pkl", ".npz", ".npy", "_seg.npy")
_BYTES_AT_ONCE = 1 << 20
FileState = list
"""Name, bytes, time of modification in ns."""


class PreprocessingJournal:
    """The journal of a folder, for the length of a run.

    No other run can open it meanwhile.

    Args:
        folder: Of preprocessed cases; created if it does not exist.
        made_from: Names and digests of the cases' ingredients beside their own files. If the journal has others, the
            folder is emptied.

    Raises:
        FolderInUseError: Another run is writing to the folder.
    """

    def __init__(self, folder: Path, made_from: Mapping[str, str]):
        self._folder = folder
        self._made_from = dict(made_from)

    def __enter__(self) -> PreprocessingJournal:
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        self._file = journal_path(self._folder).open("a+b")
        try:
            _lock(self._file, self._folder)
            self._cases = self._read_or_start_anew()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def remaining(self, sources: Mapping[str, Iterable[str]]) -> list[str]:
        """Return the cases that are to be done, in order.

        All that is of no finished case is removed from the folder.

        Args:
            sources: Case -> its files.
        """
        finished = {case for case, files in sources.items() if self._is_finished(case, list(files))}
        kept = {name for case in finished for name, *_ in self._cases[case]["outputs"]}
        for entry in list(self._folder.iterdir()):
            if entry.name not in kept:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        return [case for case in sources if case not in finished]

    def add(self, case: str, sources: Iterable[str]) -> None:
        """Note that all files of a case are complete."""
        outputs = [state for ending in _OUTPUT_ENDINGS if (state := _state(self._folder / f"{case}{ending}"))]
        entry = {
            "case": case,
            "sources": [_state_with_digest(Path(file)) for file in sources],
            "outputs": [[Path(path).name, *rest] for path, *rest in outputs],
        }
        self._note(entry)

    def _is_finished(self, case: str, sources: Sequence[str]) -> bool:
        entry = self._cases.get(case)
        # Cases in the format of a user are not among the outputs we know, and are done again.
        return (
            bool(entry and entry["outputs"])
            and all(
                [name, *(_state(self._folder / name) or [""])[1:]] == [name, *rest] for name, *rest in entry["outputs"]
            )
            and self._are_same(entry, sources)
        )

    def _are_same(self, entry: dict, sources: Sequence[str]) -> bool:
        """Tell whether a case's sources are unchanged; note new times of change."""
        now = [_refreshed(Path(file), before) for file, before in zip(sources, entry["sources"])]
        if len(sources) != len(entry["sources"]) or [_content(state) for state in now] != [
            _content(state) for state in entry["sources"]
        ]:
            return False
        if now != entry["sources"]:
            self._note({**entry, "sources": now})
        return True

    def _note(self, entry: dict) -> None:
        self._append(entry)
        self._cases[entry["case"]] = entry

    def _read_or_start_anew(self) -> dict[str, dict]:
        self._file.seek(0)
        header, *entries = _read_lines(self._file) or [None]
        if header == self._header() and self._folder.is_dir():
            return {entry["case"]: entry for entry in entries}
        if header is not None and self._folder.is_dir():
            logger.info("%s is made anew: %s", self._folder.name, _difference(header, self._made_from))
        self._file.truncate(0)  # first, or a killed run would leave a journal of cases that are gone
        os.fsync(self._file.fileno())
        if self._folder.is_dir():
            shutil.rmtree(self._folder)
        self._folder.mkdir()
        self._append(self._header())
        return {}

    def _header(self) -> dict:
        return {"format": FORMAT, "made_from": self._made_from}

    def _append(self, entry: dict) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def read_header(folder: Path) -> dict | None:
    """Return the ingredients in the header of a folder's journal, or None."""
    try:
        with journal_path(folder).open("rb") as file:
            header = json.loads(file.readline())
    except (FileNotFoundError, ValueError):
        return None
    return header if isinstance(header, dict) else None


def journal_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.finished.jsonl")


def _read_lines(file: IO[bytes]) -> list[dict]:
    """Return the complete lines, and cut off the rest."""
    lines, end = [], 0
    for line in file:
        try:
            if not line.endswith(b"\n"):
                break
            lines.append(json.loads(line))
        except ValueError:
            break
        end += len(line)
    file.truncate(end)
    return lines


def _difference(header: dict, made_from: Mapping[str, str]) -> str:
    before = header.get("made_from", {}) if isinstance(header, dict) else {}
    changed = [name for name, digest in made_from.items() if before.get(name) != digest]
    return f"{' and '.join(changed) or 'the format of the journal'} changed since the earlier run"


def _state(file: Path) -> FileState | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return [str(file), found.st_size, found.st_mtime_ns]


def _state_with_digest(file: Path) -> FileState | None:
    """Return the state of a file with its time of any change in ns and a digest, or None if there is none."""
    try:
        return [*_state(file), file.stat().st_ctime_ns, _digest(file)]
    except (OSError, TypeError):
        return None


def _refreshed(file: Path, before: FileState | None) -> FileState | None:
    """Return the state of a file with a digest, which is taken from an earlier state if nothing changed since."""
    state = _state(file)
    if state is None or before is None or state != before[:3]:
        return state
    try:
        changed = file.stat().st_ctime_ns
    except OSError:
        return None
    return before if changed == before[3] else _state_with_digest(file)


def _content(state: FileState | None) -> FileState | None:
    """Return a state without the time of any change."""
    return state and [*state[:3], *state[4:]]


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_BYTES_AT_ONCE):
            digest.update(chunk)
    return digest.hexdigest()


def _lock(file: IO[bytes], folder: Path) -> None:
    """Keep other runs away until the file is closed, also by the death of this process. Not on Windows."""
    if os.name == "nt":
        return
    try:
        lock_file(file.fileno())
    except BlockingIOError as error:
        raise FolderInUseError(
            f"another process is preprocessing into {folder}; wait for it, or stop it first"
        ) from error
    except OSError as error:  # some network file systems have no locks
        logger.debug("cannot lock the journal of %s: %s", folder, error)
