"""Store the state of a federation: SQLite database, one file per document.

    coordinator.sqlite                               settings, members, exchanges, contributions, results, events
    gatherings/<key>/<site>.<digest>.safetensors     contributions
    gatherings/<key>/result.safetensors              results, and result.<subset>.safetensors of single sites
    incoming/                                        uploads that are not complete
    given/<digest>.safetensors                       weights of checkpoints that the operator has given
    models/                                          models of runs that are over: `models/model_store.py`
    tls/                                             keys and certificates: `http/tls.py`
    lock                                             held by the process that serves the folder

A row is written after the file that it speaks of is on the disk, and nothing is acknowledged before its row is. Files
without a row are leftovers of a crash and are removed at the next start, as are files half written.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from sqlite3 import Connection
from sys import intern
from typing import IO, Any, Literal

from nnunetv2.federated.coordinator.storage import audit_log
from nnunetv2.federated.coordinator.storage.audit_log import Event, Row, add_event
from nnunetv2.federated.coordinator.storage.database import Database
from nnunetv2.federated.coordinator.storage.read_only import DATABASE_FILE
from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.exchanges.exchange import Closed, Contribution, Exchange, Refused
from nnunetv2.federated.exchanges.registry import RunControl
from nnunetv2.federated.exchanges.steps import fresh_exchange, parse_key
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.document import file_digest
from nnunetv2.federated.protocol.keys import Key, NumberedKey
from nnunetv2.utilities.atomic_write import flush_to_disk, remove_leftovers
from nnunetv2.utilities.file_lock import lock_file
from nnunetv2.utilities.plain_text import excerpt

FULL_RESULT = ""
"""Name of the result that holds every tensor."""

LEAST_RECORDS = 2
"""Of rounds, in one answer: who has the first of them already must get on."""

Role = Literal["site", "observer", "operator"]
"""A site takes part, an observer looks on, an operator decides."""


@dataclass(frozen=True)
class MemberRecord:
    """A site, an observer or an operator; of its token, only the SHA-256."""

    name: str
    role: Role
    state: Literal["invited", "active", "revoked"]
    token_hash: str | None
    since: float
    """Seconds since 1970 at which the state began."""
    identity: str | None = None
    """Public part of the key with which a site signs, in hexadecimal; None where nothing is masked."""


@dataclass(frozen=True)
class InvitationRecord:
    """An invitation, with its secret as long as it may still be sent out."""

    hash: str
    member: str
    secret: str | None
    expires: float
    """Seconds since 1970."""
    token_hash: str | None = None
    """Of the token that has used it."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that a site has sent and received for one exchange, or all else."""

    received: int = 0
    """Bytes that the coordinator received."""
    sent: int = 0
    last_seen: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.received + other.received, self.sent + other.sent, max(self.last_seen, other.last_seen))


