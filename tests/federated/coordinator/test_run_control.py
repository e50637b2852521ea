"""Runs that change while they are at work: late joins, leaves, failures, late updates, validation, the operator's hand.

Everything happens through a coordinator without HTTP and without its thread: what is ready is closed on request.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import threading
import zipfile
from contextlib import suppress

import numpy as np
import pytest
from fake_federation import LABELS, RUN, SHAPES, make_census, make_plans, make_registration, make_settings, make_weights
from frozen_federation import OPERATOR, Federation
from patience import PATIENCE_S

from nnunetv2.federated.coordinator.dashboard.audit_tail import LogTail
from nnunetv2.federated.coordinator.members import Member
from nnunetv2.federated.coordinator.models.model_folder import without_values
from nnunetv2.federated.coordinator.storage import audit_log
from nnunetv2.federated.coordinator.storage.store import Traffic
from nnunetv2.federated.errors import FederationError, RefusedError
from nnunetv2.federated.protocol import keys, messages
from nnunetv2.federated.protocol.api import FailureReport, GatheringStatus, RunAction, SettingsChange, Waiting
from nnunetv2.federated.protocol.document import open_document
from nnunetv2.federated.protocol.keys import (
    AdmissionKey,
    CensusKey,
    InitialKey,
    RegistrationKey,
    RoundKey,
    ValidationKey,
)


@pytest.fixture
def make_federation(tmp_path):
    made = []

    def make(*sites: str, **settings) -> Federation:
        federation = Federation(tmp_path / f"federation{len(made)}", sites=sites, **{"num_epochs": 5, **settings})
        made.append(federation)
        return federation

    yield make
    for federation in made:
        federation.store.close()


def mean_of(*weighted: tuple[int, float]) -> dict[str, np.ndarray]:
    total = sum(weight for _, weight in weighted)
    return {
        name: (sum(make_weights(seed)[name].astype(np.float64) * weight for seed, weight in weighted) / total).astype(
            np.float32
        )
        for name in SHAPES
    }


# ------------------------------------------------------------------------------------------------------- late joins
def test_a_new_site_joins_a_run_that_has_begun(make_federation):
    federation = make_federation("A", "B")
    federation.start("A", "B")
    federation.update(0, "A", 1), federation.update(0, "B", 2)
    federation.coordinator.invite("C", "site", by="boss")
    with pytest.raises(RefusedError, match="was closed before site C came"):
        federation.send(RegistrationKey(RUN), "C", make_registration(7))
    federation.send(AdmissionKey(RUN, "C"), "C", make_registration(7))
    with open_document(federation.coordinator.result(AdmissionKey(RUN, "C"), "C").path) as document:
        assert document.message.weights == {"A": 1.0, "B": 1.0, "C": 1.0}  # who takes part, not with how many cases
        assert all("C" in sites for sites in document.message.shared.values())
    assert federation.aggregate(0, "C")[0].round == 0  # what it starts from
    federation.update(1, "A", 3), federation.update(1, "B", 4)
    assert federation.coordinator.result(RoundKey(RUN, 1), "A").waiting_for == ("C",)
    federation.update(1, "C", 5)
    message, weights = federation.aggregate(1)
    assert message.contributors == {"A": 1.0, "B": 1.0, "C": 1.0}
    assert federation.weights(1) == {"A": 1.0, "B": 2.0, "C": 7.0}
    for name, values in mean_of((3, 1), (4, 2), (5, 7)).items():
        np.testing.assert_allclose(weights[name], values, rtol=1e-6)


def test_a_late_join_outlasts_a_restart(make_federation):
    federation = make_federation("A", "B")
    federation.start("A", "B")
    federation.coordinator.invite("C", "site", by="boss")
    federation.send(AdmissionKey(RUN, "C"), "C", make_registration(7))
    federation.store.close()
    again = Federation(federation.store.folder)
    federation.store = again.store  # closed by the fixture
    for seed, site in enumerate("ABC"):
        again.update(0, site, seed)
    assert again.aggregate(0, "C")[0].contributors.keys() == {"A", "B", "C"}
    assert again.weights(0) == {"A": 1.0, "B": 2.0, "C": 7.0}


def test_a_newcomer_shares_only_what_fits(make_federation):
    federation = make_federation("A", "B")
    federation.start("A", "B")
    federation.coordinator.invite("C", "site", by="boss")
    shapes = {**SHAPES, "head.weight": (3, 4)}
    federation.send(AdmissionKey(RUN, "C"), "C", make_registration(1, shapes=shapes))
    with open_document(federation.coordinator.result(AdmissionKey(RUN, "C"), "C").path) as document:
        shared = [name for name, sites in document.message.shared.items() if "C" in sites]
    assert sorted(shared) == ["encoder.bias", "encoder.weight"]


@pytest.mark.parametrize(
    ("registration", "complaint"),
    [
        ({"labels": {"background": 0, "spleen": 1}}, "datasets do not go together"),
        ({"shapes": {"other.weight": (2, 2)}}, "shares only 0"),
        ({"equal": True, "plans": make_plans(transpose_forward=[2, 1, 0])}, "plans differ"),
    ],
)
def test_a_newcomer_that_does_not_fit_is_refused(make_federation, registration, complaint):
    federation = make_federation("A", "B")
    federation.start("A", "B")
    federation.coordinator.invite("C", "site", by="boss")
    aliases = {} if "shapes" in registration else {"decoder.encoder.weight": "encoder.weight"}
    federation.send(AdmissionKey(RUN, "C"), "C", make_registration(1, aliases=aliases, **registration))
    with pytest.raises(RefusedError, match=complaint):
        federation.coordinator.result(AdmissionKey(RUN, "C"), "C")
    assert federation.coordinator.run_state(RUN).members == ("A", "B")


def test_nobody_is_admitted_for_somebody_else(make_federation):
    federation = make_federation("A", "B")
    federation.start("A", "B")
    with pytest.raises(RefusedError, match="does not take part"):
        federation.send(AdmissionKey(RUN, "C"), "A", make_registration(1))


# ------------------------------------------------------------------------------------------- leaving, failing, late
def test_a_site_leaves_and_returns(make_federation):
    federation = make_federation("A", "B", "C")
    federation.start("A", "B", "C")
    federation.update(0, "A", 1), federation.update(0, "B", 2)
    federation.act("leave", Member("C", "site"))
    assert federation.weights(0) == {"A": 1.0, "B": 2.0}
    with pytest.raises(RefusedError, match="does not take part"):
        federation.update(1, "C", 3)
    federation.coordinator.report_failure("C", FailureReport(run=RUN, round=1, reason="FederationError"))
    assert not federation.store.load_events("failure"), "that it has left says it all"
    assert federation.act("return", Member("C", "site")).members == ("A", "B", "C")
    federation.update(1, "C", 3)
    assert federation.coordinator.result(RoundKey(RUN, 1), "C") == Waiting(waiting_for=("A", "B"))


def test_a_failure_does_not_hold_up_a_round_that_has_its_quorum(make_federation):
    federation = make_federation("A", "B", "C", quorum=2, deadline_s=1e6)
    federation.start("A", "B", "C")
    federation.update(0, "A", 1), federation.update(0, "B", 2)
    federation.coordinator.report_failure("C", FailureReport(run=RUN, round=0, reason="OutOfMemoryError"))
    federation.close()
    record = federation.store.load_rounds(RUN)[0]
    assert (record["missing"], record["failed"]) == (["C"], ["C"])
    assert set(record["sites"]) == {"A", "B"}


def test_a_site_that_failed_is_excused_until_it_is_back(make_federation):
    federation = make_federation("A", "B", "C", quorum=2, deadline_s=1e6)
    federation.start("A", "B", "C")
    federation.coordinator.report_failure("C", FailureReport(run=RUN, round=0, reason="OutOfMemoryError"))
    for number in (0, 1):
        federation.update(number, "A", 1), federation.update(number, "B", 2)
        assert federation.aggregate(number)[0].missing == ("C",)
    federation.send(RegistrationKey(RUN), "C", make_registration(3))  # as a site does that starts again
    federation.update(2, "A", 1), federation.update(2, "B", 2)
    assert federation.coordinator.result(RoundKey(RUN, 2), "A").waiting_for == ("C",)
    federation.update(2, "C", 3)
    assert federation.aggregate(2)[0].missing == ()


@pytest.mark.parametrize("failed_in", [0, 1])
def test_an_update_that_was_on_its_way_takes_no_failure_back(make_federation, failed_in):
    federation = make_federation("A", "B", "C", quorum=2, deadline_s=1e6)
    federation.start("A", "B", "C")
    report = FailureReport(run=RUN, round=failed_in, reason="OutOfMemoryError")
    federation.coordinator.report_failure("C", report)
    for site in "CAB":
        federation.update(0, site, 1)
    federation.update(1, "A", 1), federation.update(1, "B", 2)
    assert federation.aggregate(1)[0].missing == ("C",)


def test_a_late_update_is_dropped_and_written_down(make_federation):
    federation = make_federation("A", "B", "C", quorum=2, deadline_s=10)
    federation.start("A", "B", "C")
    federation.update(0, "A", 1), federation.update(0, "B", 2)
    federation.now += 11
    federation.close()
    federation.now += 5
    assert federation.update(0, "C", 3).already
    assert federation.aggregate(0, "C")[0].missing == ("C",)
    assert [(event.site, event.detail["seconds"]) for event in federation.store.load_events("late")] == [("C", 5.0)]


def test_a_late_update_is_carried_into_the_open_round_once(make_federation):
    federation = make_federation("A", "B", "C", quorum=2, deadline_s=10, late_updates="carry")
    federation.start("A", "B", "C")
    federation.update(0, "A", 1), federation.update(0, "B", 2)
    federation.now += 11
    federation.close()
    receipt = federation.update(0, "C", 3)
    assert (receipt.key, receipt.already) == (RoundKey(RUN, 1), False)
    assert federation.update(0, "C", 3).key == RoundKey(RUN, 1)  # its receipt was lost
    federation.update(1, "A", 4), federation.update(1, "B", 5)
    message, weights = federation.aggregate(1, "C")
    assert federation.weights(message.round) == {"A": 1.0, "B": 2.0, "C": 3.0}
    for name, values in mean_of((4, 1), (5, 2), (3, 3)).items():
        np.testing.assert_allclose(weights[name], values, rtol=1e-6)
    assert federation.update(0, "C", 3).key == RoundKey(RUN, 1)  # even now: nothing counts twice
    assert federation.state.registry.get(RoundKey(RUN, 2)) is None


# ------------------------------------------------------------------------------------------------------ the operator
def test_a_paused_run_takes_updates_and_closes_nothing(make_federation):
    federation = make_federation("A", "B")
    federation.start("A", "B")
    assert federation.act("pause").state == "paused"
    federation.update(0, "A", 1), federation.update(0, "B", 2)
    assert federation.coordinator.result(RoundKey(RUN, 0), "A") == Waiting(waiting_for=(), paused=True)
    assert federation.act("resume").state == "running"
    assert federation.aggregate(0)[0].round == 0


def test_a_stopped_run_ends_with_its_last_round(make_federation):
    federation = make_federation("A", "B")
    federation.start("A", "B")
    federation.update(0, "A", 1), federation.update(0, "B", 2)
    federation.update(1, "A", 1)
    state = federation.act("stop")
    assert (state.closed, state.state, state.rounds_closed) == (True, "stopped", 1)
    assert federation.aggregate(1)[0].round == 0
    folder = federation.store.folder / "models" / "nnUNetTrainerFake__nnUNetPlans__3d_fullres"
    assert (folder / "fold_0" / "checkpoint_final.pth").exists()


@pytest.mark.parametrize("lose", [lambda zip: zip.unlink(), lambda zip: shutil.rmtree(zip.parent)])
def test_a_model_that_was_lost_is_written_again_with_all_folds(make_federation, lose):
    federation = make_federation("A", "B", num_epochs=1)
    runs = (RUN, RUN.replace("fold_0", "fold_1"))
    for fold, run in enumerate(runs):
        for number, site in enumerate("AB"):
            registration = make_registration(number + 1).model_copy(update={"fold": str(fold)})
            federation.send(RegistrationKey(run), site, registration)
        for site in "AB":
            weights = make_weights(0) if site == "B" else {}
            federation.send(InitialKey(run), site, messages.Update(), weights)
        for site in "AB":
            federation.send(RoundKey(run, 0), site, messages.Update(), make_weights(fold))
    path = federation.coordinator.find_model(RUN)
    names = zipfile.ZipFile(path).namelist()
    lose(path)
    federation.store.close()
    again = Federation(federation.store.folder)
    federation.store = again.store
    again.coordinator.start()
    again.coordinator.stop()
    assert {again.coordinator.find_model(run) for run in runs} == {path}
    assert zipfile.ZipFile(path).namelist() == names and any("fold_1" in name for name in names)
    written = len(again.store.load_events("model"))
    again.coordinator.worker.tidy_up(RUN)
    assert len(again.store.load_events("model")) == written, "it is there"


@pytest.mark.parametrize("end", ["stop", "complete"])
def test_a_run_that_is_over_is_not_paused(make_federation, end):
    federation = make_federation("A", "B", num_epochs=5 if end == "stop" else 1)
    federation.start("A", "B")
    federation.update(0, "A", 1), federation.update(0, "B", 2)
    if end == "stop":
        federation.act("stop")
    before = federation.coordinator.run_state(RUN)
    with pytest.raises(RefusedError, match="cannot be paused any more"):
        federation.act("pause")
    assert federation.coordinator.run_state(RUN) == before and before.closed
    assert federation.coordinator.find_model(RUN).is_file()


def test_a_run_that_was_stopped_before_its_first_round_says_so(make_federation):
    federation = make_federation("A", "B")
    federation.start("A", "B")
    federation.update(0, "A", 1)
    federation.act("stop")
    with pytest.raises(RefusedError, match="stopped run .* before its first round"):
        federation.coordinator.result(RoundKey(RUN, 0), "A")


def test_nobody_waits_for_the_registration_of_a_run_that_was_stopped(make_federation):
    federation = make_federation("A", "B")
    federation.send(RegistrationKey(RUN), "A", make_registration(1))
    federation.act("stop")
    with pytest.raises(RefusedError, match="stopped run .* before its first round"):
        federation.coordinator.result(RegistrationKey(RUN), "A")


def test_a_registration_proceeds_without_those_that_never_come(make_federation):
    federation = make_federation("A", "B", "C")
    for site in "AB":
        federation.send(RegistrationKey(RUN), site, make_registration(1))
    assert federation.act("proceed").members == ("A", "B")
    with open_document(federation.coordinator.result(RegistrationKey(RUN), "A").path) as document:
        assert set(document.message.weights) == {"A", "B"}
    with pytest.raises(RefusedError, match="no single gathering"):
        federation.act("proceed")


def test_proceeding_is_remembered_until_it_is_done(make_federation):
    """What the operator was told is done, whenever the coordinator dies, and however long the run is paused."""
    federation = make_federation("A", "B", "C")
    federation.start("A", "B", "C")
    federation.update(0, "A", 1)
    federation.update(0, "B", 2)
    federation.act("pause")
    federation.act("proceed")
    assert federation.state.registry.latest_round(RUN) is None
    federation.store.close()
    again = Federation(federation.store.folder)
    federation.store = again.store  # closed by the fixture
    again.act("resume")
    assert again.coordinator.state.registry.get(RoundKey(RUN, 0)).outcome.missing == ("C",)
    again.update(1, "A", 1)
    again.update(1, "B", 2)
    assert not again.coordinator.state.registry.is_closed(RoundKey(RUN, 1)), "it was for one round"
    again.act("proceed")
    assert again.coordinator.state.registry.control(RUN).forced == {RoundKey(RUN, 1)}
    assert [
        (event.site, event.key) for event in again.store.load_events("control") if event.detail["action"] == "proceed"
    ] == [("boss", RoundKey(RUN, number)) for number in (0, 1)]


@pytest.mark.parametrize("change", [{"quorum": 4, "deadline_s": 1.0}, {"quorum": 2}])
def test_a_quorum_with_which_no_round_could_close_is_refused(make_federation, change):
    coordinator = make_federation("A", "B", "C").coordinator
    with pytest.raises(FederationError, match="--quorum"):
        coordinator.change_settings(SettingsChange(**change), by="boss")
    coordinator.change_settings(SettingsChange(quorum=3, deadline_s=1.0), by="boss")
    coordinator.revoke("C", by="boss")
    assert coordinator.change_settings(SettingsChange(late_updates="carry"), by="boss").quorum == 3


def test_a_run_does_not_proceed_with_sites_that_were_revoked_meanwhile(make_federation):
    federation = make_federation("A", "B", "C")
    for site in "AB":
        federation.send(RegistrationKey(RUN), site, make_registration(1))
    federation.coordinator.act(RUN, RunAction(action="proceed"), OPERATOR)
    federation.coordinator.revoke("B", by="boss")
    federation.close()
    assert not federation.state.registry.is_closed(RegistrationKey(RUN)), "a run has two sites"


def test_a_run_that_begins_anew_inherits_nothing(make_federation, monkeypatch):
    from nnunetv2.federated.exchanges.steps.base import Step

    federation = make_federation("A", "B", "C")
    for site in "AB":
        federation.send(RegistrationKey(RUN), site, make_registration(1))
    with monkeypatch.context() as patch:
        patch.setattr(Step, "close", lambda *_: 1 / 0)
        federation.act("proceed")
    with pytest.raises(OSError, match="cannot be closed at the moment: ZeroDivisionError"):
        federation.coordinator.result(RegistrationKey(RUN), "A")
    woken: list[str] = []
    monkeypatch.setattr(federation.coordinator.notifier, "notify", woken.append)
    federation.act("reset")
    assert RegistrationKey(RUN) in woken, "who waits for what is gone is told"
    for site in "AB":
        federation.send(RegistrationKey(RUN), site, make_registration(1))
    assert federation.coordinator.result(RegistrationKey(RUN), "A") == Waiting(waiting_for=("C",))
    federation.send(RegistrationKey(RUN), "C", make_registration(1))
    assert federation.state.registry.is_closed(RegistrationKey(RUN)), "at once: nothing had gone wrong here"


@pytest.mark.slow
@pytest.mark.parametrize("action", ["stop", "pause", "reset"])
def test_an_operator_waits_for_the_round_that_is_being_closed(make_federation, monkeypatch, action):
    """A run that was stopped or paused closes no further round, and of one that was reset nothing stays."""
    from nnunetv2.federated.exchanges.steps.base import Step

    federation = make_federation("A", "B")
    federation.start("A", "B")
    coordinator, close, begun, go_on = federation.coordinator, Step.close, threading.Event(), threading.Event()

    def slowly(*args):
        begun.set()
        assert go_on.wait(PATIENCE_S)
        return close(*args)

    def steer() -> None:
        with suppress(RefusedError):
            coordinator.act(RUN, RunAction(action=action), OPERATOR)
        seen.append(coordinator.state.registry.run_state(RUN).rounds_closed)

    seen: list[int] = []
    monkeypatch.setattr(Step, "close", slowly)
    threads = [threading.Thread(target=federation.update, args=(0, "B", 2)), threading.Thread(target=steer)]
    federation.update(0, "A", 1)
    for thread in threads:
        thread.start()
        assert begun.wait(PATIENCE_S)
    threads[1].join(0.1)
    assert not seen
    go_on.set()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert seen == [1] and coordinator.state.registry.run_state(RUN).rounds_closed == 1


def test_what_a_revoked_site_sent_does_not_count_when_it_is_invited_again(make_federation):
    """It may have been somebody with its credential, and the first update of a round stays."""
    federation = make_federation("A", "B", "C")
    federation.start("A", "B", "C")
    federation.update(0, "C", 666), federation.update(0, "A", 1)
    coordinator = federation.coordinator
    coordinator.revoke("C", by="boss")
    coordinator.invite("C", "site", by="boss")
    federation.update(0, "B", 2)
    assert coordinator.result(RoundKey(RUN, 0), "A").waiting_for == ("C",)
    (event,) = federation.store.load_events("dropped")
    assert (event.site, event.key, event.detail["site"]) == ("boss", RoundKey(RUN, 0), "C")
    assert [path.name[0] for path in sorted(federation.store.result_path(RoundKey(RUN, 0)).parent.iterdir())] == [
        "A",
        "B",
    ]
    federation.store.close()
    again = Federation(federation.store.folder)
    federation.store = again.store  # closed by the fixture
    again.update(0, "C", 3)
    for name, values in mean_of((1, 1), (2, 2), (3, 3)).items():
        np.testing.assert_allclose(again.aggregate(0)[1][name], values, rtol=1e-6)


@pytest.mark.parametrize("restarts", [False, True])
def test_planning_goes_on_without_a_site_whose_data_do_not_fit(make_federation, restarts):
    federation = make_federation("A", "B", "C")
    federation.send(CensusKey(), "C", make_census(labels={"background": 0, "liver": 2}))
    for site in "AB":
        federation.send(CensusKey(), site, make_census())
    with pytest.raises(RefusedError, match="labels.liver is 1 at A, B and 2 at C"):
        federation.coordinator.result(str(CensusKey()), "A")
    if restarts:
        federation.store.close()
        again = Federation(federation.store.folder)
        federation.store, federation = again.store, again
        assert not federation.coordinator.worker._ready(), "nothing has changed"
    federation.coordinator.revoke("C", by="boss")
    federation.close()
    assert federation.send(CensusKey(), "A", make_census()).waiting_for == ()
    federation.coordinator.result(str(CensusKey()), "A")
    assert federation.state.registry.get(CensusKey()).outcome.contributors == ("A", "B")


def test_a_refusal_of_an_earlier_version_is_looked_at_again(make_federation):
    federation = make_federation("A", "B")
    federation.send(CensusKey(), "A", make_census())
    federation.send(CensusKey(), "B", make_census(labels={"background": 0, "liver": 2}))
    federation.store.close()
    with sqlite3.connect(federation.store.folder / "coordinator.sqlite") as database:
        (text,) = database.execute("SELECT outcome FROM gatherings").fetchone()
        outcome = {name: value for name, value in json.loads(text).items() if name != "counted"}
        database.execute("UPDATE gatherings SET outcome = ?", (json.dumps(outcome),))
    database.close()
    again = Federation(federation.store.folder)
    federation.store = again.store
    again.close()
    assert again.state.registry.get(CensusKey()).outcome.counted == ("A", "B")
    assert len(again.store.load_events("refusal")) == 2


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"\xff" * 100), lambda path: path.unlink()])
def test_a_contribution_that_this_machine_has_damaged_is_sent_again(make_federation, damage):
    federation = make_federation("A", "B")
    federation.start("A", "B")
    federation.update(0, "A", 1)
    damage(next(federation.store.result_path(RoundKey(RUN, 0)).parent.glob("A.*")))
    federation.update(0, "B", 2)
    assert federation.coordinator.result(RoundKey(RUN, 0), "B").waiting_for == ("A",)
    assert "contribution of site A was damaged" in federation.lines[-1]
    (event,) = federation.store.load_events("dropped")
    assert (event.site, event.key, event.detail["site"]) == (None, RoundKey(RUN, 0), "A")
    federation.update(0, "A", 1)
    for name, values in mean_of((1, 1), (2, 2)).items():
        np.testing.assert_allclose(federation.aggregate(0)[1][name], values, rtol=1e-6)


def test_a_reset_waits_for_what_is_being_written(make_federation, monkeypatch):
    federation = make_federation("A", "B", "C")
    federation.send(RegistrationKey(RUN), "A", make_registration(1))
    save, begun, go_on = federation.store.save_contribution, threading.Event(), threading.Event()

    def slowly(*args):
        begun.set()
        assert go_on.wait(PATIENCE_S)
        save(*args)

    monkeypatch.setattr(federation.store, "save_contribution", slowly)
    site = threading.Thread(target=federation.send, args=(RegistrationKey(RUN), "B", make_registration(1)))
    operator = threading.Thread(target=federation.act, args=("reset",))
    site.start()
    assert begun.wait(PATIENCE_S)
    operator.start()
    operator.join(0.1)
    assert operator.is_alive()
    go_on.set()
    site.join(PATIENCE_S), operator.join(PATIENCE_S)
    assert federation.state.registry.runs() == []
    assert federation.store.load_exchanges(federation.coordinator.settings) == []


def test_a_run_without_rounds_can_be_reset(make_federation):
    federation = make_federation("A", "B")
    federation.start("A", "B")
    federation.act("reset")
    assert federation.state.registry.runs() == []
    federation.start("A", "B")
    federation.update(0, "A", 1), federation.update(0, "B", 2)
    with pytest.raises(RefusedError, match="can be stopped, not forgotten"):
        federation.act("reset")


@pytest.mark.parametrize(
    ("action", "member"), [("pause", Member("A", "site")), ("stop", Member("eve", "observer")), ("leave", OPERATOR)]
)
def test_everybody_keeps_to_their_role(make_federation, action, member):
    federation = make_federation("A", "B")
    federation.start("A", "B")
    with pytest.raises(RefusedError, match="this is for") as info:
        federation.act(action, member)
    assert info.value.code == "forbidden"


def test_settings_of_a_run_at_work_are_recorded_with_each_round(make_federation):
    federation = make_federation("A", "B", "C")
    federation.start("A", "B", "C")
    for seed, site in enumerate("ABC"):
        federation.update(0, site, seed)
    federation.coordinator.change_settings(SettingsChange(quorum=2, deadline_s=60.0), by="boss")
    federation.update(1, "A", 1), federation.update(1, "B", 2)
    federation.now += 61
    federation.close()
    first, second = federation.store.load_rounds(RUN)
    assert (first["settings"]["quorum"], second["settings"]["quorum"]) == (None, 2)
    assert second["missing"] == ["C"] and second["sites"]["B"]["weight"] == 2.0
    assert second["sites"]["A"]["digest"] and second["digest"]


# -------------------------------------------------------------------------------------------------------- validation
def validation(tp, fp, fn) -> messages.Validation:
    return messages.Validation(tp=tp, fp=fp, fn=fn, loss=0.5)


def test_an_aggregate_is_validated_with_the_voxels_of_all_sites(make_federation):
    federation = make_federation("A", "B")
    federation.start("A", "B")
    federation.update(0, "A", 1), federation.update(0, "B", 2)
    federation.send(ValidationKey(RUN, 0), "A", validation([8, 0], [2, 0], [2, 0]))
    assert federation.store.load_validations(RUN) == []
    federation.send(ValidationKey(RUN, 0), "B", validation([0, 0], [0, 0], [10, 0]))
    found = federation.store.load_validations(RUN)[0]
    assert found["dice"] == [pytest.approx(16 / 30), None]
    assert found["dice_of_site"] == {"A": [pytest.approx(0.8), None], "B": [0.0, None]}
    assert found["ema_dice"] == found["mean_dice"] == pytest.approx(16 / 30)
    assert (found["best_round"], found["loss_of_site"]) == (0, {"A": 0.5, "B": 0.5})
    with open_document(federation.coordinator.result(ValidationKey(RUN, 0), "A").path) as document:
        assert document.message.dice == tuple(found["dice"]) and not document.message.dice_of_site


def test_the_best_aggregate_stays_and_becomes_a_checkpoint(make_federation):
    torch = pytest.importorskip("torch")
    federation = make_federation("A", "B", num_epochs=5)
    federation.start("A", "B")
    for number, tp in enumerate([10, 90, 5, 5, 5]):
        federation.update(number, "A", 10 + number), federation.update(number, "B", 10 + number)
        for site in "AB":
            federation.send(ValidationKey(RUN, number), site, validation([tp], [100 - tp], [100 - tp]))
    # averages: 0.1, 0.18, 0.167, 0.155, 0.145
    assert [record["best_round"] for record in federation.store.load_validations(RUN)] == [0, 1, 1, 1, 1]
    best = 1
    assert federation.store.rounds_with_results(RUN) == [1, 3, 4]
    folder = federation.store.folder / "models" / "nnUNetTrainerFake__nnUNetPlans__3d_fullres"
    for name, number in (("checkpoint_best.pth", best), ("checkpoint_final.pth", 4)):
        weights = torch.load(folder / "fold_0" / name, weights_only=True)["network_weights"]
        np.testing.assert_allclose(weights["head.weight"].numpy(), make_weights(10 + number)["head.weight"], rtol=1e-6)
    with zipfile.ZipFile(folder.with_suffix(".zip")) as packed:
        names = packed.namelist()
        assert json.loads(packed.read(names[0]))["labels"] == LABELS
    assert names == [
        f"Dataset001_Fake/{folder.name}/{name}"
        for name in ("dataset.json", "fold_0/checkpoint_best.pth", "fold_0/checkpoint_final.pth", "plans.json")
    ]


def test_sites_that_count_different_classes_are_told(make_federation):
    federation = make_federation("A", "B")
    federation.start("A", "B")
    federation.update(0, "A", 1), federation.update(0, "B", 2)
    federation.send(ValidationKey(RUN, 0), "A", validation([1], [1], [1]))
    federation.send(ValidationKey(RUN, 0), "B", validation([1, 1], [1, 1], [1, 1]))
    assert any("different numbers of classes" in line for line in federation.lines)
    federation.update(1, "A", 1), federation.update(1, "B", 2)
    assert federation.aggregate(1)[0].round == 1  # the rounds go on


# ------------------------------------------------------------------------------------------------- members, migration
def test_a_revoked_site_is_out_at_once_and_can_be_invited_again(make_federation):
    federation = make_federation("A", "B", "C")
    coordinator = federation.coordinator
    invitations = {one.member: one.secret for one in coordinator.members.open_invitations(federation.now)}
    token = "C.0123456789abcdef0123"
    coordinator.members.join(invitations["C"], token)
    federation.start("A", "B", "C")
    coordinator.revoke("C", by="boss")
    with pytest.raises(RefusedError, match="revoked"):
        coordinator.members.authenticate(token)
    federation.update(0, "A", 1), federation.update(0, "B", 2)
    assert federation.weights(0) == {"A": 1.0, "B": 2.0}
    secret = coordinator.invite("C", "site", by="boss")
    coordinator.members.join(secret, "C.another-0123456789abcdef")
    with pytest.raises(RefusedError):
        coordinator.members.authenticate(token)
    assert coordinator.members.authenticate("C.another-0123456789abcdef") == Member("C", "site")


def test_a_new_credential_replaces_the_old_one_when_it_is_used(make_federation):
    federation = make_federation("A", "B")
    members, now = federation.coordinator.members, federation.now
    secrets = {one.member: one.secret for one in members.open_invitations(now)}
    members.join(secrets["A"], "A.old-0123456789abcdef")
    secret = federation.coordinator.invite("A", "site", by="boss")
    assert members.authenticate("A.old-0123456789abcdef").name == "A"
    members.join(secret, "A.new-0123456789abcdef")
    with pytest.raises(RefusedError):
        members.authenticate("A.old-0123456789abcdef")
    with pytest.raises(RefusedError) as info:
        members.join(secrets["A"], "A.old-0123456789abcdef")  # a replay
    assert info.value.code == "invitation_used"


def test_invitations_expire_and_are_withdrawn(make_federation):
    federation = make_federation("A", "B")
    members, now = federation.coordinator.members, federation.now
    secrets = {one.member: one.secret for one in members.open_invitations(now)}
    federation.now += 15 * 86_400
    with pytest.raises(RefusedError) as info:
        members.join(secrets["A"], "A.0123456789abcdef")
    assert info.value.code == "invitation_expired"
    federation.now -= 15 * 86_400
    federation.coordinator.invite("B", "site", by="boss")
    with pytest.raises(RefusedError) as info:
        members.join(secrets["B"], "B.0123456789abcdef")
    assert info.value.code == "invitation_expired"


def test_names_are_not_taken_twice(make_federation):
    federation = make_federation("A", "B")
    for name, role in (("A", "observer"), ("a", "site")):
        with pytest.raises(RefusedError, match="is taken"):
            federation.coordinator.invite(name, role, by="boss")


def test_the_log_of_a_federation_is_a_chain(make_federation):
    federation = make_federation("A", "B")
    federation.start("A", "B")
    federation.act("pause")
    rows = federation.store.load_log()
    assert len(rows) > 5 and audit_log.first_break(rows) is None
    changed = [*rows[:2], (*rows[2][:5], "{}", rows[2][6]), *rows[3:]]
    assert audit_log.first_break(changed).number == 3
    assert audit_log.first_break([*rows[:2], *rows[3:]]).reason == "line 3 is missing"


def test_a_folder_of_the_first_version_is_taken_over(make_federation, tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    database = sqlite3.connect(folder / "coordinator.sqlite")
    database.executescript(FIRST_SCHEMA)
    database.execute(
        "INSERT INTO meta VALUES ('settings', ?)",
        (
            json.dumps(
                {
                    "federation": "old",
                    "sites": ["A", "B"],
                    "matching": "name",
                    "weighting": "cases",
                    "num_epochs": 3,
                    "num_iterations_per_epoch": None,
                    "num_val_iterations_per_epoch": None,
                    "quorum": None,
                    "deadline_s": None,
                }
            ),
        ),
    )
    database.execute("INSERT INTO sites VALUES ('A', NULL, 'x', ?)", ("t" * 64,))
    database.execute("INSERT INTO sites VALUES ('B', 'secret', 'y', NULL)")
    for kind in ("creation", "join"):
        database.execute("INSERT INTO events (time, kind, site, key, detail) VALUES (1, ?, NULL, NULL, '{}')", (kind,))
    database.execute("PRAGMA user_version = 1")
    database.commit()
    database.close()
    federation = Federation(folder)
    try:
        members = federation.store.load_members()
        assert [(one.name, one.role, one.state) for one in members.values()] == [
            ("A", "site", "active"),
            ("B", "site", "invited"),
        ]
        assert [one.secret for one in federation.coordinator.members.open_invitations(federation.now)] == ["secret"]
        federation.start("A", "B")
        assert audit_log.first_break(federation.store.load_log()) is None
        with (
            pytest.raises(sqlite3.IntegrityError, match="append-only"),
            federation.store._database.transaction() as connection,
        ):
            connection.execute("DELETE FROM events")
    finally:
        federation.store.close()


FIRST_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE sites (name TEXT PRIMARY KEY, invitation TEXT, invitation_hash TEXT NOT NULL, token_hash TEXT)
    WITHOUT ROWID;
CREATE TABLE gatherings (key TEXT PRIMARY KEY, opened REAL NOT NULL, required TEXT NOT NULL, outcome TEXT)
    WITHOUT ROWID;
CREATE TABLE contributions (key TEXT NOT NULL, site TEXT NOT NULL, digest TEXT NOT NULL, size INTEGER NOT NULL,
    received REAL NOT NULL, PRIMARY KEY (key, site)) WITHOUT ROWID;
CREATE TABLE results (key TEXT NOT NULL, subset TEXT NOT NULL, digest TEXT NOT NULL, PRIMARY KEY (key, subset))
    WITHOUT ROWID;
CREATE TABLE traffic (site TEXT NOT NULL, key TEXT NOT NULL, received INTEGER NOT NULL, sent INTEGER NOT NULL,
    last_seen REAL NOT NULL, PRIMARY KEY (site, key)) WITHOUT ROWID;
CREATE TABLE events (number INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, kind TEXT NOT NULL, site TEXT,
    key TEXT, detail TEXT NOT NULL);
CREATE TRIGGER events_stay BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
CREATE TRIGGER events_remain BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
"""


