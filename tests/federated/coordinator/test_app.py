"""The coordinator's HTTP shell, asked by hand."""

import hashlib
import http.client
import os
import re
import socket
import threading
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests
from fake_federation import (
    RUN,
    SHAPES,
    in_threads,
    make_census,
    make_registration,
    make_settings,
    make_weights,
    served,
    train,
    wait_until,
)
from http_peer import Peer
from patience import MUCH_LONGER_S, PATIENCE_S

from nnunetv2.federated.coordinator import app as coordinator_app
from nnunetv2.federated.coordinator.http.error_responses import problem_of
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.document import open_document
from nnunetv2.federated.protocol.keys import CensusKey, InitialKey, RegistrationKey, RoundKey


@pytest.fixture
def federation(tmp_path):
    with served(tmp_path / "federation", make_settings()) as federation:
        yield federation


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """A federation for requests that change nothing; its run takes updates of round 0."""
    folder = tmp_path_factory.mktemp("quiet")
    with served(folder / "federation", make_settings()) as federation:
        start_run(site_of(federation, "A", folder), site_of(federation, "B", folder))
        yield federation


@pytest.fixture
def site(quiet, tmp_path):
    """Site A of the quiet federation."""
    return site_of(quiet, "A", tmp_path)


def site_of(federation, name: str, folder) -> Peer:
    return Peer(federation, federation.credential(name).token, folder)


@pytest.fixture
def a(federation, tmp_path):
    return site_of(federation, "A", tmp_path)


@pytest.fixture
def b(federation, tmp_path):
    return site_of(federation, "B", tmp_path)


def incoming(federation) -> list:
    return list((federation.state.store.folder / "incoming").iterdir())


# ------------------------------------------------------------------------------------------------- who may do what
@pytest.mark.parametrize("authorization", ["", "Bearer ", "Bearer A", "Bearer A.wrong", "Bearer nobody.x", "Basic QTp"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "settings"),
        ("GET", "status"),
        ("GET", "runs/r"),
        ("POST", "failures"),
        ("POST", "offers/plans/p"),
        ("PUT", "gatherings/plans/p"),
        ("GET", "gatherings/plans/p"),
    ],
)
def test_nothing_is_told_without_a_token(quiet, authorization, method, path):
    quiet.credential("A")
    headers = {"Authorization": authorization}
    response = requests.request(method, f"{quiet.url}/v1/{path}", headers=headers, timeout=PATIENCE_S)
    assert response.status_code == 401
    assert response.json()["code"] == "unauthorized"
    assert response.headers["WWW-Authenticate"] == "Bearer"


def test_a_token_is_good_for_its_own_site_only(quiet, site):
    token = site.session.headers["Authorization"].removeprefix("Bearer A")
    response = requests.get(
        f"{quiet.url}/v1/settings", headers={"Authorization": f"Bearer B{token}"}, timeout=PATIENCE_S
    )
    assert response.status_code == 401


@pytest.mark.parametrize(
    "key", ["fingerprint/other", "plans/..%2f..%2fx", "runs/r/rounds/-1", "..%2f..%2fetc%2fpasswd"]
)
def test_unknown_gatherings_do_not_exist(site, key):
    for response in (site.get(f"gatherings/{key}"), site.put(f"gatherings/{key}", b"x")):
        assert response.status_code == 404


def test_settings_and_status_are_messages(federation, a):
    begin = time.time()
    assert a.get("settings").json()["sites"] == ["A", "B"]
    a.put(CensusKey(), a.document(make_census()))
    a.put(RegistrationKey(RUN), a.document(make_registration()))
    a.session.post(f"{a.base}/failures", json={"run": RUN, "round": 3, "reason": "out of memory"}, timeout=PATIENCE_S)
    status = a.get("status").json()
    first = status["sites"][0]
    assert (first["site"], first["joined"]) == ("A", True)
    assert first["bytes_received"] > 100 and begin - 1 < first["last_seen"] < time.time() + 1
    assert status["sites"][1] == {
        "site": "B",
        "joined": False,
        "state": "invited",
        "last_seen": None,
        "bytes_received": 0,
        "bytes_sent": 0,
    }
    assert [(g["key"], g["contributed"], g["waiting_for"]) for g in status["waiting"]] == [
        (CensusKey(), ["A"], ["B"]),
        (RegistrationKey(RUN), ["A"], ["B"]),
    ]
    assert [(f["site"], f["run"], f["round"], f["reason"]) for f in status["failures"]] == [
        ("A", RUN, 3, "out of memory")
    ]
    traffic = {(t["site"], t["key"]): t for t in status["traffic"]}
    assert traffic["A", CensusKey()]["bytes_received"] > 100
    assert f"site A reports a failure in run {RUN}, round 3: out of memory" in federation.lines


