"""Keep the state of a federation on the coordinator's disk: a SQLite database, and one file per document.

    coordinator.sqlite                               settings, sites, gatherings, contributions, results, events
    gatherings/<key>/<site>.<digest>.safetensors      contributions
    gatherings/<key>/result.safetensors               results, and result.<subset>.safetensors of single sites
    incoming/                                        uploads that are not complete; emptied at every start

A row is written after the file that it speaks of is on the disk, and nothing is acknowledged before its row is. Files
without a row are leftovers of a crash and are removed at the next start.
"""
from __future__ import annotations

import json
import os
import shutil
import sqlite3
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from nnunetv2.federated.bodies import FederationSettings
from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.rounds import Closed, Contribution, Gathering, GatheringKey, Refused, fresh_gathering, parse_key

SCHEMA_VERSION = 1
FULL_RESULT = ""
"""Name of the result that holds every tensor."""

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE sites (
    name TEXT PRIMARY KEY,
    invitation TEXT,                -- in plain until it is used, then NULL
    invitation_hash TEXT NOT NULL,
    token_hash TEXT                 -- NULL until the site has joined
) WITHOUT ROWID;
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
CREATE TABLE events (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    time REAL NOT NULL, kind TEXT NOT NULL, site TEXT, key TEXT, detail TEXT NOT NULL
);
CREATE TRIGGER events_stay BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
CREATE TRIGGER events_remain BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
"""


@dataclass(frozen=True)
class SiteRecord:
    """What is known of a site. Secrets are kept as SHA-256, except invitations that are still to be sent out."""

    name: str
    invitation: str | None
    invitation_hash: str
    token_hash: str | None


@dataclass(frozen=True)
class Event:
    """One line of the audit log."""

    time: float
    kind: str
    """join, contribution, closing, failure, refusal or model."""
    site: str | None
    key: str | None
    detail: Mapping[str, Any]


@dataclass(frozen=True)
class Traffic:
    """What a site has sent and been sent for one gathering ("" is everything else), and when it was last heard of."""

    received: int = 0
    """Bytes that the coordinator received."""
    sent: int = 0
    last_seen: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.received + other.received, self.sent + other.sent, max(self.last_seen, other.last_seen))


class Store:
    """The durable state of one federation. Safe for use by several threads; one process at a time.

    Args:
        folder: The federation's folder; made if it does not exist.

    Raises:
        FederationError: Another coordinator serves the folder, or it was written by another version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _check_folder(folder)
        for part in (folder, folder / "gatherings", folder / "incoming"):
            part.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder_lock = _lock_folder(folder)
        self._lock = threading.RLock()
        self._database = sqlite3.connect(folder / "coordinator.sqlite", isolation_level=None, check_same_thread=False)
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the database and the folder."""
        with self._lock:
            self._database.close()
            self._folder_lock.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self) -> None:
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "secure_delete = ON", "busy_timeout = 10000"):
            self._database.execute(f"PRAGMA {pragma}")
        version = self._database.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            self._database.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version = {SCHEMA_VERSION};COMMIT;")
        elif version != SCHEMA_VERSION:
            raise FederationError(f"{self.folder} was written by another version of the coordinator (schema {version}, "
                                  f"not {SCHEMA_VERSION}): go on with that version, or use another folder")
        (self.folder / "coordinator.sqlite").chmod(0o600)
        shutil.rmtree(self.folder / "incoming")
        (self.folder / "incoming").mkdir(mode=0o700)
        self._remove_orphans()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Do everything in the block or nothing; it is on the disk when the block has ended."""
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    def _rows(self, query: str, *values: object) -> list[tuple]:
        with self._lock:
            return self._database.execute(query, values).fetchall()

    # ------------------------------------------------------------------------------------------- meta and sites
    def load_meta(self, name: str) -> Any:
        """Return a value kept under a name, or None."""
        rows = self._rows("SELECT value FROM meta WHERE name = ?", name)
        return json.loads(rows[0][0]) if rows else None

    def save_meta(self, name: str, value: Any) -> None:
        """Keep a JSON value under a name."""
        with self._transaction() as database:
            database.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, json.dumps(value)))

    def load_settings(self) -> FederationSettings | None:
        """Return the settings of the federation, or None before it is created."""
        content = self.load_meta("settings")
        return None if content is None else FederationSettings.model_validate_json(json.dumps(content))

    def create(self, settings: FederationSettings, sites: list[SiteRecord], now: float) -> None:
        """Write a new federation: its settings and sites, together."""
        with self._transaction() as database:
            database.execute("INSERT INTO meta VALUES ('settings', ?)", (settings.model_dump_json(),))
            database.executemany("INSERT INTO sites VALUES (:name, :invitation, :invitation_hash, :token_hash)",
                                 [asdict(site) for site in sites])
            _add_event(database, Event(now, "creation", None, None, settings.model_dump(mode="json")))

    def load_sites(self) -> dict[str, SiteRecord]:
        """Return all sites by name."""
        return {row[0]: SiteRecord(*row) for row in self._rows(
            "SELECT name, invitation, invitation_hash, token_hash FROM sites ORDER BY name")}

    def save_token(self, site: str, token_hash: str, now: float) -> None:
        """Remember the token of a site that joins; its invitation is forgotten but for its hash."""
        with self._transaction() as database:
            database.execute("UPDATE sites SET token_hash = ?, invitation = NULL WHERE name = ?", (token_hash, site))
            _add_event(database, Event(now, "join", site, None, {}))

    # ------------------------------------------------------------------------------------------------ documents
    def incoming_path(self) -> Path:
        """Return a fresh path for an upload."""
        return self.folder / "incoming" / uuid.uuid4().hex

    def contribution_path(self, key: GatheringKey | str, site: str, digest: str) -> Path:
        """Return where a contribution is kept."""
        return self._key_folder(key) / f"{site}.{digest[:24]}.safetensors"

    def result_path(self, key: GatheringKey | str, subset: str = FULL_RESULT) -> Path:
        """Return where a result is kept; `subset` names a part of its tensors."""
        return self._key_folder(key) / (f"result.{subset[:24]}.safetensors" if subset else "result.safetensors")

    def result_folder(self, key: GatheringKey | str) -> Path:
        """Return the folder for the results of a gathering; it exists."""
        folder = self._key_folder(key)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _key_folder(self, key: GatheringKey | str) -> Path:
        # The keys of a run are "runs/<run>/registration" and so on: proper path segments, checked by parse_key.
        return self.folder / "gatherings" / str(key)

    def save_contribution(self, gathering: Gathering, site: str, incoming: Path) -> None:
        """Take over the upload of a site, as it stands in `gathering.contributions`; durable on return."""
        contribution = gathering.contributions[site]
        path = self.contribution_path(gathering.key, site, contribution.digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        _flush(incoming)
        incoming.replace(path)
        self._flush_folders(path.parent)
        with self._transaction() as database:
            earlier = database.execute("SELECT digest FROM contributions WHERE key = ? AND site = ?",
                                       (str(gathering.key), site)).fetchone()
            _write_gathering(database, gathering)
            database.execute("INSERT OR REPLACE INTO contributions VALUES (?, ?, ?, ?, ?)",
                             (str(gathering.key), site, contribution.digest, contribution.size, contribution.received))
            _add_event(database, Event(contribution.received, "contribution", site, str(gathering.key),
                                       {"digest": contribution.digest, "bytes": contribution.size}))
        if earlier is not None and earlier[0] != contribution.digest:
            self.contribution_path(gathering.key, site, earlier[0]).unlink(missing_ok=True)

    def save_closing(self, gathering: Gathering, digest: str) -> None:
        """Remember that a gathering is closed; its result, with this digest, is in `result_path` already."""
        assert isinstance(gathering.outcome, Closed)
        self._flush_folders(self.result_path(gathering.key).parent)
        with self._transaction() as database:
            _write_gathering(database, gathering)
            _write_result(database, gathering.key, FULL_RESULT, digest)
            _add_event(database, Event(gathering.outcome.time, "closing", None, str(gathering.key), {
                "digest": digest, "contributions": {site: gathering.contributions[site].digest
                                                    for site in gathering.outcome.contributors},
                "missing": list(gathering.outcome.missing)}))

    def save_refusal(self, gathering: Gathering) -> None:
        """Remember that a gathering was refused."""
        assert isinstance(gathering.outcome, Refused)
        with self._transaction() as database:
            _write_gathering(database, gathering)
            _add_event(database, Event(gathering.outcome.time, "refusal", None, str(gathering.key), {
                "code": gathering.outcome.code, "message": gathering.outcome.message}))

    def load_result_digest(self, key: GatheringKey | str, subset: str = FULL_RESULT) -> str | None:
        """Return the digest of a result that is on the disk, or None."""
        rows = self._rows("SELECT digest FROM results WHERE key = ? AND subset = ?", str(key), subset)
        return rows[0][0] if rows else None

    def save_subset(self, key: GatheringKey | str, subset: str, digest: str) -> None:
        """Remember a part of a result, which is in `result_path` already."""
        with self._transaction() as database:
            _write_result(database, key, subset, digest)

    def delete_contributions(self, key: GatheringKey | str) -> None:
        """Delete the files of a gathering's contributions; their digests stay known."""
        for site, digest in self._rows("SELECT site, digest FROM contributions WHERE key = ?", str(key)):
            self.contribution_path(key, site, digest).unlink(missing_ok=True)

    def delete_results(self, key: GatheringKey | str) -> None:
        """Delete the results of a gathering: first the rows, so that none speaks of a file that is gone."""
        subsets = [row[0] for row in self._rows("SELECT subset FROM results WHERE key = ?", str(key))]
        if not subsets:
            return
        with self._transaction() as database:
            database.execute("DELETE FROM results WHERE key = ?", (str(key),))
        for subset in subsets:
            self.result_path(key, subset).unlink(missing_ok=True)

    def load_gatherings(self, settings: FederationSettings) -> list[Gathering]:
        """Return every gathering that has begun, as it was last written."""
        contributions: dict[str, dict[str, Contribution]] = {}
        for key, site, *rest in self._rows("SELECT key, site, digest, size, received FROM contributions"):
            contributions.setdefault(key, {})[site] = Contribution(*rest)
        rows = self._rows("SELECT key, opened, required, outcome FROM gatherings")
        return [replace(fresh_gathering(parse_key(key), settings, required=json.loads(required)), opened=opened,
                        contributions=contributions.get(key, {}), outcome=_decode_outcome(outcome))
                for key, opened, required, outcome in rows]

    def _remove_orphans(self) -> None:
        """Remove files that no row speaks of: a crash came between the two."""
        known = {self.contribution_path(*row) for row in self._rows("SELECT key, site, digest FROM contributions")}
        known |= {self.result_path(*row) for row in self._rows("SELECT key, subset FROM results")}
        for path in sorted((self.folder / "gatherings").rglob("*"), reverse=True):
            if path.suffix == ".safetensors" and path not in known:
                path.unlink()
            elif path.is_dir() and not any(path.iterdir()):
                path.rmdir()

    def _flush_folders(self, folder: Path) -> None:
        """Make the names of new files and folders durable, up to the folder of all documents."""
        while folder != self.folder.parent:
            _flush(folder)
            folder = folder.parent

    # --------------------------------------------------------------------------------------- events and traffic
    def add_event(self, event: Event) -> None:
        """Append to the audit log."""
        with self._transaction() as database:
            _add_event(database, event)

    def load_events(self, kind: str | None = None) -> list[Event]:
        """Return the audit log, oldest first; only one kind of event if asked for."""
        rows = self._rows(
            "SELECT time, kind, site, key, detail FROM events WHERE ?1 IS NULL OR kind = ?1 ORDER BY number", kind)
        return [Event(*row[:4], detail=json.loads(row[4])) for row in rows]

    def save_traffic(self, traffic: Mapping[tuple[str, str], Traffic]) -> None:
        """Write the counters of (site, key). A crash may lose the last few: they are for people, not for rounds."""
        with self._transaction() as database:
            database.executemany("INSERT OR REPLACE INTO traffic VALUES (?, ?, ?, ?, ?)", [
                (site, key, count.received, count.sent, count.last_seen) for (site, key), count in traffic.items()])

    def load_traffic(self) -> dict[tuple[str, str], Traffic]:
        """Return the counters of (site, key)."""
        return {(row[0], row[1]): Traffic(*row[2:]) for row in self._rows(
            "SELECT site, key, received, sent, last_seen FROM traffic")}


# --------------------------------------------------------------------------------------------------------- helpers
def _write_gathering(database: sqlite3.Connection, gathering: Gathering) -> None:
    database.execute("INSERT OR REPLACE INTO gatherings VALUES (?, ?, ?, ?)",
                     (str(gathering.key), gathering.opened, json.dumps(sorted(gathering.required)),
                      _encode_outcome(gathering.outcome)))


def _write_result(database: sqlite3.Connection, key: GatheringKey | str, subset: str, digest: str) -> None:
    database.execute("INSERT OR REPLACE INTO results VALUES (?, ?, ?)", (str(key), subset, digest))


def _add_event(database: sqlite3.Connection, event: Event) -> None:
    database.execute("INSERT INTO events (time, kind, site, key, detail) VALUES (?, ?, ?, ?, ?)",
                     (event.time, event.kind, event.site, event.key, json.dumps(event.detail)))


def _encode_outcome(outcome: Closed | Refused | None) -> str | None:
    return None if outcome is None else json.dumps({"closed": isinstance(outcome, Closed), **asdict(outcome)})


def _decode_outcome(text: str | None) -> Closed | Refused | None:
    if text is None:
        return None
    content = json.loads(text)
    if content.pop("closed"):
        return Closed(content["time"], tuple(content["contributors"]), tuple(content["missing"]))
    return Refused(**content)


def _flush(path: Path) -> None:
    """Make a file's content, or a folder's list of names, durable."""
    if os.name == "nt" and path.is_dir():
        return  # Windows keeps folders durable on its own, and does not open them
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_folder(folder: Path) -> None:
    """Refuse a folder that is somebody else's: what is found in ours without being known is removed."""
    ours = [folder / name for name in ("gatherings", "incoming") if (folder / name).exists()]
    if ours and not (folder / "coordinator.sqlite").exists():
        raise FederationError(f"{folder} is no folder of a federation, but has a folder {ours[0].name}: choose another")


def _lock_folder(folder: Path) -> IO[bytes]:
    """Return an open file that holds the folder for this process; the system lets go of it if the process dies."""
    file = (folder / "lock").open("a+b")
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise FederationError(
            f"{folder} is served by another coordinator: stop that one, or use another folder") from error
    return file