class Store:
    """The durable state of one federation. Thread-safe; one process at a time.

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
        try:
            self._database = Database(folder / DATABASE_FILE)
        except BaseException:
            self._folder_lock.close()
            raise
        self._durable_folders: set[Path] = set()
        self._remove_orphans()

    def close(self) -> None:
        """Close the database and unlock the folder."""
        self._database.close()
        self._folder_lock.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ----------------------------------------------------------------------------------------- meta and members
    def load_meta(self, name: str) -> Any:
        """Return a value kept under a name, or None."""
        rows = self._database.rows("SELECT value FROM meta WHERE name = ?", name)
        return json.loads(rows[0][0]) if rows else None

    def save_meta(self, name: str, value: Any) -> None:
        """Keep a JSON value under a name."""
        with self._database.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, json.dumps(value)))

    def load_settings(self) -> FederationSettings | None:
        """Return the settings of the federation, or None before it is created."""
        content = self.load_meta("settings")
        return None if content is None else FederationSettings.model_validate_json(json.dumps(content))

    def save_settings(self, settings: FederationSettings, event: Event) -> None:
        """Write settings that an operator has changed."""
        self.save_members((), (), settings=settings, event=event)

    def create(
        self,
        settings: FederationSettings,
        members: Iterable[MemberRecord],
        invitations: Iterable[InvitationRecord],
        now: float,
    ) -> None:
        """Write a new federation: its settings and members, together."""
        self.save_members(
            members,
            invitations,
            settings=settings,
            event=Event(now, "creation", None, None, settings.model_dump(mode="json")),
        )

    def load_members(self) -> dict[str, MemberRecord]:
        """Return everybody by name."""
        rows = self._database.rows(
            "SELECT name, role, state, token_hash, since, identity FROM members "
            "LEFT JOIN identities ON member = name ORDER BY name"
        )
        return {row[0]: MemberRecord(*row) for row in rows}

    def load_invitations(self) -> dict[str, InvitationRecord]:
        """Return all invitations ever made, by hash."""
        rows = self._database.rows("SELECT hash, member, secret, expires, token_hash FROM invitations")
        return {row[0]: InvitationRecord(*row) for row in rows}

    def save_members(
        self,
        members: Iterable[MemberRecord],
        invitations: Iterable[InvitationRecord],
        *,
        event: Event,
        settings: FederationSettings | None = None,
    ) -> None:
        """Write members and invitations that have changed, and the settings if they have, together."""
        with self._database.transaction() as connection:
            for name, *rest, identity in map(astuple, members):
                connection.execute("INSERT OR REPLACE INTO members VALUES (?, ?, ?, ?, ?)", (name, *rest))
                if identity is not None:
                    connection.execute("INSERT OR REPLACE INTO identities VALUES (?, ?)", (name, identity))
            connection.executemany(
                "INSERT OR REPLACE INTO invitations VALUES (?, ?, ?, ?, ?)", map(astuple, invitations)
            )
            if settings is not None:
                connection.execute("INSERT OR REPLACE INTO meta VALUES ('settings', ?)", (settings.model_dump_json(),))
            add_event(connection, event)

    # --------------------------------------------------------------------------------------------- runs and rounds
    def load_controls(self) -> dict[str, RunControl]:
        """Return the control of each run."""
        return {run: _decode_control(text) for run, text in self._database.rows("SELECT run, control FROM runs")}

    def save_control(self, run: str, control: RunControl, event: Event) -> None:
        """Save the control of a run, and log who changed it."""
        with self._database.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO runs VALUES (?, ?)", (run, _encode_control(control)))
            add_event(connection, event)

    def forget_run(self, run: str, event: Event) -> None:
        """Delete the exchanges of a run without closed rounds; the log stays."""
        keys = [
            row[0]
            for row in self._database.rows(
                "SELECT key FROM gatherings WHERE substr(key, 1, ?) = ?", len(run) + 6, f"runs/{run}/"
            )
        ]
        with self._database.transaction() as connection:
            for table in ("gatherings", "contributions", "results"):
                connection.executemany(f"DELETE FROM {table} WHERE key = ?", [(key,) for key in keys])
            connection.execute("DELETE FROM runs WHERE run = ?", (run,))
            add_event(connection, event)
        self._durable_folders.clear()
        shutil.rmtree(self.folder / "gatherings" / "runs" / run, ignore_errors=True)

    def load_rounds(
        self, run: str, first: int = 0, limit: int = -1, *, characters: int | None = None
    ) -> list[dict[str, Any]]:
        """Return the records of closed rounds from `first` on, at most `limit`.

        Args:
            characters: Return fewer records, but two at least, where they are longer than this together, as JSON.
        """
        return self._records("rounds", run, first, limit, characters)

    def load_validations(
        self, run: str, first: int = 0, limit: int = -1, *, characters: int | None = None
    ) -> list[dict[str, Any]]:
        """Return the pooled validations of a run in the same way."""
        return self._records("validations", run, first, limit, characters)

    def load_last_validation(self, run: str) -> dict[str, Any] | None:
        """Return the newest pooled validation of a run, or None."""
        rows = self._database.rows("SELECT record FROM validations WHERE run = ? ORDER BY number DESC LIMIT 1", run)
        return json.loads(rows[0][0]) if rows else None

    def _records(
        self, table: Literal["rounds", "validations"], run: str, first: int, limit: int, characters: int | None
    ) -> list[dict[str, Any]]:
        query = f"SELECT record FROM {table} WHERE run = ? AND number >= ? ORDER BY number LIMIT ?"
        rows = (
            self._database.rows(query, run, first, limit)
            if characters is None
            else self._database.first_rows(query, run, first, limit, characters=characters, least=LEAST_RECORDS)
        )
        return [json.loads(row[0]) for row in rows]

    # ------------------------------------------------------------------------------------------------ documents
    def contribution_path(self, key: Key | str, site: str, digest: str) -> Path:
        """Return where a contribution is kept."""
        return self._key_folder(key) / contribution_name(site, digest)

    def result_path(self, key: Key | str, subset: str = FULL_RESULT) -> Path:
        """Return where a result is kept; `subset` names a part of its tensors."""
        return self._key_folder(key) / result_name(subset)

    def given_path(self, digest: str) -> Path:
        """Return the document with the weights of a checkpoint that the operator has given."""
        return self.folder / "given" / f"{digest}.safetensors"

    def result_folder(self, key: Key | str) -> Path:
        """Return the folder for the results of an exchange; it exists."""
        folder = self._key_folder(key)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _key_folder(self, key: Key | str) -> Path:
        # The keys of a run are "runs/<run>/registration" and so on: proper path segments, checked by parse_key.
        return self.folder / "gatherings" / str(key)

    def save_contribution(self, exchange: Exchange, site: str, incoming: Path) -> None:
        """Take over the upload of a site, as it stands in `exchange.contributions`; durable on return."""
        contribution = exchange.contributions[site]
        path = self.contribution_path(exchange.key, site, contribution.digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        flush_to_disk(incoming)
        incoming.replace(path)
        self._flush_folders(path.parent)
        with self._database.transaction() as connection:
            earlier = connection.execute(
                "SELECT digest FROM contributions WHERE key = ? AND site = ?", (str(exchange.key), site)
            ).fetchone()
            _write_exchange(connection, exchange)
            connection.execute(
                "INSERT OR REPLACE INTO contributions VALUES (?, ?, ?, ?, ?)",
                (str(exchange.key), site, contribution.digest, contribution.size, contribution.received),
            )
            add_event(
                connection,
                Event(
                    contribution.received,
                    "contribution",
                    site,
                    str(exchange.key),
                    {"digest": contribution.digest, "bytes": contribution.size},
                ),
            )
        if earlier is not None and earlier[0] != contribution.digest:
            self.contribution_path(exchange.key, site, earlier[0]).unlink(missing_ok=True)

    def drop_contribution(self, exchange: Exchange, site: str, event: Event) -> None:
        """Delete a contribution to an open exchange; the log still tells of it."""
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM contributions WHERE key = ? AND site = ?", (str(exchange.key), site))
            add_event(connection, event)
        self.contribution_path(exchange.key, site, exchange.contributions[site].digest).unlink(missing_ok=True)

    def damaged_contributions(self, exchange: Exchange) -> list[str]:
        """Name the sites whose contributions are not on the disk as they were received.

        Of those that count.
        """
        damaged = []
        for site in exchange.counted:
            digest = exchange.contributions[site].digest
            path = self.contribution_path(exchange.key, site, digest)
            if not path.is_file() or file_digest(path) != digest:
                damaged.append(site)
        return damaged

    def save_closing(self, exchange: Exchange, digest: str, *, record: Mapping[str, Any] | None = None) -> None:
        """Remember that an exchange is closed; its result is in `result_path` already.

        Args:
            record: The record of a round or of a validation, which outlasts its documents.
        """
        assert isinstance(exchange.outcome, Closed)
        key = exchange.key
        self._flush_folders(self.result_path(key).parent)
        with self._database.transaction() as connection:
            _write_exchange(connection, exchange)
            _write_result(connection, key, FULL_RESULT, digest)
            if record is not None:
                assert isinstance(key, NumberedKey)
                table = {"round": "rounds", "validation": "validations"}[key.kind]
                connection.execute(
                    f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?)", (key.run, key.number, json.dumps(record))
                )
                for site in record.get("outliers", ()):
                    add_event(
                        connection,
                        Event(
                            exchange.outcome.time,
                            "outlier",
                            site,
                            str(key),
                            {name: record["sites"][site][name] for name in ("change_norm", "change_rms")},
                        ),
                    )
            add_event(
                connection,
                Event(
                    exchange.outcome.time,
                    "closing",
                    None,
                    str(key),
                    {
                        "digest": digest,
                        "contributions": {
                            site: exchange.contributions[site].digest
                            for site in exchange.outcome.contributors
                            if site in exchange.contributions  # else it counts by its masked contribution
                        },
                        "missing": list(exchange.outcome.missing),
                    },
                ),
            )

    def save_refusal(self, exchange: Exchange) -> None:
        """Remember that an exchange was refused."""
        assert isinstance(exchange.outcome, Refused)
        with self._database.transaction() as connection:
            _write_exchange(connection, exchange)
            add_event(
                connection,
                Event(
                    exchange.outcome.time,
                    "refusal",
                    None,
                    str(exchange.key),
                    {
                        "code": exchange.outcome.code,
                        "message": excerpt(exchange.outcome.message, audit_log.LOGGED_CHARACTERS),
                    },
                ),
            )

    def load_result_digest(self, key: Key | str, subset: str = FULL_RESULT) -> str | None:
        """Return the digest of a result that is on the disk, or None."""
        rows = self._database.rows("SELECT digest FROM results WHERE key = ? AND subset = ?", str(key), subset)
        return rows[0][0] if rows else None

    def save_subset(self, key: Key | str, subset: str, digest: str) -> None:
        """Remember a part of a result, which is in `result_path` already."""
        self._flush_folders(self.result_path(key, subset).parent)
        with self._database.transaction() as connection:
            _write_result(connection, key, subset, digest)

    def delete_contributions(self, key: Key | str) -> None:
        """Delete the files of an exchange's contributions; their digests stay known."""
        for site, digest in self._database.rows("SELECT site, digest FROM contributions WHERE key = ?", str(key)):
            self.contribution_path(key, site, digest).unlink(missing_ok=True)

    def rounds_with_results(self, run: str) -> list[int]:
        """List the rounds of a run whose aggregates are still there, in order."""
        prefix = f"runs/{run}/rounds/"
        rows = self._database.rows(
            "SELECT DISTINCT substr(key, ?) FROM results WHERE substr(key, 1, ?) = ?",
            len(prefix) + 1,
            len(prefix),
            prefix,
        )
        return sorted(int(row[0]) for row in rows)

    def delete_results(self, key: Key | str) -> None:
        """Delete the results of an exchange, rows first."""
        subsets = [row[0] for row in self._database.rows("SELECT subset FROM results WHERE key = ?", str(key))]
        if not subsets:
            return
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM results WHERE key = ?", (str(key),))
        for subset in subsets:
            self.result_path(key, subset).unlink(missing_ok=True)

    def load_exchanges(self, settings: FederationSettings) -> list[Exchange]:
        """Return every exchange that has begun, as it was last written."""
        rows = self._database.rows("SELECT key, opened, required, outcome FROM gatherings")
        return [
            replace(
                fresh_exchange(parse_key(key), settings, required=json.loads(required)),
                opened=opened,
                contributions=self._load_contributions(key),
                outcome=_decode_outcome(outcome),
            )
            for key, opened, required, outcome in rows
        ]

    def _load_contributions(self, key: str) -> dict[str, Contribution]:
        return {
            intern(site): Contribution(*rest)
            for site, *rest in self._database.rows(  # one name for all rounds
                "SELECT site, digest, size, received FROM contributions WHERE key = ?", key
            )
        }

    def rounds_with_files(self, run: str) -> list[int]:
        """List the rounds of a run that have files, or had some since the start."""
        folder = self.folder / "gatherings" / "runs" / run / "rounds"
        return sorted(int(path.name) for path in folder.iterdir()) if folder.is_dir() else []

    def _remove_orphans(self) -> None:
        """Remove files without a row, and files half written, which a crash has left behind."""
        for part in ("models", "tls", "given"):  # only the holder of the lock writes there, whatever the clock says
            for name, *_ in os.walk(self.folder / part):
                remove_leftovers(name, older_than_s=-math.inf)
        remove_leftovers(self.folder)  # a backup may be written to the folder itself
        top = self.folder / "gatherings"
        for name, _, files in os.walk(top, topdown=False):
            folder = Path(name)
            documents = {file for file in files if file.endswith(".safetensors")}
            for file in documents - self._known_files(folder.relative_to(top).as_posix()) if documents else ():
                (folder / file).unlink()
            if folder != top:
                with suppress(OSError):  # it is not empty
                    folder.rmdir()

    def _known_files(self, key: str) -> set[str]:
        """Name the files that there may be in the folder of an exchange."""
        contributions = self._database.rows("SELECT site, digest FROM contributions WHERE key = ?", key)
        results = self._database.rows("SELECT subset FROM results WHERE key = ?", key)
        return {contribution_name(*row) for row in contributions} | {result_name(row[0]) for row in results}

    def _flush_folders(self, folder: Path) -> None:
        """Sync a folder, and the first time also those above it."""
        flush_to_disk(folder)
        while folder != self.folder and folder not in self._durable_folders:
            flush_to_disk(folder.parent)
            self._durable_folders.add(folder)
            folder = folder.parent

    # --------------------------------------------------------------------------------------- events and traffic
    def add_event(self, event: Event) -> None:
        """Append to the audit log."""
        with self._database.transaction() as connection:
            add_event(connection, event)

    def load_events(self, kind: str | None = None, *, last: int = -1) -> list[Event]:
        """Return the audit log, oldest first; perhaps one kind, or the last ones."""
        which, values = ("", ()) if kind is None else ("WHERE kind = ? ", (kind,))  # by their index
        rows = self._database.rows(
            f"SELECT time, kind, site, key, detail FROM events {which}ORDER BY number DESC LIMIT ?", *values, last
        )
        return [
            Event(moment, kind_of_event, site, key, json.loads(detail))
            for moment, kind_of_event, site, key, detail in reversed(rows)
        ]

    def has_event(self, kind: str, site: str, key: str) -> bool:
        """Return whether the audit log has such a line."""
        return bool(
            self._database.rows("SELECT 1 FROM events WHERE kind = ? AND site = ? AND key = ? LIMIT 1", kind, site, key)
        )

    def load_log(self, after: int = 0, limit: int = -1) -> list[Row]:
        """Return the audit log's rows after line `after`, as of `audit_log.LINES`."""
        return self._database.rows(f"{audit_log.LINES} WHERE number > ? ORDER BY number LIMIT ?", after, limit)

    def load_head(self) -> tuple[int, str]:
        """Return number and hash of the last line of the audit log."""
        rows = self._database.rows("SELECT number, hash FROM events ORDER BY number DESC LIMIT 1")
        return rows[0] if rows else (0, audit_log.START)

    def count_events(self, last: int) -> dict[tuple[str, str], int]:
        """Count the lines up to line `last`, by kind and site."""
        return {
            (kind, site): count
            for kind, site, count in self._database.rows(
                "SELECT kind, coalesce(site, ''), count(*) FROM events WHERE number <= ? GROUP BY 1, 2", last
            )
        }

    def load_lines(self, kinds: Sequence[str], last: int) -> list[tuple[float, str, str | None, str | None, str]]:
        """Return rows (time, kind, site, key, detail) of some kinds, up to `last`."""
        return self._database.rows(
            f"SELECT time, kind, site, key, detail FROM events WHERE kind IN ({', '.join('?' * len(kinds))}) "
            "AND number <= ? ORDER BY number",
            *kinds,
            last,
        )

    def add_traffic(self, traffic: Mapping[tuple[str, str], Traffic]) -> None:
        """Add to the traffic counters, of which a crash may lose the last."""
        with self._database.transaction() as connection:
            connection.executemany(
                "INSERT INTO traffic VALUES (?, ?, ?, ?, ?) ON CONFLICT (site, key) DO UPDATE SET "
                "received = received + excluded.received, sent = sent + excluded.sent, "
                "last_seen = max(last_seen, excluded.last_seen)",
                [(site, key, count.received, count.sent, count.last_seen) for (site, key), count in traffic.items()],
            )

    def load_traffic_totals(self) -> dict[str, Traffic]:
        """Return the total traffic of each site."""
        return {
            row[0]: Traffic(*row[1:])
            for row in self._database.rows(
                "SELECT site, sum(received), sum(sent), max(last_seen) FROM traffic GROUP BY site"
            )
        }

    def load_recent_traffic(self, exchanges: int) -> dict[str, dict[str, Traffic]]:
        """Return the traffic of the busiest exchanges of late: key -> site -> counters."""
        keys = [
            row[0]
            for row in self._database.rows(
                "SELECT key FROM traffic WHERE key != '' GROUP BY key ORDER BY max(last_seen) DESC LIMIT ?", exchanges
            )
        ]
        return {
            key: {
                row[0]: Traffic(*row[1:])
                for row in self._database.rows("SELECT site, received, sent, last_seen FROM traffic WHERE key = ?", key)
            }
            for key in reversed(keys)
        }