# ------------------------------------------------------------------------------------------------------ contributing
def test_a_contribution_may_be_repeated(federation, a):
    body = a.document(make_census())
    first, second = a.put(CensusKey(), body), a.put(CensusKey(), body)
    assert first.status_code == second.status_code == 200
    assert (
        first.json()
        == second.json()
        == {"digest": hashlib.sha256(body).hexdigest(), "already": False, "waiting_for": ["B"], "key": ""}
    )
    assert len(federation.state.store.load_events("contribution")) == 1


def test_statistics_are_replaced_while_open_and_refused_when_closed(a, b):
    a.put(CensusKey(), a.document(make_census(num_cases=1)))
    a.put(CensusKey(), a.document(make_census(num_cases=3)))
    b.put(CensusKey(), b.document(make_census(num_cases=4)))
    response = a.get(f"gatherings/{CensusKey()}?wait=5")
    (a.folder / "result").write_bytes(response.content)
    with open_document(a.folder / "result") as result:
        assert result.message.num_cases == 7
    assert a.put(CensusKey(), a.document(make_census(num_cases=3))).status_code == 200
    late = a.put(CensusKey(), a.document(make_census(num_cases=5)))
    assert late.status_code == 409
    assert late.json()["code"] == "already_closed" and "new federation" in late.json()["remedy"]


def test_length_and_digest_must_be_announced(quiet, site):
    address = urlsplit(quiet.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=PATIENCE_S)
    headers = {"Authorization": site.session.headers["Authorization"], "X-Content-SHA256": "0" * 64}
    connection.request(
        "PUT", f"/v1/gatherings/{CensusKey()}", body=iter([b"abc"]), headers=headers, encode_chunked=True
    )
    assert connection.getresponse().status == 411
    connection.close()
    response = site.put(CensusKey(), site.document(make_census()), **{"X-Content-SHA256": "short"})
    assert response.status_code == 400 and response.json()["code"] == "incomplete_request"


def test_what_was_damaged_on_its_way_is_not_kept(quiet, site):
    response = site.put(CensusKey(), site.document(make_census()), **{"X-Content-SHA256": "0" * 64})
    assert response.status_code == 400 and response.json()["code"] == "damaged_in_transit"
    assert incoming(quiet) == [] and quiet.coordinator.state.registry.get(CensusKey()) is None


@pytest.mark.parametrize("size", [256 * 2**20 + 1, 10**12])
def test_what_is_too_large_is_refused_before_it_is_read(quiet, site, size):
    address = urlsplit(quiet.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=PATIENCE_S)
    connection.putrequest("PUT", f"/v1/gatherings/{CensusKey()}")
    for name, value in {
        "Authorization": site.session.headers["Authorization"],
        "X-Content-SHA256": "0" * 64,
        "Content-Length": str(size),
    }.items():
        connection.putheader(name, value)
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    assert site.offer(CensusKey(), "0" * 64, size).status_code == 413


@pytest.mark.parametrize("body", [b"", b"x" * 7, b"\xff" * 64, b"\0" * 8 + b"{}", b"\x80\x04K\x01."])
def test_what_is_no_document_is_refused(quiet, site, body):
    response = site.put(CensusKey(), body)
    assert response.status_code == 400 and response.json()["code"] == "invalid"
    assert incoming(quiet) == []
    assert quiet.coordinator.state.store.load_events("refusal")[-1].site == "A"


def test_the_wrong_kind_of_message_is_refused(site):
    response = site.put(CensusKey(), site.document(messages.PlansReport(plans={})))
    assert response.status_code == 400
    assert "takes messages of kind census, this one is of kind plans_report" in response.json()["message"]


