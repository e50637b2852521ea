"""The coordinator's disk."""

import os
import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest
from fake_federation import incoming_path, make_settings

from nnunetv2.federated.coordinator.members import Members, create_federation
from nnunetv2.federated.coordinator.state import FederationState
from nnunetv2.federated.coordinator.storage.audit_log import Event
from nnunetv2.federated.coordinator.storage.store import Store, Traffic
from nnunetv2.federated.errors import FederationError, RefusedError
from nnunetv2.federated.exchanges.exchange import Contribution, close_with, refuse_with, with_contribution
from nnunetv2.federated.exchanges.registry import RunControl
from nnunetv2.federated.exchanges.steps import fresh_exchange, parse_key

KEY = parse_key("runs/r/rounds/0")


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "federation") as store:
        create_federation(store, make_settings(deadline_s=5.0, quorum=1), now=1.0)
        yield store


def contribute(store: Store, exchange, site: str, content: bytes, now=2.0):
    incoming = incoming_path(store)
    incoming.write_bytes(content)
    exchange = with_contribution(exchange, site, Contribution(content.hex().ljust(64, "0"), len(content), now))
    store.save_contribution(exchange, site, incoming)
    return exchange


def files(store: Store) -> list[str]:
    return sorted(path.name for path in (store.folder / "gatherings").rglob("*.safetensors"))


def reopened(store: Store) -> Store:
    store.close()
    return Store(store.folder)


def test_everything_comes_back_after_a_restart(store):
    state = contribute(store, fresh_exchange(KEY, make_settings(deadline_s=5.0, quorum=1), required=["A"]), "A", b"a")
    other = fresh_exchange(parse_key("fingerprint/census"), make_settings(deadline_s=5.0, quorum=1))
    other = refuse_with(contribute(store, other, "B", b"b"), RefusedError("no", "do", code="datasets_differ"), now=3.0)
    store.save_refusal(other)
    done = fresh_exchange(parse_key("runs/r/initial"), make_settings(deadline_s=5.0, quorum=1))
    done = close_with(contribute(store, done, "A", b"c"), now=4.0)
    store.save_closing(done, "d" * 64)
    store.add_traffic({("A", ""): Traffic(1, 2, 3.0)})
    joined = replace(store.load_members()["A"], state="active", token_hash="hash")
    store.save_members([joined], [], event=Event(5.0, "join", "A", None, {}))
    store.save_control(
        "r",
        RunControl(state="paused", left=frozenset("B"), failed={"A": 3}),
        Event(6.0, "control", "operator", "r", {}),
    )
    with reopened(store) as again:
        settings = again.load_settings()
        assert settings == make_settings(deadline_s=5.0, quorum=1)
        assert {str(g.key): g for g in again.load_exchanges(settings)} == {str(g.key): g for g in (state, other, done)}
        assert again.load_result_digest("runs/r/initial") == "d" * 64
        assert again.load_traffic_totals() == {"A": Traffic(1, 2, 3.0)}
        assert again.load_members()["A"] == joined
        assert again.load_members()["B"].state == "invited"
        assert {one.member for one in again.load_invitations().values()} == {"A", "B"}
        assert again.load_controls() == {"r": RunControl(state="paused", left=frozenset("B"), failed={"A": 3})}


def test_a_replaced_contribution_leaves_no_file(store):
    state = contribute(store, fresh_exchange(KEY, make_settings()), "A", b"first")
    state = contribute(store, state, "A", b"second")
    assert len(files(store)) == 1
    assert store.contribution_path(KEY, "A", state.contributions["A"].digest).read_bytes() == b"second"


def test_leftovers_of_a_crash_are_removed_at_the_next_start(store):
    state = contribute(store, fresh_exchange(KEY, make_settings()), "A", b"kept")
    store.contribution_path(KEY, "B", "f" * 64).write_bytes(b"renamed, but its row was never written")
    store.result_path(KEY).write_bytes(b"computed, but never recorded")
    with reopened(store) as again:
        assert files(again) == [again.contribution_path(KEY, "A", state.contributions["A"].digest).name]


def test_results_and_contributions_can_be_deleted(store):
    state = close_with(contribute(store, fresh_exchange(KEY, make_settings()), "A", b"a"), now=4.0)
    store.result_path(KEY).write_bytes(b"result")
    store.save_closing(state, "d" * 64)
    store.result_path(KEY, "part").write_bytes(b"part")
    store.save_subset(KEY, "part", "e" * 64)
    store.delete_contributions(KEY)
    store.delete_results(KEY)
    assert files(store) == []
    assert store.load_result_digest(KEY) is None
    assert store.load_exchanges(make_settings())[0].contributions == state.contributions  # digests stay known