# ----------------------------------------------------------------------------------------------- a floor is a floor
def lines_with(federation: Federation, text: str) -> list[str]:
    federation.lines.extend(federation.coordinator.worker._describe_lacking())
    return [line for line in federation.lines if text in line]


def leave(federation: Federation, site: str) -> None:
    federation.act("leave", Member(site, "site"))


def be_revoked(federation: Federation, site: str) -> None:
    federation.coordinator.revoke(site, by="boss")
    federation.close()


def fail(federation: Federation, site: str) -> None:
    federation.coordinator.report_failure(site, FailureReport(run=RUN, round=0, reason="OutOfMemoryError"))
    federation.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"min_sites": 3}, {"min_sites": 3, "quorum": 3, "deadline_s": 10.0}, {"quorum": 3, "deadline_s": 10.0}]
)
@pytest.mark.parametrize("go", [leave, be_revoked, fail])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_no_round_is_closed_with_fewer_sites_whoever_goes(make_federation, settings, go, late):
    federation = make_federation(*"ABCD", **settings)
    federation.start(*"ABCD")
    for site in "CD" if not late else "":
        go(federation, site)
    federation.update(0, "A", 1)
    federation.update(0, "B", 2)
    for site in "CD" if late else "":
        go(federation, site)
    federation.now += 1e6
    federation.close()
    assert not federation.state.registry.is_closed(RoundKey(RUN, 0))
    (status,) = (one for one in federation.coordinator.status().waiting if one.key == RoundKey(RUN, 0))
    assert status.lacks == 1
    waiting = federation.coordinator.result(RoundKey(RUN, 0), "A")
    assert waiting.lacks == (0 if go is fail else 1) and waiting.waiting_for == (("C", "D") if go is fail else ())
    assert bool(lines_with(federation, "rounds/0 waits: A, B have contributed")) == (go is not fail)