# --------------------------------------------------------------------------------------------------------- helpers
def contribution_name(site: str, digest: str) -> str:
    """Return the name of the file of a contribution, in the folder of its exchange."""
    return f"{site}.{digest[:24]}.safetensors"


def result_name(subset: str = FULL_RESULT) -> str:
    """Return the name of the file of a result, in the folder of its exchange."""
    return f"result.{subset[:24]}.safetensors" if subset else "result.safetensors"


def _write_exchange(connection: Connection, exchange: Exchange) -> None:
    connection.execute(
        "INSERT OR REPLACE INTO gatherings VALUES (?, ?, ?, ?)",
        (str(exchange.key), exchange.opened, json.dumps(sorted(exchange.required)), _encode_outcome(exchange.outcome)),
    )


def _write_result(connection: Connection, key: Key | str, subset: str, digest: str) -> None:
    connection.execute("INSERT OR REPLACE INTO results VALUES (?, ?, ?)", (str(key), subset, digest))


def _encode_control(control: RunControl) -> str:
    return json.dumps(
        {
            "state": control.state,
            "left": sorted(control.left),
            "failed": dict(control.failed),
            "proceeding": sorted(control.forced),
        }
    )


def _decode_control(text: str) -> RunControl:
    content = json.loads(text)
    return RunControl(
        state=content["state"],
        left=frozenset(content["left"]),
        failed=content["failed"],
        forced=frozenset(content.get("proceeding", ())),
    )  # not there before 2.8.1+fed.3