@pytest.mark.http_only
def test_a_request_that_dies_in_the_middle_leaves_nothing(federation, a):
    address = urlsplit(federation.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = (
            f"PUT /v1/gatherings/{CensusKey()} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n"
            f"X-Content-SHA256: {'0' * 64}\r\nAuthorization: {a.session.headers['Authorization']}\r\n\r\n"
        )
        connection.sendall(head.encode() + b"z" * 300_000)
        wait_until(lambda: incoming(federation))
    wait_until(lambda: not incoming(federation))
    assert a.put(CensusKey(), a.document(make_census())).status_code == 200


def test_large_small_bodies_are_refused(site):
    response = site.session.post(f"{site.base}/failures", data=b" " * 100_000, timeout=PATIENCE_S)
    assert response.status_code == 413


def test_an_offer_spares_the_upload(a, b):
    body = a.document(make_census())
    digest = hashlib.sha256(body).hexdigest()
    assert a.offer(CensusKey(), digest, len(body)).status_code == 202
    a.put(CensusKey(), body)
    assert a.offer(CensusKey(), digest, len(body)).json()["digest"] == digest


# ----------------------------------------------------------------------------------------------------------- results
@pytest.mark.slow
def test_an_open_gathering_says_whom_it_waits_for(a):
    response = a.get(f"gatherings/{CensusKey()}")
    assert (response.status_code, response.json()) == (202, {"waiting_for": ["A", "B"], "paused": False})
    a.put(CensusKey(), a.document(make_census()))
    begin = time.monotonic()
    assert a.get(f"gatherings/{CensusKey()}?wait=0.2").json() == {"waiting_for": ["B"], "paused": False}
    assert time.monotonic() - begin > 0.15


@pytest.mark.http_only
def test_waiting_ends_when_the_result_is_there(federation, a, b, monkeypatch):
    monkeypatch.setattr("nnunetv2.federated.coordinator.http.site_routes.LONGEST_WAIT_S", MUCH_LONGER_S)
    a.put(CensusKey(), a.document(make_census()))
    body = b.document(make_census())
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(a.get(f"gatherings/{CensusKey()}?wait={MUCH_LONGER_S}")))
    waiting.start()
    wait_until(lambda: federation.coordinator.notifier._waiting[CensusKey()])
    b.put(CensusKey(), body)
    waiting.join(PATIENCE_S)
    assert answers[0].status_code == 200


@pytest.mark.parametrize("wait", ["-1", "x", "1e9", "nan"])
def test_a_wait_is_a_plain_number(site, wait):
    assert site.get(f"gatherings/{CensusKey()}?wait={wait}").status_code == 400


def test_results_come_in_ranges(a, b):
    for site in (a, b):
        site.put(CensusKey(), site.document(make_census()))
    whole = a.get(f"gatherings/{CensusKey()}?wait=5")
    digest = hashlib.sha256(whole.content).hexdigest()
    assert whole.headers["X-Content-SHA256"] == digest
    assert whole.headers["X-Gathering"] == CensusKey()
    rest = a.get(f"gatherings/{CensusKey()}", headers={"Range": "bytes=10-", "If-Range": f'"{digest}"'})
    assert (rest.status_code, rest.content) == (206, whole.content[10:])
    changed = a.get(f"gatherings/{CensusKey()}", headers={"Range": "bytes=10-", "If-Range": f'"{"0" * 64}"'})
    assert (changed.status_code, changed.content) == (200, whole.content)


def test_a_refused_closing_reaches_every_site_and_can_be_corrected(federation, a, b):
    a.put(CensusKey(), a.document(make_census()))
    b.put(CensusKey(), b.document(make_census(labels={"background": 0, "liver": 2})))
    for site in (a, b):
        response = site.get(f"gatherings/{CensusKey()}?wait=5")
        assert response.status_code == 409
        assert response.json()["message"] == (
            "the sites' datasets do not go together: labels.liver is 1 at A and 2 at B"
        )
    assert b.put(CensusKey(), b.document(make_census())).status_code == 200
    assert b.get(f"gatherings/{CensusKey()}?wait=5").status_code == 200


def test_gatherings_begin_in_order(site):
    for response in (site.get("gatherings/fingerprint/coarse"), site.get(f"gatherings/{RoundKey(RUN, 1)}")):
        assert (response.status_code, response.json()["code"]) == (409, "too_early")


# ------------------------------------------------------------------------------------------------------------ rounds
def start_run(a: Peer, b: Peer) -> None:
    for site, cases in ((a, 1), (b, 3)):
        assert site.put(RegistrationKey(RUN), site.document(make_registration(cases))).status_code == 200
    assert a.get(f"gatherings/{RegistrationKey(RUN)}?wait=5").status_code == 200
    assert a.put(InitialKey(RUN), a.document(messages.Update())).status_code == 200
    assert b.put(InitialKey(RUN), b.document(messages.Update(), make_weights(1))).status_code == 200
    assert a.get(f"gatherings/{InitialKey(RUN)}?wait=5").status_code == 200