def test_a_site_that_returns_lets_the_round_close(make_federation):
    federation = make_federation(*"ABCD", min_sites=3)
    federation.start(*"ABCD")
    leave(federation, "C")
    leave(federation, "D")
    for number, site in enumerate("AB"):
        federation.update(0, site, number)
    federation.act("return", Member("C", "site"))
    federation.update(0, "C", 3)
    message, _ = federation.aggregate(0)
    assert sorted(message.contributors) == ["A", "B", "C"]


def test_sites_are_served_while_a_line_cannot_be_written(make_federation, monkeypatch):
    """The output may be a pipe that nobody reads."""
    federation = make_federation("A", "B", "C", min_sites=3)
    is_told, go_on = threading.Event(), threading.Event()

    def log(line: str) -> None:
        if "nobody else takes part" in line:
            is_told.set()
            assert go_on.wait(PATIENCE_S)

    monkeypatch.setattr(federation.state, "_log", log)
    for site in "AB":
        federation.send(CensusKey(), site, make_census())
    federation.coordinator.start()
    try:
        revoking = threading.Thread(target=federation.coordinator.revoke, args=("C",), kwargs={"by": "boss"})
        revoking.start()
        assert is_told.wait(PATIENCE_S)
        sending = threading.Thread(target=federation.state._wake_worker, daemon=True)
        sending.start()
        sending.join(PATIENCE_S)
        assert not sending.is_alive() and not go_on.is_set()
        revoking.join(PATIENCE_S)
    finally:
        go_on.set()
        federation.coordinator.stop()