def test_the_log_of_events_only_grows(store):
    store.add_event(Event(7.0, "failure", "A", "runs/r/rounds/0", {"reason": "out of memory"}))
    contribute(store, fresh_exchange(KEY, make_settings()), "A", b"a")
    assert [event.kind for event in store.load_events()] == ["creation", "failure", "contribution"]
    assert store.load_events("failure")[0].detail == {"reason": "out of memory"}
    for statement in ("DELETE FROM events", "UPDATE events SET kind = 'nothing'"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"), store._database.transaction() as connection:
            connection.execute(statement)


def test_no_secret_is_kept_in_plain_once_it_is_used(store):
    secret = next(one.secret for one in store.load_invitations().values() if one.member == "A")
    Members(FederationState(store, clock=lambda: 2.0)).join(secret, "A.0123456789abcdef")
    store._database._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert secret.encode() not in (store.folder / "coordinator.sqlite").read_bytes()


def test_a_folder_has_one_coordinator(store):
    with pytest.raises(FederationError, match="served by another coordinator"):
        Store(store.folder)


def test_somebody_elses_folder_is_left_alone(tmp_path):
    (tmp_path / "gatherings").mkdir()
    (tmp_path / "gatherings" / "precious.safetensors").write_bytes(b"photos")
    with pytest.raises(FederationError, match="is no folder of a federation"):
        Store(tmp_path)
    assert (tmp_path / "gatherings" / "precious.safetensors").exists()


def test_another_schema_version_is_refused(store):
    store._database._connection.execute("PRAGMA user_version = 99")
    with pytest.raises(FederationError, match="another version of the coordinator \\(schema 99"):
        reopened(store)


def test_the_folder_is_private(store):
    assert store.folder.stat().st_mode & 0o077 == 0


def test_secrets_are_private_in_a_folder_that_is_not(tmp_path):
    """Invitations stand in the database, and in the journal beside it."""
    folder = tmp_path / "made before"
    folder.mkdir(mode=0o755)
    with Store(folder) as store:
        create_federation(store, make_settings(), now=1.0)
        files = {path.name: path.stat().st_mode & 0o077 for path in folder.iterdir() if path.name != "lock"}
    assert files.keys() >= {"coordinator.sqlite", "coordinator.sqlite-wal"} and not any(files.values()), files


@pytest.mark.parametrize("content", [b"no database" * 100, "of somebody else"])
def test_what_is_no_database_of_ours_is_said_in_a_sentence(tmp_path, content):
    if isinstance(content, bytes):
        (tmp_path / "coordinator.sqlite").write_bytes(content)
    else:
        with closing(sqlite3.connect(tmp_path / "coordinator.sqlite")) as database:
            database.execute("CREATE TABLE meta (theirs)")
    with pytest.raises(FederationError, match="coordinator.sqlite cannot be used: .* Restore a backup"):
        Store(tmp_path)


def test_acknowledged_means_full_durability(store):
    assert store._database._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._database._connection.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_failing_transaction_leaves_the_old_state(store):
    state = contribute(store, fresh_exchange(KEY, make_settings()), "A", b"a")
    broken = replace(state, opened=None)  # violates NOT NULL
    with pytest.raises(sqlite3.IntegrityError):
        contribute(store, broken, "A", b"b")
    assert store.load_exchanges(make_settings())[0].contributions == state.contributions


def test_what_a_crash_left_half_written_is_removed(store):
    store.close()
    parts = ("models", "models/a__b__c/fold_0", "tls", "given", ".")
    halves = [store.folder / part / ".partial-x" / "half" for part in parts]
    for half in halves:
        half.parent.mkdir(parents=True)
        half.write_bytes(b"half")
    os.utime(halves[0].parent, (2e10, 2e10))  # the clock has been set back since
    whole = store.folder / "models" / "run.zip"
    whole.write_bytes(b"whole")
    with Store(store.folder):
        assert [half.exists() for half in halves] == [False, False, False, False, True]
        assert whole.exists()
    for path in (halves[-1], halves[-1].parent):
        os.utime(path, (1.0, 1.0))
    with Store(store.folder):
        assert not halves[-1].parent.exists(), "nobody writes a backup there any more"
