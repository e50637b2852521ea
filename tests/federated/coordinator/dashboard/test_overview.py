"""What people are told of a federation: the overview, the curves, the figures for Prometheus, the tail of the log."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from fake_federation import RUN, incoming_path, make_census, make_registration, make_settings, make_weights

from nnunetv2.federated.commands import status
from nnunetv2.federated.coordinator.dashboard import audit_tail, curves, overview, prometheus
from nnunetv2.federated.coordinator.dashboard.overview import OverviewBuilder
from nnunetv2.federated.coordinator.members import Member, create_federation
from nnunetv2.federated.coordinator.service import Coordinator
from nnunetv2.federated.coordinator.storage.audit_log import Event
from nnunetv2.federated.coordinator.storage.store import Store, Traffic
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.api import FailureReport, RunAction
from nnunetv2.federated.protocol.document import TensorSpec, write_document
from nnunetv2.federated.protocol.keys import CensusKey, InitialKey, RegistrationKey, RoundKey, ValidationKey
from nnunetv2.utilities.durations import format_duration

BOSS = Member("boss", "operator")


class Federation:
    """A coordinator whose clock is set by hand, and which closes exchanges on request."""

    def __init__(self, folder, **settings) -> None:
        self.now = 1000.0
        self.store = Store(folder)
        create_federation(self.store, make_settings(**settings), now=self.now)
        self.coordinator = Coordinator(self.store, log=lambda line: None, clock=lambda: self.now)
        self.state = self.coordinator.state
        self.builder = OverviewBuilder(self.coordinator)
        members = self.coordinator.members
        for invitation in members.open_invitations(self.now):
            members.join(invitation.secret, f"{invitation.member}.{'x' * 40}{invitation.member}")

    def send(self, key: str, site: str, message, tensors=None) -> None:
        tensors = tensors or {}
        path = incoming_path(self.store)
        specs = {name: TensorSpec.of(values) for name, values in tensors.items()}
        digest = write_document(path, message, specs, tensors.values())
        self.coordinator.contribute(key, site, path, digest, path.stat().st_size)
        worker = self.coordinator.worker
        while ready := worker._ready():
            for exchange in ready:
                worker._close(exchange.key)

    def start(self, *sites: str) -> None:
        for number, site in enumerate(sites):
            self.send(RegistrationKey(RUN), site, make_registration(number + 1))
        for site in sites:
            self.send(InitialKey(RUN), site, messages.Update(), make_weights(0) if site == sites[-1] else {})

    def update(self, number: int, site: str, **measured) -> None:
        self.send(RoundKey(RUN, number), site, messages.Update(metrics=measured), make_weights(number))

    def look(self):
        return self.builder.build()

    def run(self):
        (run,) = self.look().runs
        return run


@pytest.fixture
def make_federation(tmp_path):
    made = []

    def make(*sites: str, **settings) -> Federation:
        made.append(Federation(tmp_path / f"federation{len(made)}", sites=sites, **{"num_epochs": 5, **settings}))
        return made[-1]

    yield make
    for federation in made:
        federation.store.close()


def activities(run) -> dict[str, str]:
    return {member.site: member.activity for member in run.members}


# --------------------------------------------------------------------------------------------------------- overview
def test_before_anything_happens_sites_are_idle(make_federation):
    federation = make_federation("A", "B")
    seen = federation.look()
    assert (seen.runs, seen.meetings, seen.troubles) == ((), (), ())
    assert [(site.site, site.state, site.activity) for site in seen.sites] == [
        ("A", "active", "idle"),
        ("B", "active", "idle"),
    ]


def test_the_page_tells_what_sites_do_beside_averaging(tmp_path):
    assert Federation(tmp_path / "plain").builder.build().methods == ()
    settings = {"proximal": 0.01, "keep_local": "norm", "finetune_epochs": 2, "initial_weights": "ab" * 32}
    lines = Federation(tmp_path / "all", **settings).builder.build().methods
    for line, part in zip(lines, ("strength 0.01", "own tensors of norm", "for 2 epochs", "SHA-256 abababababab")):
        assert part in line
    assert len(lines) == 4


def test_invited_and_revoked_sites_are_told_apart(make_federation):
    federation = make_federation("A", "B")
    federation.coordinator.invite("C", "site", by="boss", lifetime_s=100.0)
    federation.coordinator.revoke("A", by="boss")
    found = {site.site: (site.state, site.activity, site.expires) for site in federation.look().sites}
    assert found == {
        "A": ("revoked", "revoked", None),
        "B": ("active", "idle", None),
        "C": ("invited", "invited", 1100.0),
    }
    assert [site.site for site in federation.look().sites] == ["B", "C", "A"], "who is gone comes last"


def test_open_gatherings_before_training_say_who_is_waited_for(make_federation):
    federation = make_federation("A", "B")
    federation.send(CensusKey(), "A", make_census())
    (meeting,) = federation.look().meetings
    assert (meeting.kind, meeting.contributed, meeting.waiting_for, meeting.since) == ("census", ("A",), ("B",), 1000.0)


def test_a_refusal_is_told_with_its_remedy(make_federation):
    federation = make_federation("A", "B")
    federation.send(CensusKey(), "A", make_census())
    federation.send(CensusKey(), "B", make_census(labels={"background": 0, "spleen": 1}))
    (meeting,) = federation.look().meetings
    assert "the sites' datasets do not go together" in meeting.refusal and "Make dataset.json" in meeting.refusal


def test_a_run_goes_through_its_stages(make_federation):
    federation = make_federation("A", "B")
    federation.send(RegistrationKey(RUN), "A", make_registration(1))
    run = federation.run()
    assert (run.meeting.kind, run.meeting.waiting_for, activities(run)) == (
        "registration",
        ("B",),
        {"A": "waiting", "B": "working"},
    )
    federation.now = 1010.0
    federation.send(RegistrationKey(RUN), "B", make_registration(2))
    run = federation.run()
    assert (run.meeting.kind, run.meeting.since) == ("initial", 1010.0), "it waits since the registration was closed"
    federation.send(InitialKey(RUN), "A", messages.Update())
    federation.send(InitialKey(RUN), "B", messages.Update(), make_weights(0))
    run = federation.run()
    assert (run.meeting.key, run.meeting.waiting_for, run.rounds_closed) == (RoundKey(RUN, 0), ("A", "B"), 0)
    federation.now = 1020.0
    federation.update(0, "A")
    federation.now = 1030.0
    run = federation.run()
    assert [(member.site, member.activity, member.since) for member in run.members] == [
        ("A", "waiting", 1020.0),
        ("B", "working", 1010.0),
    ]


def test_the_time_left_follows_from_the_last_rounds(make_federation):
    federation = make_federation("A", "B", num_epochs=10)
    federation.start("A", "B")
    for number, seconds in enumerate((500.0, 30.0, 30.0, 40.0)):
        federation.now += seconds
        federation.update(number, "A"), federation.update(number, "B")
    run = federation.run()
    assert (run.round_s, run.left_s) == (30.0, 6 * 30.0), "the median of 30, 30, 40; the first has no beginning"
    federation.now += 10
    assert federation.run().left_s == 6 * 30.0 - 10
    federation.now += 1000
    assert federation.run().left_s == 5 * 30.0, "a late round is about to end, for all one knows"


def test_deadline_and_quorum_are_told(make_federation):
    federation = make_federation("A", "B", "C", quorum=2, deadline_s=60.0)
    federation.start("A", "B", "C")
    federation.now = 1100.0
    federation.update(0, "A")
    assert federation.run().meeting.due is None, "nothing goes on without a quorum"
    federation.update(0, "B")
    meeting = federation.run().meeting
    assert (meeting.due, meeting.quorum, meeting.waiting_for) == (1160.0, 2, ("C",))
    federation.now = 1160.0
    federation.update(0, "B")  # wakes the aggregation worker
    run = federation.run()
    assert (run.rounds_closed, run.last_missing) == (1, ("C",))


def test_a_failed_site_is_told_with_its_reason_until_it_contributes(make_federation):
    federation = make_federation("A", "B")
    federation.start("A", "B")
    federation.coordinator.report_failure("B", FailureReport(run=RUN, round=0, reason="no memory"))
    seen = federation.look()
    assert activities(seen.runs[0]) == {"A": "working", "B": "failed"}
    assert seen.runs[0].members[1].note == "no memory"
    assert [(one.site, one.activity, one.run) for one in seen.sites] == [("A", "working", RUN), ("B", "failed", RUN)]
    assert [(one.kind, one.site, one.text) for one in seen.troubles] == [("failure", "B", "no memory")]
    federation.update(0, "B")
    assert activities(federation.run()) == {"A": "working", "B": "waiting"}


def test_sites_that_have_left_are_not_waited_for_but_named(make_federation):
    federation = make_federation("A", "B")
    federation.start("A", "B")
    federation.coordinator.act(RUN, RunAction(action="leave"), Member("B", "site"))
    run = federation.run()
    assert activities(run) == {"A": "working", "B": "left"} and run.meeting.waiting_for == ("A",)


def test_an_upload_that_is_under_way_is_seen(make_federation):
    federation = make_federation("A", "B")
    federation.start("A", "B")
    with federation.coordinator.uploads.writing(RoundKey(RUN, 0), "A", "0" * 64, offset=0):
        run = federation.run()
        assert activities(run) == {"A": "sending", "B": "working"} and run.members[0].note == "0.0 MB"
        assert federation.look().health.uploads == 1
    assert activities(federation.run()) == {"A": "working", "B": "working"}


def test_paused_and_stopped_runs_say_so(make_federation):
    federation = make_federation("A", "B")
    federation.start("A", "B")
    federation.update(0, "A"), federation.update(0, "B")
    federation.coordinator.act(RUN, RunAction(action="pause"), BOSS)
    assert (federation.run().state, federation.run().left_s) == ("paused", None)
    federation.coordinator.act(RUN, RunAction(action="stop"), BOSS)
    run = federation.run()
    assert (run.state, run.meeting, run.members) == ("stopped", None, ()) and "model written to" in run.model


@pytest.mark.parametrize("num_epochs", [1, 2])
def test_a_round_may_close_while_people_are_told(make_federation, monkeypatch, num_epochs):
    federation = make_federation("A", "B", num_epochs=num_epochs)
    federation.start("A", "B")
    federation.update(0, "A")
    registry, is_told = federation.state.registry, []
    run_state = registry.run_state

    def close_then(run: str):
        before = run_state(run)
        if not is_told:
            is_told.append(run)
            federation.update(0, "B")
        return before

    monkeypatch.setattr(registry, "run_state", close_then)
    run = federation.run()
    assert (run.rounds_closed, run.state, run.meeting) == (0, "running", None), "as of the moment before"
    assert federation.run().rounds_closed == 1


def test_the_page_and_the_command_tell_the_same_time_left(make_federation):
    federation = make_federation("A", "B", num_epochs=100)
    federation.start("A", "B")
    for number in range(4):
        federation.now += 3600.0
        federation.update(number, "A"), federation.update(number, "B")
    federation.now += 1800.0
    told = "\n".join(status.describe(federation.coordinator.status(), url="https://x"))
    assert federation.run().left_s == 96 * 3600.0 - 1800.0
    assert f"about {format_duration(96 * 3600.0 - 1800.0)} left" in told
    federation.coordinator.act(RUN, RunAction(action="pause"), BOSS)
    told = "\n".join(status.describe(federation.coordinator.status(), url="https://x"))
    assert "per round" in told and "left" not in told and federation.run().left_s is None


# ----------------------------------------------------------------------------------------------------------- curves
def test_validations_and_class_names_are_in_the_curves(make_federation):
    federation = make_federation("A", "B")
    labels = {"background": 0, "tumour": 2, "liver": 1, "ignore": 3}
    for number, site in enumerate("AB"):
        federation.send(RegistrationKey(RUN), site, make_registration(number + 1, labels=labels))
    for site in "AB":
        federation.send(InitialKey(RUN), site, messages.Update(), make_weights(0) if site == "B" else {})
    federation.update(0, "A", loss=1.0, dice_per_class=[0.1, 0.2]), federation.update(0, "B", loss=math.nan)
    for site, tp in (("A", 8.0), ("B", 0.0)):
        federation.send(ValidationKey(RUN, 0), site, messages.Validation(tp=[tp, 0], fp=[2, 0], fn=[2, 0], loss=-0.5))
    found = curves.build_curves(federation.state, RUN)
    assert found.rounds[0].pooled == {"loss": 1.0} and found.rounds[0].sites["B"].metrics == {"loss": None}
    assert "dice_per_class" not in found.rounds[0].sites["A"].metrics
    assert found.validations[0].mean_dice == pytest.approx(2 * 8 / (16 + 4 + 4))
    assert found.validations[0].dice_of_site == {"A": 0.8, "B": 0.0}
    assert (found.classes.names, found.classes.pooled) == (("liver", "tumour"), (pytest.approx(2 / 3), None))


def test_names_of_classes_follow_the_labels_or_the_regions():
    def of(labels, **others):
        registration = make_registration(labels=labels)
        data = registration.dataset_json.model_copy(update=others)
        return curves.names_of_classes(registration.model_copy(update={"dataset_json": data}))

    assert of({"background": 0, "b": 2, "a": 1}) == ["a", "b"]
    assert of({"background": 0, "whole": (1, 2), "core": (2,)}, regions_class_order=(1, 2)) == ["whole", "core"]


def test_a_mean_of_huge_numbers_is_left_out():
    assert curves.pooled([(3.0, {"x": 1e308, "y": 1.0}), (1.0, {"x": 1e308, "y": None})]) == {"y": 1.0}


def test_counts_whose_sum_would_be_infinite_are_refused():
    with pytest.raises(ValueError, match="less than or equal to"):
        messages.Validation(tp=[1e308], fp=[0.0], fn=[0.0])


def test_what_is_measured_after_an_update_has_left_belongs_to_its_round(make_federation):
    federation = make_federation("A", "B", num_epochs=4)
    federation.start("A", "B")

    def update(number: int, site: str, loss: float, **earlier) -> None:
        federation.send(
            RoundKey(RUN, number),
            site,
            messages.Update(metrics={"train": float(number)}, **earlier),
            make_weights(number),
        )

    for site, loss in (("A", 3.0), ("B", 6.0)):  # B has twice as many cases
        update(0, site, loss)
    assert curves.build_curves(federation.state, RUN).rounds[0].pooled == {"train": 0.0}
    for site, loss in (("A", 3.0), ("B", 6.0)):
        update(1, site, loss, earlier=messages.EarlierMetrics(round=0, metrics={"val": loss, "dice": [0.5]}))
    first, second = curves.build_curves(federation.state, RUN).rounds
    assert first.sites["A"].metrics == {"train": 0.0, "val": 3.0} and first.pooled == {"train": 0.0, "val": 5.0}
    assert second.pooled == {"train": 1.0}
    assert federation.store.load_rounds(RUN)[1]["sites"]["B"]["earlier"] == {
        "round": 0,
        "metrics": {"val": 6.0, "dice": [0.5]},
    }
    update(2, "A", 3.0, earlier=messages.EarlierMetrics(round=1, metrics={"val": 4.0}))
    update(2, "B", 6.0, earlier=messages.EarlierMetrics(round=0, metrics={"val": 7.0, "train": 9.0}))  # it was away
    found = curves.build_curves(federation.state, RUN, since=1).rounds
    assert found[0].sites["A"].metrics == {"train": 1.0, "val": 4.0} and found[0].sites["B"].metrics == {"train": 1.0}


def test_curves_of_an_unknown_run_are_refused(make_federation):
    with pytest.raises(RefusedError) as info:
        curves.build_curves(make_federation("A", "B").state, "none")
    assert info.value.code == "unknown_run"


def test_curves_come_in_pieces_that_are_quick_to_read(make_federation, monkeypatch):
    """However much the sites have measured, and although who asks wants the last round that it knows once more."""
    federation = make_federation("A", "B", num_epochs=20)
    federation.start("A", "B")
    for number in range(9):
        for site in "AB":
            federation.update(number, site, train_losses=0.5, listed=[0.5] * 500)
    monkeypatch.setattr(curves, "CHARACTERS_AT_ONCE", 20_000)
    seen, since, pieces, more = set(), 0, 0, True
    while more:
        found = curves.build_curves(federation.state, RUN, since=since)
        assert 2 <= len(found.rounds) <= 4
        seen |= {one.round for one in found.rounds}
        since, pieces, more = found.rounds[-1].round, pieces + 1, found.more
    assert seen == set(range(9)) and pieces >= 3
    assert not curves.build_curves(federation.state, RUN, since=9).more
    monkeypatch.setattr(curves, "CHARACTERS_AT_ONCE", 1)
    assert [one.round for one in curves.build_curves(federation.state, RUN, since=3).rounds] == [3, 4]


# ---------------------------------------------------------------------------------------------------------- the log
def make_tail(federation) -> audit_tail.LogTail:
    return audit_tail.LogTail(federation.store, is_run=federation.state.registry.has_run)


def test_a_tail_that_begins_late_knows_what_one_knows_that_has_followed(make_federation):
    federation = make_federation("A", "B")
    followed = make_tail(federation)
    followed.read_on()
    federation.start("A", "B")
    for number in range(audit_tail.SHOWN_TROUBLES + 10):
        kind, site = ("late", "A") if number % 2 else ("refusal", None)
        federation.store.add_event(Event(float(number), kind, site, "key", {"seconds": 2.0, "message": str(number)}))
        federation.coordinator.report_failure("B", FailureReport(run=RUN, round=number, reason=str(number)))
    federation.store.add_event(Event(1.0, "model", None, RUN, {"outcome": "none"}))
    followed.read_on()
    begun = make_tail(federation)
    begun.read_on()
    for name in ("number", "head", "counts", "troubles", "models", "_reasons"):
        assert getattr(begun, name) == getattr(followed, name), name
    assert begun.reason(RUN, "B") == str(audit_tail.SHOWN_TROUBLES + 9)


def test_the_tail_reads_the_log_once(make_federation, monkeypatch):
    federation = make_federation("A", "B")
    monkeypatch.setattr(audit_tail, "_LINES_AT_ONCE", 3)
    tail = make_tail(federation)
    tail.read_on()
    for number in range(10):
        federation.store.add_event(Event(float(number), "late", "A", f"round {number}", {"seconds": 2.0}))
    tail.read_on()
    lines = federation.store.load_log()
    assert (tail.number, tail.head) == (lines[-1][0], lines[-1][-1])
    assert tail.counts["late", "A"] == 10 and len(tail.troubles) == 10
    asked = []
    monkeypatch.setattr(federation.store, "load_log", lambda after, limit: asked.append(after) or [])
    tail.read_on()
    assert asked == [tail.number]


def test_only_the_latest_troubles_are_kept(make_federation):
    federation = make_federation("A", "B")
    for number in range(audit_tail.SHOWN_TROUBLES + 5):
        federation.store.add_event(Event(float(number), "refusal", "A", "key", {"message": f"trouble {number}"}))
    troubles = federation.look().troubles
    assert len(troubles) == audit_tail.SHOWN_TROUBLES and troubles[0].text == f"trouble {audit_tail.SHOWN_TROUBLES + 4}"


# ---------------------------------------------------------------------------------------------------------- figures
SAMPLE = re.compile(r'([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\.)*",?)*)\})? (-?[0-9.e+-]+)')


def read_figures(text: str) -> dict[str, float]:
    """Parse the text format, as strictly as Prometheus does."""
    assert text.endswith("\n")
    found, types, current = {}, {}, None
    for line in text.splitlines():
        if line.startswith("# "):
            _, what, name, rest = line.split(" ", 3)
            if what == "TYPE":
                assert name not in types and rest in ("gauge", "counter", "summary")
                types[name], current = rest, name
            continue
        name, labels, value = SAMPLE.fullmatch(line).groups()
        assert name.removesuffix("_sum").removesuffix("_count") == current
        assert types[current] != "counter" or name.endswith("_total")
        place = f"{name}{{{labels}}}" if labels else name
        assert place not in found
        found[place] = float(value)
    return found


def expose(federation, **given) -> str:
    overview, tail = federation.look(), federation.builder.tail
    return prometheus.exposition(prometheus.FederationCollector(overview, federation.coordinator, tail, **given))


def figures_of(federation, **others) -> dict[str, float]:
    given = {"refusals": {"unauthorized": 3}, "sessions": 1, **others}
    return read_figures(expose(federation, **given))


def test_the_figures_say_how_the_federation_is(make_federation):
    federation = make_federation("A", "B", num_epochs=7)
    federation.coordinator.invite("C", "site", by="boss")
    federation.coordinator.members.count("A", "", Traffic(1000, 50, 990.0))
    federation.send(CensusKey(), "A", make_census())
    federation.send(RegistrationKey(RUN), "A", make_registration())
    federation.coordinator.report_failure("B", FailureReport(run=RUN, reason="no memory"))
    found = figures_of(federation)
    assert found['nnunet_fed_sites{state="active"}'] == 2 and found['nnunet_fed_sites{state="invited"}'] == 1
    assert found['nnunet_fed_site_received_bytes_total{site="A"}'] == 1000
    assert found['nnunet_fed_site_sent_bytes_total{site="A"}'] == 50
    assert found['nnunet_fed_site_last_seen_age_seconds{site="A"}'] == 10
    assert found['nnunet_fed_open_gatherings{kind="census"}'] == 1
    assert found[f'nnunet_fed_waiting_for_sites{{gathering="{CensusKey()}"}}'] == 2
    assert found['nnunet_fed_failures_total{site="B"}'] == 1
    assert found['nnunet_fed_requests_refused_total{code="unauthorized"}'] == 3
    assert found["nnunet_fed_page_sessions"] == 1 and found["nnunet_fed_uploads_in_progress"] == 0
    assert found["nnunet_fed_disk_free_bytes"] > 0 and found["nnunet_fed_cpu_seconds_total"] > 0


def test_the_figures_count_rounds_and_closings(make_federation):
    federation = make_federation("A", "B", num_epochs=7)
    federation.start("A", "B")
    federation.update(0, "A"), federation.update(0, "B")
    found = figures_of(federation)
    assert found[f'nnunet_fed_rounds_closed_total{{run="{RUN}"}}'] == 1
    assert found[f'nnunet_fed_rounds_planned{{run="{RUN}"}}'] == 7
    assert found[f'nnunet_fed_run_state{{run="{RUN}",state="running"}}'] == 1
    assert found[f'nnunet_fed_run_state{{run="{RUN}",state="paused"}}'] == 0
    assert found["nnunet_fed_closing_seconds_count"] == 3 and found["nnunet_fed_closing_seconds_sum"] > 0


def test_labels_are_escaped(make_federation):
    text = expose(make_federation("A", "B"), refusals={'a"b\\c\nd': 1}, sessions=0)
    name = "nnunet_fed_requests_refused_total"
    assert f"# HELP {name} Requests that were refused since the start, by code.\n# TYPE {name} counter\n" in text
    assert f'{name}{{code="a\\"b\\\\c\\nd"}} 1.0\n' in text


def test_memory_is_told_where_the_system_tells_it(monkeypatch):
    monkeypatch.setattr(prometheus.sys, "platform", "darwin")
    assert prometheus.memory_used() == []
    monkeypatch.setattr(prometheus.sys, "platform", "linux")
    assert prometheus.memory_used()[0] > 1 << 20


def test_an_overview_shows_many_sites(make_federation):
    federation = make_federation(*(f"site{number}" for number in range(64)))
    federation.start(*(f"site{number}" for number in range(64)))
    seen = federation.look()
    assert len(seen.sites) == 64 and np.all([member.activity == "working" for member in seen.runs[0].members])
    assert isinstance(seen, overview.Overview)