def test_nobody_is_handed_the_update_of_a_single_site(make_federation):
    federation = make_federation("A", "B")
    federation.start("A", "B")
    leave(federation, "B")
    federation.update(0, "A", 1)
    federation.act("return", Member("B", "site"))
    assert isinstance(federation.coordinator.result(RoundKey(RUN, 0), "B"), Waiting)
    with pytest.raises(RefusedError, match="cannot be closed with A: it needs at least 2 contributions"):
        federation.act("proceed")


def test_the_operator_may_go_below_a_quorum_and_not_below_the_floor(make_federation):
    federation = make_federation(*"ABCD", min_sites=2, quorum=3, deadline_s=10.0)
    federation.start(*"ABCD")
    federation.update(0, "A", 1)
    with pytest.raises(RefusedError, match="at least 2 contributions .--min-sites"):
        federation.act("proceed")
    federation.update(0, "B", 1)
    federation.act("proceed")
    assert federation.state.registry.is_closed(RoundKey(RUN, 0))


def test_who_goes_after_the_operator_has_decided_is_not_counted(make_federation):
    federation = make_federation(*"ABC", min_sites=2)
    federation.start(*"ABC")
    federation.update(0, "A", 1)
    federation.update(0, "B", 1)
    federation.act("pause")
    federation.act("proceed")
    be_revoked(federation, "B")
    federation.act("resume")
    assert not federation.state.registry.is_closed(RoundKey(RUN, 0))
    federation.update(0, "C", 1)  # is not too late
    assert sorted(federation.aggregate(0)[0].contributors) == ["A", "C"]


