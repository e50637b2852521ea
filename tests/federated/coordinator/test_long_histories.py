"""What people are shown costs the same after any number of rounds, and folders of earlier versions get there too."""

from __future__ import annotations

import sqlite3

import pytest
from fake_federation import RUN, make_settings

from nnunetv2.federated.coordinator import members as members_module
from nnunetv2.federated.coordinator.http.rate_limits import COSTLY_PATH
from nnunetv2.federated.coordinator.members import Members, create_federation
from nnunetv2.federated.coordinator.storage.database import Database
from nnunetv2.federated.coordinator.storage.store import DATABASE_FILE, Store, Traffic
from nnunetv2.federated.protocol.keys import CensusKey, RoundKey


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "federation") as store:
        create_federation(store, make_settings(sites=("A", "B")), now=1.0)
        yield store


def count_rounds(members: Members, rounds: int) -> None:
    for number in range(rounds):
        for site in "AB":
            members.count(site, RoundKey(RUN, number), Traffic(100, 10, float(number)))


def shown(members: Members) -> dict[tuple[str, str], tuple[int, int]]:
    return {(one.site, one.key): (one.bytes_received, one.bytes_sent) for one in members.traffic_status()}


def test_traffic_is_shown_for_the_gatherings_that_were_busy_last(store):
    members = Members(store)
    count_rounds(members, 30)
    members.count("A", "", Traffic(7, 0, 99.0))
    latest = [RoundKey(RUN, number) for number in range(30 - members_module.BUSY_GATHERINGS, 30)]
    assert shown(members) == {(site, key): (100, 10) for site in "AB" for key in latest}
    first, second = members.status()
    assert (first.bytes_received, first.bytes_sent, first.last_seen) == (3007, 300, 99.0)
    assert (second.bytes_received, second.last_seen) == (3000, 29.0)


def test_counters_go_on_after_a_restart(store):
    members = Members(store)
    count_rounds(members, 8)
    members.save_traffic()
    members.save_traffic()
    again = Members(store)
    assert shown(again) == shown(members) and again.status() == members.status()
    again.count("A", RoundKey(RUN, 0), Traffic(1, 1, 50.0))  # of which this process remembered nothing
    again.count("A", RoundKey(RUN, 7), Traffic(1, 1, 50.0))
    again.save_traffic()
    third = Members(store)
    assert third.status()[0].bytes_received == 802
    assert shown(third)["A", RoundKey(RUN, 7)] == (101, 11) and shown(third)["A", RoundKey(RUN, 0)] == (101, 11)


def test_what_could_not_be_saved_is_saved_later(store, monkeypatch):
    members = Members(store)
    members.count("A", CensusKey(), Traffic(100, 10, 1.0))
    with monkeypatch.context() as patch:
        patch.setattr(store, "add_traffic", lambda traffic: (_ for _ in ()).throw(OSError("the disk is full")))
        with pytest.raises(OSError, match="full"):
            members.save_traffic()
    members.count("A", CensusKey(), Traffic(1, 1, 2.0))
    members.save_traffic()
    assert Members(store).status()[0].bytes_received == 101


def test_memory_does_not_grow_with_the_gatherings_that_are_over(store):
    members = Members(store)
    for _ in range(3):
        count_rounds(members, 200)
        members.save_traffic()
    assert len(members._traffic) <= members_module.BUSY_GATHERINGS and not members._unsaved_traffic


def test_events_of_a_kind_are_found_by_their_index(store):
    plan = store._database.rows(
        "EXPLAIN QUERY PLAN SELECT time FROM events WHERE kind = ? ORDER BY number DESC LIMIT ?", "failure", 100
    )
    assert "events_of_kind" in plan[0][-1] and len(plan) == 1, "no scan, and nothing to sort"


def test_a_folder_of_an_earlier_version_gets_the_index(store):
    """And stays readable for that version: the number of the schema is the same."""
    folder = store.folder
    store.close()
    with sqlite3.connect(folder / DATABASE_FILE) as database:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        database.execute("DROP INDEX events_of_kind")
    database.close()
    opened = Database(folder / DATABASE_FILE)
    assert opened.rows("SELECT name FROM sqlite_master WHERE type = 'index' AND name = 'events_of_kind'")
    assert opened.rows("PRAGMA user_version") == [(version,)]
    opened.close()


@pytest.mark.parametrize(
    ("path", "is_costly"),
    [
        ("/metrics", True),
        ("/v1/status", True),
        (f"/v1/runs/{RUN}/curves", True),
        ("/v1/settings", False),
        ("/v1/overview", False),
        (f"/v1/runs/{RUN}", False),
    ],
)
def test_what_makes_much_work_counts_as_much(path, is_costly):
    assert bool(COSTLY_PATH.fullmatch(path)) == is_costly