def test_a_round_is_the_mean_weighted_by_cases(federation, a, b, tmp_path):
    start_run(a, b)
    first, second = make_weights(1), make_weights(2)
    assert a.put(RoundKey(RUN, 0), a.document(messages.Update(metrics={"loss": 1.0}), first)).status_code == 200
    assert b.put(RoundKey(RUN, 0), b.document(messages.Update(metrics={"loss": 2.0}), second)).status_code == 200
    response = a.get(f"gatherings/{RoundKey(RUN, 0)}?wait=5")
    (tmp_path / "result").write_bytes(response.content)
    with open_document(tmp_path / "result") as result:
        for name in SHAPES:
            expected = (first[name].astype(np.float64) + 3 * second[name].astype(np.float64)) / 4
            np.testing.assert_array_equal(result.read(name), expected.astype(np.float32))
        assert result.message.contributors == {"A": 1.0, "B": 1.0}  # how many cases a site has is not for the others
    assert b'"loss"' not in response.content[:100_000]  # what a site measured neither
    assert a.get(f"runs/{RUN}").json() == {
        "run": RUN,
        "registered": ["A", "B"],
        "open_round": 1,
        "num_rounds": 3,
        "closed": False,
        "state": "running",
        "rounds_closed": 1,
        "members": ["A", "B"],
        "left": [],
    }


def test_the_first_update_of_a_round_stays(a, b):
    start_run(a, b)
    first = a.document(messages.Update(), make_weights(1))
    a.put(RoundKey(RUN, 0), first)
    receipt = a.put(RoundKey(RUN, 0), a.document(messages.Update(), make_weights(2))).json()
    assert receipt == {"digest": hashlib.sha256(first).hexdigest(), "already": True, "waiting_for": ["B"], "key": ""}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda w: w.pop("head.weight"), "head.weight is missing"),
        (lambda w: w.update(other=np.zeros(1, np.float32)), "other is not expected"),
        (lambda w: w.update({"head.weight": np.zeros((4, 2), np.float32)}), "expected F32\\[2, 4\\]"),
        (lambda w: w.update({"head.weight": np.zeros((2, 4), np.float16)}), "travels as F32"),
        (lambda w: w.update({"head.weight": np.full((2, 4), np.nan, np.float32)}), "NaN or infinite"),
        (lambda w: w.update({"head.weight": np.full((2, 4), -np.inf, np.float32)}), "NaN or infinite"),
    ],
)
def test_an_update_must_fit_and_be_finite(quiet, site, change, complaint):
    weights = make_weights(1)
    change(weights)
    response = site.put(RoundKey(RUN, 0), site.document(messages.Update(), weights))
    assert response.status_code == 400
    assert re.search(complaint, response.json()["message"])
    assert quiet.coordinator.state.registry.get(RoundKey(RUN, 0)) is None


def test_an_update_is_bounded_by_what_was_registered(site):
    assert site.offer(RoundKey(RUN, 0), "0" * 64, 10 << 20).status_code == 413


@pytest.mark.slow
def test_old_weights_are_deleted_and_the_present_ones_kept(federation):
    with federation.client("A") as a, federation.client("B") as b:
        results = in_threads(lambda: train(a, seed=1, num_rounds=3), lambda: train(b, seed=2, num_rounds=3))
        assert results[0] == results[1]
    wait_until(lambda: any("is over" in line for line in federation.lines))
    folder = federation.state.store.folder / "gatherings" / "runs" / RUN
    wait_until(lambda: not any((folder / "initial").glob("A.*")) and not any((folder / "rounds" / "0").iterdir()))
    wait_until(lambda: [path.name for path in (folder / "rounds" / "1").iterdir()] == ["result.safetensors"])
    assert len(list((folder / "rounds" / "2").iterdir())) == 3


def test_paths_of_the_coordinators_machine_stay_there():
    status, problem = problem_of(FileNotFoundError(2, "No such file or directory", "/srv/clinic/federation/x"))
    assert (status, problem.message) == (503, "trouble at the coordinator: No such file or directory")
    assert problem_of(OSError("the model of run x is not written yet"))[1].message.endswith("is not written yet")


def test_old_uploads_go_while_the_coordinator_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(coordinator_app, "DAY_S", 0.05)
    with served(tmp_path / "federation", make_settings()) as federation:
        old = federation.state.store.folder / "incoming" / "exchange.A.digest.part"
        old.write_bytes(b"x" * (2 << 20))
        os.utime(old, (1.0, 1.0))
        wait_until(lambda: not old.exists())