PAIR = {**SHAPES, "deep.weight": (5, 2)}


def test_what_too_few_sites_have_is_not_shared(make_federation):
    federation = make_federation(*"ABCD", min_sites=3)
    for number, (site, shapes) in enumerate(zip("ABCD", (PAIR, PAIR, SHAPES, SHAPES))):
        federation.send(RegistrationKey(RUN), site, make_registration(number + 1, shapes))
    shared = federation.state.documents.agreement(RUN).match.shared
    assert set(shared) == set(SHAPES)
    other = make_federation(*"ABCD")
    for number, (site, shapes) in enumerate(zip("ABCD", (PAIR, PAIR, SHAPES, SHAPES))):
        other.send(RegistrationKey(RUN), site, make_registration(number + 1, shapes))
    assert sorted(other.coordinator.state.documents.agreement(RUN).match.shared["deep.weight"]) == ["A", "B"]
    assert [line for line in other.lines if "1 of 4 shared tensors are those of two sites only" in line]


def test_a_network_of_which_too_few_sites_have_anything_is_refused_with_the_cause(make_federation):
    federation = make_federation(*"ABCD", min_sites=3)
    foreign = {"foreign.weight": (7, 3)}
    for site, shapes in zip("ABCD", (SHAPES, SHAPES, foreign, foreign)):
        federation.send(RegistrationKey(RUN), site, make_registration(2, shapes, {}))
    refusal = federation.state.registry.get(RegistrationKey(RUN)).refusal
    assert "fewer than 3 sites have, and --min-sites 3 keeps it from being averaged" in refusal


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_tensor_with_too_few_holders_in_a_round_keeps_its_values(make_federation, precision):
    federation = make_federation(*"ABCD", min_sites=2, quorum=2, deadline_s=10.0, precision=precision)
    dtype = np.float16 if precision == "float16" else np.float32
    networks = dict(zip("ABCD", (PAIR, PAIR, SHAPES, SHAPES)))
    for number, (site, shapes) in enumerate(networks.items()):
        federation.send(RegistrationKey(RUN), site, make_registration(number + 1, shapes))
    owners = federation.state.documents.agreement(RUN).match.initial_owner
    for site in networks:
        initial = make_weights(0, PAIR)
        federation.send(
            InitialKey(RUN),
            site,
            messages.Update(),
            {name: initial[name] for name, owner in owners.items() if owner == site},
        )
    deep, head = [], []
    for number, sites in enumerate(("ACD", "ABC", "BCD")):
        for seed, site in enumerate(sites):
            weights = make_weights(10 * number + seed, networks[site])
            federation.send(
                RoundKey(RUN, number),
                site,
                messages.Update(),
                {name: values.astype(dtype) for name, values in weights.items()},
            )
        federation.now += 100
        federation.close()
        with federation.state.documents.result(RoundKey(RUN, number)) as document:
            deep.append(document.read("deep.weight"))
            head.append(document.read("head.weight"))
    assert np.array_equal(deep[0], initial["deep.weight"]) and not np.array_equal(deep[1], deep[0])
    assert np.array_equal(deep[2], deep[1]) and not np.array_equal(head[2], head[1])
    assert [record["kept"] for record in federation.store.load_rounds(RUN, 0)] == [1, 0, 1]
    assert len(lines_with(federation, "1 tensors keep their values, since fewer than 2 of the sites")) == 2


