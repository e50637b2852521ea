"""The commands that show and verify the audit log."""

import argparse
import json
import os
import shutil
import sqlite3

import pytest
from fake_federation import make_settings, served

from nnunetv2.federated.commands import admin, audit_log
from nnunetv2.federated.coordinator.members import create_federation
from nnunetv2.federated.coordinator.storage.audit_log import Event
from nnunetv2.federated.coordinator.storage.store import Store
from nnunetv2.federated.errors import FederationError


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A federation at rest whose log has six lines."""
    folder = tmp_path_factory.mktemp("template") / "federation"
    with Store(folder) as store:
        create_federation(store, make_settings(), now=1000.0)
        for number in range(5):
            detail = {"run": "r", "round": number, "reason": "ill"}
            store.add_event(Event(2000.0 + number, "failure", "A", None, detail))
    return folder


@pytest.fixture
def folder(template, tmp_path):
    """A copy of it."""
    return shutil.copytree(template, tmp_path / "federation")


@pytest.fixture
def run(folder, capsys):
    def run_(*arguments: str) -> str:
        admin.main(["--folder", str(folder), *arguments])
        return capsys.readouterr().out

    return run_


def tamper(folder, *statements: str) -> None:
    """Change the log as somebody would who can write the file."""
    connection = sqlite3.connect(folder / "coordinator.sqlite")
    connection.executescript("DROP TRIGGER events_stay; DROP TRIGGER events_remain;" + ";".join(statements))
    connection.close()


def head_in(text: str) -> str:
    return text.split()[-1]


def test_the_log_is_shown_line_by_line(run):
    lines = run("log").splitlines()
    assert len(lines) == 6
    assert "creation" in lines[0] and lines[0].split()[0] == "1"
    assert lines[3].endswith("r round 2: ill") and " A " in lines[3]


def test_the_log_as_json_has_everything(run):
    lines = [json.loads(line) for line in run("log", "--json").splitlines()]
    assert [line["number"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[1]["detail"] == {"run": "r", "round": 0, "reason": "ill"} and len(lines[1]["hash"]) == 64


def test_the_log_begins_where_it_is_told_to(run):
    assert run("log", "--since", "1h") == ""
    assert len(run("log", "--since", "1970-01-02", "--json").splitlines()) == 0
    assert len(run("log", "--since", "3000w").splitlines()) == 6
    with pytest.raises(FederationError, match="is no time"):
        run("log", "--since", "yesterday")


@pytest.mark.parametrize(("text", "expected"), [("30m", 8200.0), ("2h", 2800.0), ("0d", 10000.0)])
def test_spans_count_back_from_now(text, expected):
    assert audit_log.parse_since(text, now=10000.0) == expected


def test_an_untouched_log_holds_and_has_a_head(run):
    text = run("verify-log")
    assert "The chain of 6 lines holds." in text
    assert "that of line 6: nothing" in run("verify-log", "--head", head_in(text))
    assert "0 line(s) came after" in run("verify-log", "--head", head_in(text)[:12].upper())


def test_an_earlier_head_stays_good_when_the_log_grows(run, folder):
    head = head_in(run("verify-log"))
    with Store(folder) as store:
        store.add_event(Event(3000.0, "late", "B", "runs/r/rounds/0", {"seconds": 1.0}))
    text = run("verify-log", "--head", head)
    assert "line 6: nothing up to there was changed or cut off, 1 line(s) came after" in text


@pytest.mark.parametrize("number", range(1, 7))
@pytest.mark.parametrize("column", ["time", "kind", "site", "key", "detail", "hash"])
def test_a_change_of_any_field_of_any_line_is_found(folder, run, number, column):
    value = {"time": "time + 1", "detail": "replace(detail, ':', ': ')", "hash": "replace(hash, '1', '2')"}.get(
        column, f"coalesce({column}, '') || 'x'"
    )
    tamper(folder, f"UPDATE events SET {column} = {value} WHERE number = {number}")
    with pytest.raises(FederationError, match=f"broken at line ({number}|{number + 1}):"):
        run("verify-log")


@pytest.mark.parametrize("number", range(1, 6))
def test_a_line_that_is_removed_is_found(folder, run, number):
    tamper(folder, f"DELETE FROM events WHERE number = {number}")
    with pytest.raises(FederationError, match=f"broken at line {number}"):
        run("verify-log")


def test_a_line_that_is_removed_and_closed_up_is_found(folder, run):
    tamper(folder, "DELETE FROM events WHERE number = 3", "UPDATE events SET number = number - 1 WHERE number > 3")
    with pytest.raises(FederationError, match="broken at line 3"):
        run("verify-log")


def test_lines_that_change_places_are_found(folder, run):
    tamper(
        folder,
        "UPDATE events SET number = 99 WHERE number = 2",
        "UPDATE events SET number = 2 WHERE number = 3",
        "UPDATE events SET number = 3 WHERE number = 99",
    )
    with pytest.raises(FederationError, match="broken at line 2"):
        run("verify-log")


def test_a_cut_off_end_is_found_by_a_head_that_was_noted(folder, run):
    head = head_in(run("verify-log"))
    tamper(folder, "DELETE FROM events WHERE number > 4")
    assert "The chain of 4 lines holds." in run("verify-log")
    with pytest.raises(FederationError, match="cut off before it"):
        run("verify-log", "--head", head)


def test_a_log_that_was_written_anew_is_found_by_a_head_that_was_noted(folder, run):
    head = head_in(run("verify-log"))
    tamper(folder, "UPDATE events SET detail = '{}' WHERE number = 2")
    from nnunetv2.federated.coordinator.storage import audit_log

    connection = sqlite3.connect(folder / "coordinator.sqlite")
    audit_log.chain_all(connection)
    connection.commit()
    connection.close()
    assert "holds" in run("verify-log")
    with pytest.raises(FederationError, match="written anew"):
        run("verify-log", "--head", head)


def test_a_head_must_be_a_hash(run):
    for head in ("abc", "z" * 64, ""):
        if head:
            with pytest.raises(FederationError, match="is no hash"):
                run("verify-log", "--head", head)


def test_the_log_is_read_while_the_coordinator_writes(tmp_path, capsys):
    with served(tmp_path / "busy", make_settings()) as federation:
        federation.credential("A")
        admin.main(["--folder", str(tmp_path / "busy"), "log"])
        assert " join " in capsys.readouterr().out
        admin.main(["--folder", str(tmp_path / "busy"), "verify-log"])
        assert "holds" in capsys.readouterr().out


def test_reading_changes_nothing_in_the_folder(folder, run):
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()}
    run("log"), run("verify-log")
    assert {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()} == before


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a user who may not write everywhere")
def test_a_folder_that_may_only_be_read_will_do(folder, run):
    folder.chmod(0o500)
    try:
        assert "holds" in run("verify-log")
    finally:
        folder.chmod(0o700)


def test_a_copy_of_a_database_whose_coordinator_was_killed_is_read(folder, tmp_path, capsys):
    with Store(folder) as store:
        store.add_event(Event(3000.0, "late", "B", "runs/r/rounds/0", {"seconds": 1.0}))
        shutil.copytree(folder, tmp_path / "copy")  # with its journal
    admin.main(["--folder", str(tmp_path / "copy"), "verify-log"])
    assert "chain of 7 lines" in capsys.readouterr().out


def test_a_folder_without_a_federation_is_named(tmp_path):
    for command in (audit_log.show_log, audit_log.verify_log):
        with pytest.raises(FederationError, match="holds no federation"):
            command(tmp_path, argparse.Namespace(since=None, json=False, head=None))
    (tmp_path / "coordinator.sqlite").write_bytes(b"this is no database at all, but long enough" * 10)
    with pytest.raises(FederationError, match="cannot be read"):
        audit_log.verify_log(tmp_path, argparse.Namespace(head=None))
