"""What a site says about its failures: bounded after escaping, about runs that there are, some hundreds a day."""

from __future__ import annotations

import json

import pytest
import requests
from fake_federation import RUN, make_census, make_registration, make_settings, served

from nnunetv2.federated.commands import audit_log
from nnunetv2.federated.coordinator.dashboard import audit_tail
from nnunetv2.federated.coordinator.run_control import FAILURES_PER_DAY, FailureBudget
from nnunetv2.federated.coordinator.service import Coordinator
from nnunetv2.federated.coordinator.storage.audit_log import LOGGED_CHARACTERS, Event
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.api import FailureReport
from nnunetv2.federated.protocol.document import write_document
from nnunetv2.federated.protocol.keys import CensusKey, PlansKey, RegistrationKey
from nnunetv2.federated.protocol.strict_json import encode_json
from nnunetv2.utilities.plain_text import excerpt, printable

TEXTS = [
    "\u200b" * 8000,
    "\U000e0001" * 8000,
    "\x1b[2J" * 2000,
    "\U0001f600" * 8000,
    "ü" * 8000,
    '"\\' * 4000,
    "a" * 8000,
    "\n" * 8000,
    "\x00" * 8000,
]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text[0]))
@pytest.mark.parametrize("characters", [0, 1, 11, 500])
def test_an_excerpt_is_bounded_after_everything_that_makes_it_longer(text, characters):
    found = excerpt(text, characters)
    assert len(json.dumps(found)) - 2 <= characters
    assert found.isprintable() and printable(text).startswith(found)


def test_a_short_text_stays_as_it_is():
    assert excerpt("OutOfMemoryError: Größe", 500) == "OutOfMemoryError: Größe"


@pytest.fixture
def federation(tmp_path):
    with served(tmp_path / "federation", make_settings(sites=("A", "B"))) as federation:
        for site in "AB":
            federation.credential(site)
        with federation.client("A") as client:
            client.contribute(RegistrationKey(RUN), make_registration())
        yield federation


def ask(federation, site: str, method: str, path: str, body: bytes | None = None) -> requests.Response:
    return requests.request(
        method,
        f"{federation.url}/v1/{path}",
        data=body,
        timeout=30,
        headers={"Authorization": f"Bearer {federation.credential(site).token}"},
    )


def report(run: str = RUN, reason: str = "out of memory", number: int | None = None) -> bytes:
    return encode_json(FailureReport(run=run, round=number, reason=reason))


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text[0]))
def test_no_report_breaks_the_status(federation, text):
    assert ask(federation, "A", "POST", "failures", report(reason=text)).status_code == 204
    assert ask(federation, "A", "POST", "failures", report(reason=text, number=0)).status_code == 204
    for _ in range(2):
        status = ask(federation, "B", "GET", "status")
        assert status.status_code == 200
        assert [one["reason"] for one in status.json()["failures"]] == [excerpt(text, LOGGED_CHARACTERS)] * 2
    event = federation.state.store.load_events("failure")[-1]
    assert len(json.dumps(event.detail)) < LOGGED_CHARACTERS + 200


@pytest.mark.slow
@pytest.mark.parametrize("run", ["x", "", "\u200b" * 500, RUN + " "])
def test_a_report_is_about_a_run_that_there_is(federation, run):
    answer = ask(federation, "A", "POST", "failures", report(run=run))
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_run")
    assert federation.state.store.load_events("failure") == []
    assert ask(federation, "B", "GET", "status").status_code == 200


def test_what_earlier_versions_wrote_down_is_shown_shortened(federation, capsys):
    """Their lines could be longer than a status may hold, and about runs that there never were."""
    store, long = federation.state.store, "\\u200b" * 8000
    for number in range(30):
        detail = {"run": f"{long[:5000]}{number}", "round": None, "reason": long}
        store.add_event(Event(1.0, "failure", "A", None, detail))
    store.add_event(Event(2.0, "failure", "A", None, {"run": RUN, "round": 3, "reason": long}))
    again = Coordinator(store, log=lambda line: None)
    assert all(len(one.reason) <= LOGGED_CHARACTERS >= len(one.run) for one in again.status().failures)
    assert len(again.status().failures) == 31
    tail = audit_tail.LogTail(store, is_run=again.state.registry.has_run)
    tail.read_on()
    assert list(tail._reasons) == [(RUN, "A")]
    assert max(len(one.text) for one in tail.troubles) <= LOGGED_CHARACTERS
    assert audit_log.describe("failure", None, {"run": "r", "round": None, "reason": "x"}) == "r: x"


@pytest.mark.slow
def test_a_site_may_fail_some_hundred_times_a_day(tmp_path):
    with served(tmp_path / "federation", make_settings(sites=("A", "B"))) as federation:
        now, coordinator = [1000.0], federation.coordinator
        coordinator._failure_budget = FailureBudget(clock=lambda: now[0])
        federation.credential("A"), federation.credential("B")
        with federation.client("A") as client:
            client.contribute(RegistrationKey(RUN), make_registration())
        failed = FailureReport(run=RUN, reason="out of memory")
        for _ in range(FAILURES_PER_DAY):
            coordinator.report_failure("A", failed)
        with pytest.raises(RefusedError) as info:
            coordinator.report_failure("A", failed)
        assert info.value.code == "too_many_requests"
        assert ask(federation, "A", "POST", "failures", report()).status_code == 429
        coordinator.report_failure("B", failed)
        coordinator.state.clock = lambda: 1e6  # decades ago: somebody has set the clock of the machine
        with pytest.raises(RefusedError):
            coordinator.report_failure("A", failed)
        now[0] += 86_400 / FAILURES_PER_DAY + 1
        coordinator.report_failure("A", failed)
        assert len(coordinator.state.store.load_events("failure")) == FAILURES_PER_DAY + 2


def test_why_something_was_refused_is_bounded_too(federation, tmp_path):
    """A refusal quotes what a site has sent: the key of a field, say."""
    coordinator, path = federation.coordinator, tmp_path / "document"
    with federation.client("A") as a, federation.client("B") as b:
        a.contribute(CensusKey(), make_census())
        b.contribute(CensusKey(), make_census(labels={"background": 0, "\u200b" * 500: 1}))
        a.contribute(PlansKey("p"), messages.PlansReport(plans={"\U0001f600" * 100_000: 1}))
        b.contribute(PlansKey("p"), messages.PlansReport(plans={"x": 1}))
        for key in (CensusKey(), PlansKey("p")):
            with pytest.raises(RefusedError):
                b.result(key)
    write_document(path, messages.PlansReport(plans={}), {}, [])
    with pytest.raises(Exception, match="message"):
        coordinator.contribute(RegistrationKey(RUN), "B", path, "0" * 64, 10)
    for event in coordinator.state.store.load_events("refusal"):
        assert len(json.dumps(event.detail)) < LOGGED_CHARACTERS + 200
    assert max(len(one.refusal) for one in coordinator.status().waiting) <= 8000