def test_a_latecomer_changes_nothing_of_what_is_shared(make_federation):
    federation = make_federation(*"ABCD", min_sites=3)
    for number, (site, shapes) in enumerate(zip("ABC", (PAIR, PAIR, SHAPES))):
        federation.send(RegistrationKey(RUN), site, make_registration(number + 1, shapes))
    federation.act("proceed")
    federation.send(AdmissionKey(RUN, "D"), "D", make_registration(9, PAIR))
    match = federation.state.documents.agreement(RUN).match
    assert set(match.shared) == set(SHAPES) and all("D" in sites for sites in match.shared.values())


def test_a_run_does_not_begin_with_too_few_sites(make_federation):
    federation = make_federation(*"ABCD", min_sites=3)
    for site in "AB":
        federation.send(RegistrationKey(RUN), site, make_registration(1))
    with pytest.raises(RefusedError, match="registration cannot be closed with A, B: it needs at least 3"):
        federation.act("proceed")
    be_revoked(federation, "C")
    be_revoked(federation, "D")
    assert not federation.state.registry.is_closed(RegistrationKey(RUN))
    assert lines_with(federation, "registration waits: A, B have contributed")


def test_statistics_of_too_few_sites_are_not_pooled(make_federation):
    federation = make_federation("A", "B", "C", min_sites=2)
    for site in "BC":
        be_revoked(federation, site)
    federation.send(keys.CensusKey(), "A", make_census(5))
    assert not federation.state.registry.is_closed(keys.CensusKey())
    federation.coordinator.invite("B", "site", by="boss")
    federation.send(keys.CensusKey(), "B", make_census(6))
    assert federation.state.registry.is_closed(keys.CensusKey())