def _encode_outcome(outcome: Closed | Refused | None) -> str | None:
    return None if outcome is None else json.dumps({"closed": isinstance(outcome, Closed), **asdict(outcome)})


def _decode_outcome(text: str | None) -> Closed | Refused | None:
    if text is None:
        return None
    content = json.loads(text)
    if content.pop("closed"):
        names = ("contributors", "missing", "cohort")
        return Closed(content["time"], *(tuple(map(intern, content.get(name, ()))) for name in names))
    return Refused(**{**content, "counted": tuple(content.get("counted", ()))})  # not there at first


def _check_folder(folder: Path) -> None:
    """Refuse a folder that is no federation's: unknown files in ours are removed."""
    ours = [folder / name for name in ("gatherings", "incoming") if (folder / name).exists()]
    if ours and not (folder / DATABASE_FILE).exists():
        raise FederationError(f"{folder} is no folder of a federation, but has a folder {ours[0].name}: choose another")


def _lock_folder(folder: Path) -> IO[bytes]:
    """Return an open file whose lock holds the folder for this process."""
    file = (folder / "lock").open("a+b")
    try:
        lock_file(file.fileno())
    except OSError as error:
        file.close()
        raise FederationError(
            f"{folder} is served by another coordinator: stop that one, or use another folder"
        ) from error
    return file
