"""What does not come from the coordinator is no answer, whatever its status: sites try again."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from cutter import moved
from fake_federation import RUN, in_threads, make_client, make_registration, make_settings, make_weights, served, train
from front_door import FrontDoor, Page

from nnunetv2.federated.commands.api_client import ask
from nnunetv2.federated.errors import CoordinatorUnreachable, FederationError, NotJoinedError, RefusedError, WireError
from nnunetv2.federated.protocol import api, messages
from nnunetv2.federated.protocol.invitation import Invitation
from nnunetv2.federated.protocol.keys import RegistrationKey, RoundKey, ValidationKey
from nnunetv2.federated.protocol.strict_json import encode_json
from nnunetv2.federated.site.credential import SiteCredential
from nnunetv2.federated.site.enrolment import join
from nnunetv2.federated.site.transports.answers import describe_foreign, find_problem

JSON = {"Content-Type": "application/json"}
REFUSAL = encode_json(api.Problem(code="unauthorized", message="log in"))
PAGES = {
    "ingress without backend": Page(404),
    "firewall": Page(403),
    "login wanted": Page(401, headers={"Content-Type": "text/html", "WWW-Authenticate": "Basic"}),
    "login page": Page(302, b"", {"Location": "https://login.hospital.example/?from=/v1/settings"}),
    "maintenance page": Page(200),
    "somebody else's JSON": Page(200, b'{"status": "maintenance"}', JSON),
    "an empty object": Page(200, b"{}", JSON),
    "somebody else's refusal": Page(403, b'{"code": "forbidden", "message": "no"}', JSON),
    "a refusal that is no JSON": Page(401, REFUSAL, {"Content-Type": "text/html"}),
    "proxy with a limit": Page(413),
    "cut off": Page(200, b'{"federation": "te', JSON, missing=40),
    "nothing": Page(204),
    "a file of somebody else": Page(200, b"x" * 1000, {"Content-Type": "application/octet-stream"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_every_call_of_a_training_outlasts_a_foreign_answer(tmp_path, monkeypatch, page):
    monkeypatch.setattr(
        "nnunetv2.federated.site.transports.http.OFFER_FROM_BYTES", 64
    )  # weights are offered, other documents not
    with served(tmp_path / "federation", make_settings(num_epochs=2)) as federation:
        lines: dict[str, list[str]] = {"A": [], "B": []}

        def take_part(site, seed):
            with FrontDoor(federation.url, page) as door:
                with make_client(moved(federation.credential(site), door.url), lines[site], pause_s=0.01) as client:
                    assert client.settings().federation == "test"
                    digest = train(client, seed=seed, num_rounds=2)
                    client.contribute(ValidationKey(RUN, 1), messages.Validation(tp=(8,), fp=(2,), fn=(2,)))
                    assert client.status().federation == "test"
                    client.fetch_model(RUN, tmp_path / f"{site}.zip", largest=1 << 20)
                assert {method for method, _ in door.asked} == {"GET", "POST", "PUT"}
                return digest

        first, second = in_threads(lambda: take_part("A", 1), lambda: take_part("B", 2))
        assert first == second, (first, second)
    assert any("trying again" in line for line in lines["A"])
    # The last validation may come between the two, and adds the best model: compare what both hold.
    assert final_checkpoint(tmp_path / "A.zip") == final_checkpoint(tmp_path / "B.zip")


def final_checkpoint(model: Path) -> bytes:
    with zipfile.ZipFile(model) as content:
        [name] = [name for name in content.namelist() if name.endswith("/checkpoint_final.pth")]
        return content.read(name)


def test_the_line_says_what_has_answered():
    url = "https://coordinator.example/federation/v1/gatherings/runs/r/rounds/3?wait=25"
    html = {"Content-Type": "text/html; charset=utf-8"}
    assert describe_foreign(url, 404, "Not Found", html) == (
        "https://coordinator.example/federation answers with status 404 (Not Found), text/html, not as a coordinator "
        "would"
    )
    assert "it points to https://login.hospital.example, not as" in describe_foreign(
        url, 302, "Found", {"Location": "https://login.hospital.example/secret?token=x"}
    )
    assert "\x1b" not in describe_foreign(url, 404, "Not \x1b[2J Found", {"Content-Type": "text/\x1b[31m"})
    assert "client_max_body_size" in describe_foreign(url, 413, "Request Entity Too Large", html)


@pytest.mark.slow
def test_the_line_is_told_once_however_often_it_happens(tmp_path):
    with served(tmp_path / "federation", make_settings()) as federation:
        lines: list[str] = []
        with (
            FrontDoor(federation.url, Page(403), times=5) as door,
            make_client(moved(federation.credential("A"), door.url), lines, pause_s=0.01) as client,
        ):
            client.settings()
            client.run_state(RUN)
        assert (
            lines
            == [
                f"{door.url} answers with status 403 (Forbidden), text/html, not as a coordinator would; trying again",
                "the coordinator answers again",
            ]
            * 2
        )


@pytest.mark.slow
def test_who_never_answers_properly_is_given_up_with_the_reason(tmp_path):
    with (
        served(tmp_path / "federation", make_settings()) as federation,
        FrontDoor(federation.url, Page(200), times=1000) as door,
        make_client(moved(federation.credential("A"), door.url), give_up_after_s=0.2, pause_s=0.01) as client,
        pytest.raises(CoordinatorUnreachable, match="status 200 .*not as a coordinator would"),
    ):
        client.settings()


@pytest.mark.slow
def test_the_coordinators_own_refusals_stay_final(tmp_path):
    with served(tmp_path / "federation", make_settings()) as federation:
        credential = federation.credential("A")
        with FrontDoor(federation.url, None) as door:
            with make_client(moved(credential, door.url)) as client:
                with pytest.raises(RefusedError) as info:
                    client.contribute(RoundKey(RUN, 0), messages.Update(), make_weights(0))
                assert info.value.code == "too_early"
            stranger = SiteCredential(door.url, "test", "A", "A.wrong-wrong-wrong-wrong")
            with make_client(stranger) as client, pytest.raises(NotJoinedError):
                client.settings()


def test_a_coordinator_of_another_version_is_told_from_a_stranger():
    """Fields that nobody knows here: asking again would not help."""
    newer = {**json.loads(encode_json(make_settings())), "colour": "green"}
    with (
        FrontDoor("http://127.0.0.1:9", Page(200, json.dumps(newer).encode(), JSON), times=1000) as door,
        make_client(SiteCredential(door.url, "test", "A", "A.x")) as client,
        pytest.raises(WireError, match="colour: Extra inputs are not permitted"),
    ):
        client.settings()


def test_a_refusal_has_all_three_parts():
    assert find_problem(REFUSAL, JSON) is not None
    assert find_problem(REFUSAL, {"content-type": "application/json"}) is None  # a plain dict knows no cases
    for content in (b'{"code": "x", "message": "y"}', b"<html>", b"[]", b'{"error": {"code": 1}}'):
        assert find_problem(content, JSON) is None


@pytest.mark.slow
def test_commands_that_ask_once_say_what_has_answered(tmp_path):
    with served(tmp_path / "federation", make_settings()) as federation:
        credential = federation.credential("A")
        for page in (Page(404), Page(200), Page(200, b"{}", JSON)):
            with FrontDoor(federation.url, page, times=1000) as door:
                with pytest.raises(FederationError, match=f"status {page.status} .*not as a coordinator would"):
                    ask(moved(credential, door.url), "GET", "status", api.Status)
                invitation = Invitation(door.url, "test", "B", federation.invitations()["B"])
                with pytest.raises(FederationError, match=f"status {page.status} .*not as a coordinator would"):
                    join(invitation, path=tmp_path / "b.json")


@pytest.mark.slow
def test_a_foreign_page_takes_no_failure_report(tmp_path, caplog):
    with served(tmp_path / "federation", make_settings()) as federation:
        with (
            FrontDoor(federation.url, Page(200), times=1000) as door,
            make_client(moved(federation.credential("A"), door.url)) as client,
        ):
            client.report_failure(RUN, 0, "out of memory")
        assert "could not be told of the failure" in caplog.text
        assert federation.coordinator.status().failures == ()


@pytest.mark.slow
def test_a_registration_waits_behind_a_page(tmp_path):
    """The message that a site waits for others with is asked for with a long poll, through the same door."""
    with served(tmp_path / "federation", make_settings()) as federation:
        with FrontDoor(federation.url, Page(503)) as door:

            def take_part(site):
                with make_client(moved(federation.credential(site), door.url), pause_s=0.01) as client:
                    return client.exchange(RegistrationKey(RUN), make_registration()).message

            first, second = in_threads(lambda: take_part("A"), lambda: take_part("B"))
        assert first == second