def test_what_too_few_sites_have_validated_is_told_to_nobody_else(make_federation):
    federation = make_federation("A", "B")
    federation.start("A", "B")
    for number in range(2):
        federation.update(number, "A", 1)
        federation.update(number, "B", 2)
        if number == 0:
            federation.send(ValidationKey(RUN, 0), "A", messages.Validation(tp=(8,), fp=(2,), fn=(2,)))
    (record,) = federation.store.load_validations(RUN)
    assert (record["dice"], record["mean_dice"], record["best_round"]) == ([None], None, None)
    assert record["dice_of_site"] == {"A": [0.8]}, "who may see curves sees it"
    with federation.state.documents.result(ValidationKey(RUN, 0)) as document:
        assert document.message.dice == (None,) and not document.message.dice_of_site


def test_the_floor_can_be_raised_and_not_lowered(make_federation):
    coordinator = make_federation("A", "B", "C", min_sites=2).coordinator
    assert coordinator.change_settings(SettingsChange(min_sites=3), by="boss").min_sites == 3
    for change, complaint in (
        (SettingsChange(min_sites=2), "raised, not lowered"),
        (SettingsChange(min_sites=4), "--min-sites 4 is more than the 3 sites"),
        (SettingsChange(quorum=2, deadline_s=9.0), "--quorum 2 is less than --min-sites 3"),
    ):
        with pytest.raises(FederationError, match=complaint):
            coordinator.change_settings(change, by="boss")
    assert coordinator.change_settings(SettingsChange(validate_every=2), by="boss").min_sites == 3
    assert coordinator.state.store.load_settings().min_sites == 3


