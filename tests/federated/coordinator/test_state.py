"""Every change of state goes to the disk, then into memory, then to those who wait."""

from __future__ import annotations

import threading

import pytest
from fake_federation import RUN, make_registration
from frozen_federation import Federation
from patience import PATIENCE_S

from nnunetv2.federated.coordinator.service import Coordinator
from nnunetv2.federated.coordinator.state import FederationState
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.exchanges.exchange import close_with, refuse_with
from nnunetv2.federated.protocol.api import FailureReport, SettingsChange
from nnunetv2.federated.protocol.keys import RegistrationKey

KEY = RegistrationKey(RUN)


@pytest.fixture
def federation(tmp_path):
    """A federation with a run that waits for its last registration."""
    made = Federation(tmp_path / "federation", sites=("A", "B", "C"), num_epochs=5)
    made.send(KEY, "A", make_registration(1))
    made.send(KEY, "B", make_registration(1))
    yield made
    made.store.close()


def look(state: FederationState) -> tuple[object, ...]:
    """Return everything in memory that is on the disk, too."""
    exchanges = {str(one.key): one for one in state.registry}
    return (
        exchanges,
        dict(state.registry.controls),
        state.settings,
        dict(state.member_records),
        dict(state.invitation_records),
    )


CHANGES = {
    "save_contribution": lambda one: one.send(KEY, "C", make_registration(1)),
    "drop_contribution": lambda one: one.state.drop_contribution(one.state.registry.get(KEY), "A", by="boss"),
    "save_control": lambda one: one.act("pause"),
    "forget_run": lambda one: one.act("reset"),
    "save_settings": lambda one: one.coordinator.change_settings(SettingsChange(min_sites=3), by="boss"),
    "save_members": lambda one: one.coordinator.revoke("C", by="boss"),
    "report": lambda one: one.coordinator.report_failure("A", FailureReport(run=RUN, round=0, reason="no memory")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_restart_agrees_with_the_process_that_ran_before(federation, name):
    before = look(federation.state)
    CHANGES[name](federation)
    assert look(federation.state) != before
    assert look(Coordinator(federation.store, clock=lambda: federation.now).state) == look(federation.state)


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "report"])
def test_what_the_disk_refuses_has_not_happened(federation, monkeypatch, name):
    def refuse(*_, **__) -> None:
        raise OSError("no space left on device")

    state, notified = federation.state, []
    monkeypatch.setattr(state.notifier, "notify", notified.append)
    monkeypatch.setattr(state.store, name, refuse)
    before = look(state)
    with pytest.raises(OSError, match="no space"):
        CHANGES[name](federation)
    assert look(state) == before and notified == []


@pytest.mark.parametrize("name", ["drop_contribution", "save_control", "forget_run", "save_settings", "save_members"])
def test_whoever_waits_is_notified_of_what_is_true_already(federation, monkeypatch, name):
    state, before, seen = federation.state, look(federation.state), []
    monkeypatch.setattr(state.notifier, "notify", lambda key: seen.append((key, look(state) != before)))
    CHANGES[name](federation)
    assert (str(KEY), True) in seen and all(is_changed for _, is_changed in seen)


def test_an_outcome_is_told_when_everything_that_follows_from_it_is_there(federation, monkeypatch):
    seen = []
    monkeypatch.setattr(federation.state.notifier, "notify", lambda key: seen.append((key, list(federation.lines))))
    federation.send(KEY, "C", make_registration(1))
    lines = next(lines for key, lines in seen if key == KEY)
    assert any("is closed" in line for line in lines)
    with pytest.raises(AssertionError, match="within `closing`"):
        federation.state.close(close_with(federation.state.registry.get(KEY), 1.0), "0" * 64, record=None)


def test_a_thread_that_leaves_an_exchange_leaves_it_to_the_next(federation):
    state, key = federation.state, RegistrationKey(RUN)
    left, came = threading.Event(), threading.Event()

    def close_in_vain():
        with state.closing(key):
            assert came.wait(PATIENCE_S)
        left.set()

    other = threading.Thread(target=close_in_vain)
    other.start()
    with state.closing(key):
        came.set()
        assert left.wait(PATIENCE_S)
        state.refuse(refuse_with(state.registry.get(key), RefusedError("no", code="no"), federation.now))
    other.join()
    assert state.registry.get(key).refusal is not None
    with pytest.raises(AssertionError, match="within `closing`"):
        state.refuse(state.registry.get(key))