def test_settings_say_what_they_always_said_while_the_floor_is_two():
    plain = make_settings().model_dump(mode="json")
    assert "min_sites" not in plain and make_settings(min_sites=3).model_dump(mode="json")["min_sites"] == 3
    assert type(make_settings()).model_validate(plain) == make_settings()
    assert "lacks" not in GatheringStatus(key="k", contributed=(), waiting_for=(), opened=0.0).model_dump()
    assert "lacks" not in Waiting(waiting_for=(), lacks=3).model_dump()


def test_a_site_sees_no_traffic_of_others(make_federation):
    federation = make_federation("A", "B")
    members = federation.coordinator.members
    for site, received in (("A", 100), ("B", 12_345)):
        federation.send(keys.CensusKey(), site, make_census(received))
        members.count(site, keys.CensusKey(), Traffic(received, 7, 1000.0))
    seen = federation.coordinator.status(Member("A", "site"))
    assert [(one.site, one.bytes_received) for one in seen.traffic] == [("A", 100)]
    assert {one.site: (one.bytes_received, one.bytes_sent) for one in seen.sites} == {"A": (100, 7), "B": (0, 0)}
    assert "12345" not in seen.model_dump_json()
    for viewer in (OPERATOR, Member("eve", "observer"), None):
        assert "12345" in federation.coordinator.status(viewer).model_dump_json()


def test_no_values_of_plans_are_told_when_a_run_ends_without_a_model(make_federation):
    federation = make_federation("A", "B", num_epochs=1)
    for site, voxels in (("A", 987001), ("B", 654002)):
        plans = make_plans(configurations={"3d_fullres": {"median_image_size_in_voxels": [voxels, 9, 9]}})
        federation.send(RegistrationKey(RUN), site, make_registration(2, plans=plans))
    for site in "AB":
        federation.send(InitialKey(RUN), site, messages.Update(), make_weights(0) if site == "A" else {})
    federation.update(0, "A", 1)
    federation.update(0, "B", 1)
    with pytest.raises(RefusedError) as info:
        federation.coordinator.models.find(RUN)
    tail = LogTail(federation.store, is_run=federation.state.registry.has_run)
    tail.read_on()
    for text in (str(info.value), tail.models[RUN]):
        assert "median_image_size_in_voxels[0] is not the same at A and at B" in text
        assert "987001" not in text and "654002" not in text


def test_lines_of_earlier_versions_lose_the_values_of_plans():
    old = (
        "no model folder is written, the last aggregate is /x: the plans differ: plans.configurations.2d.spacing[0] "
        'is 0.7 at A and {"a": 1} at B, C'
    )
    assert without_values(old).endswith("/x: the plans differ")
    for kept in ("model written to /x/y and /x/y.zip", "plans differ: plans.x is not the same at A and at B"):
        assert without_values(f"the {kept}") == f"the {kept}"
