"""Abuse the coordinator over real connections: credentials, bombs, crawling clients, a thousand open connections."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import socket
import ssl
import struct
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace

import numpy as np
import pytest
import requests
from fake_federation import (
    LABELS,
    RUN,
    SHAPES,
    in_threads,
    make_census,
    make_client,
    make_plans,
    make_registration,
    make_settings,
    make_weights,
    served,
    train,
    wait_until,
)
from http_peer import Peer
from patience import PATIENCE_S
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from nnunetv2.federated.coordinator.http import connections, listener, rate_limits
from nnunetv2.federated.coordinator.http.connections import GuardedServer, allow_many_files, guarded_config
from nnunetv2.federated.coordinator.http.rate_limits import Limits
from nnunetv2.federated.coordinator.http.tls import private_certificate
from nnunetv2.federated.coordinator.storage import partial_uploads
from nnunetv2.federated.errors import FederationError, NotJoinedError, RefusedError, WireError
from nnunetv2.federated.exchanges.steps.base import Step
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.api import FailureReport
from nnunetv2.federated.protocol.document import open_document
from nnunetv2.federated.protocol.keys import CensusKey, InitialKey, RegistrationKey, RoundKey
from nnunetv2.federated.protocol.strict_json import MAX_DEPTH, parse_json
from nnunetv2.federated.site.credential import new_token
from nnunetv2.federated.site.transports.http_requests import LONGEST_RETRY_AFTER_S, NoAnswerError, check_status
from nnunetv2.utilities.plain_text import printable


@pytest.fixture
def federation(tmp_path):
    with served(tmp_path / "federation", make_settings(sites=("A", "B", "M"))) as federation:
        yield federation


@pytest.fixture
def peers(federation, tmp_path):
    return {site: Peer(federation, federation.credential(site).token, tmp_path) for site in "ABM"}


def start_run(peers) -> None:
    """Let all register; round 0 is open."""
    for number, peer in enumerate(peers.values()):
        assert peer.put(RegistrationKey(RUN), peer.document(make_registration(3 - number))).status_code == 200
    assert peers["A"].get(f"gatherings/{RegistrationKey(RUN)}?wait=9").status_code == 200
    for site, peer in peers.items():
        body = peer.document(messages.Update(), make_weights(0) if site == "A" else {})
        assert peer.put(InitialKey(RUN), body).status_code == 200
    assert peers["A"].get(f"gatherings/{InitialKey(RUN)}?wait=9").status_code == 200


# --------------------------------------------------------------------------------------------------------- credentials
def test_credentials_that_are_wrong_foreign_or_revoked_open_nothing(federation, peers, tmp_path):
    own = federation.credential("M").token
    with served(tmp_path / "other", make_settings(sites=("M", "N"))) as other:
        foreign = other.credential("M").token
    bad = [
        foreign,
        new_token("M"),
        new_token("nobody"),
        own[:-1],
        own + "=",
        own.replace("M.", "A."),
        own.lower(),
        own.replace("M.", "M\u200b.").encode().decode("latin-1"),
        "",
    ]
    federation.coordinator.revoke("B", by="operator")
    bad.append(federation.credential("B").token)
    for token in bad:
        peer = Peer(federation, token, tmp_path)
        for answer in (
            peer.get("settings"),
            peer.put(CensusKey(), b"x"),
            peer.get(f"gatherings/{CensusKey()}"),
            peer.post("failures", {}),
            peer.post(f"offers/{CensusKey()}", {}),
        ):
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized"), token
    assert peers["M"].get("settings").status_code == 200


def test_an_expired_invitation_and_a_replayed_one_are_refused(federation, tmp_path):
    secret = federation.coordinator.invite("late", "site", by="operator", lifetime_s=0.01)
    time.sleep(0.05)
    nobody = Peer(federation, "", tmp_path)
    answer = nobody.post("join", {"invitation": secret, "token": new_token("late")})
    assert (answer.status_code, answer.json()["code"]) == (403, "invitation_expired")
    used = federation.invitations()["A"]
    federation.credential("A")
    answer = nobody.post("join", {"invitation": used, "token": new_token("A")})
    assert (answer.status_code, answer.json()["code"]) == (403, "invitation_used")
    answer = nobody.post("join", {"invitation": used, "token": federation.credential("A").token})
    assert answer.status_code == 200  # the site's own request, repeated: nothing changes
    answer = nobody.post("join", {"invitation": federation.invitations()["M"], "token": new_token("B")})
    assert (answer.status_code, answer.json()["code"]) == (403, "invitation_unknown")


def test_a_site_that_is_not_known_any_more_says_so_in_one_line(federation):
    credential = replace(federation.credential("A"), token=new_token("A"))
    with make_client(credential) as client, pytest.raises(NotJoinedError, match="does not know this credential"):
        client.settings()


# ------------------------------------------------------------------------------------------- what belongs to others
def test_a_site_neither_reads_nor_writes_what_others_contributed(federation, peers):
    start_run(peers)
    secret_of_a = peers["A"].document(messages.Update(), make_weights(7))
    assert peers["A"].put(RoundKey(RUN, 0), secret_of_a).status_code == 200
    digest = hashlib.sha256(secret_of_a).hexdigest()
    mallory = peers["M"]
    # offering what another has sent tells nothing of it, and sending it counts as one's own
    offer = mallory.post(f"offers/{RoundKey(RUN, 0)}", {"digest": digest, "size": len(secret_of_a)})
    assert offer.status_code == 202 and offer.json() == {"offset": 0}
    for path in (
        f"gatherings/{RoundKey(RUN, 0)}/A",
        f"gatherings/{RoundKey(RUN, 0)}/A.{digest[:24]}.safetensors",
        f"gatherings/{RoundKey(RUN, 0)}%2fA",
        f"contributions/{RoundKey(RUN, 0)}/A",
        "members/A",
    ):
        assert mallory.get(path).status_code in (404, 405)
    assert mallory.get(f"gatherings/{RoundKey(RUN, 0)}").status_code == 202  # waiting, as everybody
    assert mallory.put(RoundKey(RUN, 0), mallory.document(messages.Update(), make_weights(9))).status_code == 200
    held = federation.state.registry.get(RoundKey(RUN, 0)).contributions
    assert held["A"].digest == digest and set(held) == {"A", "M"}
    for action in ("pause", "resume", "stop", "reset", "proceed"):
        assert mallory.post(f"runs/{RUN}/actions", {"action": action}).status_code == 403
    assert mallory.session.delete(f"{mallory.base}/members/A", timeout=PATIENCE_S).status_code == 403
    assert mallory.post("members", {"name": "evil"}).status_code == 403
    assert mallory.session.patch(f"{mallory.base}/settings", json={"quorum": 1}, timeout=PATIENCE_S).status_code == 403
    assert mallory.put(f"runs/{RUN}/admissions/A", mallory.document(make_registration(1))).status_code == 403


def test_what_was_checked_is_what_is_stored(federation, peers, monkeypatch):
    """A site that sends the same document once more while the first is being checked has no hand on that."""
    start_run(peers)
    mallory, check, begun, go_on = peers["M"], Step.check_contribution, threading.Event(), threading.Event()
    good = mallory.document(messages.Update(), make_weights(1))
    bad = mallory.document(
        messages.Update(), {name: values * np.float32("nan") for name, values in make_weights(1).items()}
    )

    def slowly(*args) -> None:
        check(*args)
        begun.set()
        assert go_on.wait(PATIENCE_S)

    monkeypatch.setattr(Step, "check_contribution", slowly)
    answers = []
    first = threading.Thread(target=lambda: answers.append(mallory.put(RoundKey(RUN, 0), good)))
    first.start()
    assert begun.wait(PATIENCE_S)
    claimed = hashlib.sha256(good).hexdigest()
    second = Peer(federation, federation.credential("M").token, mallory.folder)
    answer = second.put(RoundKey(RUN, 0), bad, **{"X-Content-SHA256": claimed})
    assert (answer.status_code, answer.json()["code"]) == (400, "taken_over")
    go_on.set()
    first.join(PATIENCE_S)
    assert answers[0].json()["digest"] == claimed
    stored = federation.state.store.contribution_path(RoundKey(RUN, 0), "M", claimed)
    assert stored.read_bytes() == good


def test_an_upload_that_was_begun_with_a_stolen_credential_does_not_count(federation, peers):
    """Its site was invited again before the upload was over, and is expected as before."""
    start_run(peers)
    body = peers["M"].document(messages.Update(), make_weights(1))
    head = (
        f"PUT /v1/gatherings/{RoundKey(RUN, 0)} HTTP/1.1\r\nHost: x\r\n"
        f"Authorization: Bearer {federation.credential('M').token}\r\nContent-Length: {len(body)}\r\n"
        f"X-Content-SHA256: {hashlib.sha256(body).hexdigest()}\r\n\r\n"
    )
    with connected(federation) as connection:
        connection.sendall(head.encode() + body[:100])
        wait_until(lambda: federation.coordinator.uploads.in_progress())
        federation.coordinator.revoke("M", by="boss")
        federation.coordinator.invite("M", "site", by="boss")
        connection.sendall(body[100:])
        assert connection.recv(1000).startswith(b"HTTP/1.1 401")
    exchange = federation.state.registry.get(RoundKey(RUN, 0))
    assert exchange is None or "M" not in exchange.contributions


def test_who_waits_for_a_result_with_a_credential_that_is_revoked_does_not_get_it(federation, peers):
    for number, peer in enumerate(peers.values()):
        if number:
            peer.put(CensusKey(), peer.document(make_census()))
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(peers["M"].get(f"gatherings/{CensusKey()}?wait=9")))
    waiting.start()
    wait_until(lambda: federation.coordinator.notifier._waiting[CensusKey()])
    federation.coordinator.revoke("M", by="boss")
    waiting.join(PATIENCE_S)
    assert answers[0].status_code == 401


def test_an_upload_of_another_site_is_not_gone_on_with(federation, peers, monkeypatch):
    monkeypatch.setattr(partial_uploads, "WORTH_KEEPING_BYTES", 1)
    start_run(peers)
    body = peers["A"].document(messages.Update(), make_weights(7))
    digest = hashlib.sha256(body).hexdigest()
    with raw(
        federation,
        head(
            "PUT",
            f"gatherings/{RoundKey(RUN, 0)}",
            federation.credential("A").token,
            **{"Content-Length": len(body), "X-Content-SHA256": digest},
        )
        + body[:200],
    ):
        wait_until(lambda: federation.coordinator.uploads.in_progress())
    uploads = federation.coordinator.uploads
    wait_until(lambda: uploads.offset(RoundKey(RUN, 0), "A", digest) == 200)
    assert uploads.offset(RoundKey(RUN, 0), "M", digest) == 0
    answer = peers["M"].put(
        RoundKey(RUN, 0),
        body[200:],
        **{"Content-Range": f"bytes 200-{len(body) - 1}/{len(body)}", "X-Content-SHA256": digest},
    )
    assert (answer.status_code, answer.json()["code"]) == (409, "wrong_offset")


# ----------------------------------------------------------------------------------------------------------- documents
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda w: {**w, "head.weight": w["head.weight"][:1]}, "expected F32\\[2, 4\\]"),
        (lambda w: {**w, "head.weight": w["head.weight"].T.copy()}, "expected F32\\[2, 4\\]"),
        (lambda w: {**w, "head.weight": w["head.weight"].astype(np.float16)}, "travels as F32"),
        (lambda w: {**w, "head.weight": w["head.weight"].astype(np.int64)}, "travels as F32"),
        (lambda w: {name: v for name, v in w.items() if name != "encoder.bias"}, "encoder.bias is missing"),
        (lambda w: {**w, "Encoder.bias": w["encoder.bias"]}, "Encoder.bias is not expected"),
        (lambda w: {**w, "decoder.encoder.weight": w["encoder.weight"]}, "decoder.encoder.weight is not expected"),
        (lambda w: {**w, "encoder.bias": np.array([1, 2, np.nan, 4], np.float32)}, "NaN or infinite"),
        (lambda w: {**w, "encoder.bias": np.array([np.inf, 2, 3, 4], np.float32)}, "NaN or infinite"),
        (lambda w: {}, "is missing"),
    ],
)
def test_updates_are_held_against_what_the_site_registered(federation, peers, change, complaint):
    start_run(peers)
    mallory = peers["M"]
    answer = mallory.put(RoundKey(RUN, 0), mallory.document(messages.Update(), change(make_weights(1))))
    assert answer.status_code == 400
    with pytest.raises(RefusedError, match=complaint):
        check_status(answer)
    assert federation.state.registry.get(RoundKey(RUN, 0)) is None


def forged(entries: dict, *, message: messages.Message, data: bytes = b"") -> bytes:
    header = json.dumps({"__metadata__": {"message": message.model_dump_json()}, **entries}).encode()
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    "entries",
    [
        {"head.weight": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}},
        {"head.weight": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 4 * 2**40]}},
        {
            "head.weight": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]},
            "other": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]},
        },
        {"head.weight": {"dtype": "F32", "shape": [0] * 8 + [1], "data_offsets": [0, 0]}},
        {"head.weight": {"dtype": "F64", "shape": [4], "data_offsets": [0, 32]}},
        {"../../../etc/cron.d/x": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}},
        {"head.weight\u202e": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}},
        {"h\u0435ad.weight": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}},
    ],
)
def test_tensors_that_claim_what_they_are_not(federation, peers, entries):
    start_run(peers)
    answer = peers["M"].put(RoundKey(RUN, 0), forged(entries, message=messages.Update(), data=bytes(32)))
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid")


@pytest.mark.parametrize("size", [2**31, 2**63 - 1, 2**64 - 1])
def test_headers_that_claim_to_be_huge(peers, size):
    answer = peers["M"].put(CensusKey(), struct.pack("<Q", size) + b"{}" * 100)
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid")


def test_a_compressed_body_is_not_decompressed(federation, peers):
    bomb = gzip.compress(bytes(64 << 20))
    answer = peers["M"].put(CensusKey(), bomb, **{"Content-Encoding": "gzip"})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid")
    proper = gzip.compress(peers["M"].document(make_census()))
    assert peers["M"].put(CensusKey(), proper, **{"Content-Encoding": "gzip"}).status_code == 400
    answer = requests.post(
        f"{federation.url}/v1/join", data=bomb, timeout=PATIENCE_S, headers={"Content-Encoding": "gzip"}
    )
    assert answer.status_code in (400, 413)


def test_what_is_announced_as_huge_is_refused_before_it_is_read(federation, peers):
    for key, length in ((CensusKey(), 1 << 40), (CensusKey(), 999_999_999_999_999), ("plans/x", 300 << 20)):
        request = head(
            "PUT",
            f"gatherings/{key}",
            federation.credential("M").token,
            **{"Content-Length": length, "X-Content-SHA256": "0" * 64},
        )
        with raw(federation, request) as connection:
            assert read_head(connection).startswith(b"HTTP/1.1 413 ")
    assert not list((federation.state.store.folder / "incoming").iterdir())


@pytest.mark.parametrize("text", ["[" * 50_000, '{"a":' * 50_000, "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)])
def test_an_abyss_of_brackets_is_refused(text):
    with pytest.raises(WireError, match="not proper JSON"):
        parse_json(text, what="it")


def test_brackets_as_deep_as_anybody_needs_them_are_fine():
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, what="it")


# --------------------------------------------------------------------------------------------------- names and lines
@pytest.mark.parametrize(
    "name", ["..", "a/b", "A\n", "A\x00", "\u0410", "A\u200b", "a" * 65, "-A", "", "caf\u00e9", "a", "m"]
)
def test_names_that_look_like_others_or_like_paths_are_refused(federation, tmp_path, name):
    operator = new_token("operator")
    federation.coordinator.members.appoint_local_operator(operator)
    answer = Peer(federation, operator, tmp_path).post("members", {"name": name, "role": "site"})
    assert answer.status_code in (400, 409), answer.text


@pytest.mark.parametrize(
    "path",
    [
        "/v1/gatherings/plans/..%2f..%2fA.json",
        "/v1/gatherings/runs/%2e%2e/registration",
        "/v1/gatherings/plans/x%00",
        "/v1/gatherings/plans/x%0d%0aX-Evil:%201",
        "/v1/runs/..%2f..%2f",
        "/v1/../../etc/passwd",
        "/v1/gatherings//etc/passwd",
    ],
)
@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_paths_lead_nowhere_else(federation, method, path):
    request = head(
        method,
        "",
        federation.credential("M").token,
        **{"Content-Length": 0, "X-Content-SHA256": hashlib.sha256().hexdigest()},
    ).replace(b"/v1/ ", path.encode() + b" ")
    with raw(federation, request) as connection:
        answer = read_head(connection)
    assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 405")) and b"X-Evil: 1" not in answer


def test_nobody_is_sent_elsewhere(federation):
    for path in ("/v1/settings/", "//evil.example/", "/metrics/"):
        answer = requests.get(
            federation.url + path, headers={"Host": "evil.example"}, timeout=PATIENCE_S, allow_redirects=False
        )
        assert answer.status_code == 404 and "Location" not in answer.headers


def test_one_site_cannot_write_lines_in_the_name_of_another(federation, peers):
    reason = "out of memory\n2026-01-01 00:00:00  site A has joined\x1b[2J\u202e"
    peers["M"].put(RegistrationKey(RUN), peers["M"].document(make_registration()))
    assert peers["M"].post("failures", {"run": RUN, "round": 0, "reason": reason}).status_code == 204
    shown = peers["A"].get("status").json()["failures"][0]["reason"]
    assert shown == "out of memory 2026-01-01 00:00:00  site A has joined\\x1b[2J\\u202e" == printable(reason)
    assert federation.lines[-1].endswith(shown)
    peers["M"].put(CensusKey(), peers["M"].document(make_census(labels={"background": 0, "\x1b[31mliver\n": 1})))
    for site in "AB":
        peers[site].put(CensusKey(), peers[site].document(make_census(labels=LABELS)))
    message = peers["A"].get(f"gatherings/{CensusKey()}?wait=9").json()["message"]
    assert message.isprintable() and "\\x1b[31mliver" in message


# ----------------------------------------------------------------------------------------------------------- too much
def test_a_site_that_asks_too_much_is_told_when_to_come_back(tmp_path, monkeypatch):
    tight = Limits(requests_at_once=30, requests_per_s=0.01)  # refilled slowly: machines can be busy
    with served(tmp_path / "federation", make_settings(), limits=tight) as federation:
        mallory = Peer(federation, federation.credential("A").token, tmp_path)
        answers = [mallory.get("settings") for _ in range(60)]
        refused = [answer for answer in answers if answer.status_code == 429]
        wait_s = int(refused[0].headers["Retry-After"])
        assert 0 < wait_s <= 100
        assert refused[0].json() == {
            "code": "too_many_requests",
            "message": "A sends too many requests",
            "remedy": f"Ask again in {wait_s} s.",
        }
        with pytest.raises(NoAnswerError) as info:
            check_status(refused[0])
        assert info.value.wait_s == wait_s
        waits: list[float] = []
        with federation.client("A", pause_s=0.001) as client:
            monkeypatch.setattr(client._is_closing, "wait", lambda seconds: waits.append(seconds) or len(waits) > 1)
            with pytest.raises(FederationError, match="closed"):
                client.settings()
        assert waits[0] > 20  # it waits as long as it was told or is willing to, and asks again
        with federation.client("B") as client:
            assert client.settings().sites == ("A", "B")


def test_a_coordinator_cannot_send_a_site_to_sleep_for_ever():
    answer = requests.Response()
    answer.status_code, answer.raw = 429, io.BytesIO(b"{}")
    answer.headers.update({"Retry-After": "999999999", "Content-Length": "2"})
    with pytest.raises(NoAnswerError) as info:
        check_status(answer)
    assert info.value.wait_s == LONGEST_RETRY_AFTER_S


def test_strangers_do_not_use_up_what_members_have(tmp_path):
    limits = Limits(stranger_requests_at_once=20, stranger_requests_per_s=0.01)  # refilled slowly: machines can be busy
    with served(tmp_path / "federation", make_settings(), limits=limits) as federation:
        federation.credential("A")
        statuses = [requests.get(f"{federation.url}/v1/settings", timeout=PATIENCE_S).status_code for _ in range(40)]
        assert statuses[0] == 401 and statuses[-1] == 429
        with federation.client("A") as client:
            assert client.settings().sites == ("A", "B")


def test_a_site_does_not_fill_the_log(tmp_path):
    with served(tmp_path / "federation", make_settings(), limits=Limits(lines_at_once=10)) as federation:
        mallory = Peer(federation, federation.credential("A").token, tmp_path)
        statuses = [mallory.put("plans/x", b"nonsense").status_code for _ in range(30)]
        assert statuses[:10] == [400] * 10 and statuses[12:] == [429] * 18
        assert len(federation.state.store.load_events("refusal")) <= 11
        assert mallory.get("settings").status_code == 200


def test_made_up_names_leave_no_trace(federation, peers):
    """Neither counters nor locks nor exchanges grow with what somebody asks for."""
    coordinator = federation.coordinator
    before = (
        len(coordinator.members._traffic),
        len(coordinator.state.locks._locks),
        len(list(coordinator.state.registry)),
    )
    for number in range(20):
        assert peers["M"].get(f"gatherings/plans/p{number}").status_code == 202
        assert peers["M"].put(f"plans/p{number}", b"nonsense").status_code == 400
        assert peers["M"].get(f"runs/r{number}").status_code == 200
    after = (
        len(coordinator.members._traffic),
        len(coordinator.state.locks._locks),
        len(list(coordinator.state.registry)),
    )
    assert after[0] <= before[0] + 1 and after[1:] == before[1:]
    assert not list((coordinator.state.store.folder / "incoming").iterdir())


def test_what_is_left_of_uploads_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(partial_uploads, "WORTH_KEEPING_BYTES", 1)
    uploads = partial_uploads.PartialUploads(tmp_path)
    for number in range(20):
        with uploads.writing(f"plans/{number}", "M", "1" * 64, offset=0) as upload:
            upload.append(b"some")
    with uploads.writing("plans/0", "A", "1" * 64, offset=0) as upload:
        upload.append(b"some")
    assert len(list(tmp_path.glob("*.M.*"))) == partial_uploads.KEPT_PER_SITE
    assert len(list(tmp_path.glob("*.A.*"))) == 1


# ------------------------------------------------------------------------------------------------------- connections
def head(method: str, path: str, token: str, **headers: object) -> bytes:
    lines = [
        f"{method} /v1/{path} HTTP/1.1",
        "Host: x",
        f"Authorization: Bearer {token}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def connected(federation) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(federation.url.rpartition(":")[2])), timeout=PATIENCE_S)


@contextmanager
def raw(federation, data: bytes = b""):
    with connected(federation) as connection:
        connection.sendall(data)
        yield connection


def read_head(connection: socket.socket) -> bytes:
    answer = b""
    while b"\r\n\r\n" not in answer and (piece := connection.recv(1 << 16)):
        answer += piece
    return answer.partition(b"\r\n\r\n")[0]


def is_dropped(connection: socket.socket) -> bool:
    try:
        while connection.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


@pytest.fixture
def impatient(monkeypatch):
    """Time limits of a second or so instead of half a minute: more than a busy machine needs."""
    monkeypatch.setattr(connections, "WATCH_S", 0.05)
    for phase, (seconds, least) in rate_limits.PACE.items():
        monkeypatch.setitem(rate_limits.PACE, phase, (seconds / 20, least))


@pytest.mark.parametrize(
    "sent", [b"", b"GET /v1/settings HTTP/1.1\r\nHost: x\r\n", b"GET /v1/settings HTTP/1.1\r\nHost: x\r\n\r\nGET /v1"]
)
def test_headers_that_do_not_come_end_the_connection(impatient, federation, sent):
    with raw(federation, sent) as connection:
        assert is_dropped(connection)


def test_headers_that_come_byte_by_byte_end_the_connection(impatient, federation):
    with raw(federation) as connection:
        end = time.monotonic() + PATIENCE_S
        with pytest.raises(ConnectionError):
            while time.monotonic() < end:
                connection.sendall(b"a")
                time.sleep(0.05)


def test_a_body_that_crawls_ends_the_connection_and_others_do_not_notice(impatient, federation, peers):
    request = head(
        "PUT",
        f"gatherings/{CensusKey()}",
        federation.credential("M").token,
        **{"Content-Length": 100_000, "X-Content-SHA256": "0" * 64},
    )
    with raw(federation, request) as connection:
        end = time.monotonic() + PATIENCE_S
        with pytest.raises(ConnectionError):
            while time.monotonic() < end:
                connection.sendall(b"a")
                time.sleep(0.05)
                assert federation.coordinator.status().sites


def test_an_answer_that_nobody_reads_ends_the_connection(impatient, federation, peers, monkeypatch):
    start_run(peers)
    lose, unsent = connections.GuardedProtocol.connection_lost, []
    monkeypatch.setattr(
        connections.GuardedProtocol,
        "connection_lost",
        lambda self, error: (unsent.append(self._unsent), lose(self, error))[1],
    )
    size = 64 << 20
    with federation.state.store.result_path(InitialKey(RUN)).open("r+b") as file:
        file.truncate(size)  # more than any socket holds
    with raw(federation, head("GET", f"gatherings/{InitialKey(RUN)}", federation.credential("M").token)) as connection:
        wait_until(lambda: any(unsent))
        received = 0
        with suppress(ConnectionError):
            while piece := connection.recv(1 << 20):
                received += len(piece)
        assert received < size


def test_a_body_behind_a_refusal_is_not_swallowed(impatient, federation):
    request = head(
        "PUT", f"gatherings/{CensusKey()}", "M.wrong", **{"Content-Length": 1 << 40, "X-Content-SHA256": "0" * 64}
    )
    with raw(federation, request) as connection:
        assert read_head(connection).startswith(b"HTTP/1.1 401 ")
        sent = 0
        with pytest.raises(ConnectionError):
            while sent < 1 << 30:
                connection.sendall(bytes(1 << 18))
                sent += 1 << 18
        assert sent < 64 << 20


def test_waiting_for_other_sites_is_not_being_slow(impatient, federation, peers):
    peers["A"].put(CensusKey(), peers["A"].document(make_census()))
    assert peers["A"].get(f"gatherings/{CensusKey()}?wait=3").status_code == 202


def test_a_thousand_open_connections_do_not_stop_a_running_round(tmp_path):
    """Idle ones, ones with half a request, and uploads that crawl, all from one address."""
    allow_many_files()
    num_rounds = 6
    with served(tmp_path / "federation", make_settings(num_epochs=num_rounds)) as federation:
        token = federation.credential("A").token
        crawl = head(
            "PUT", f"gatherings/{CensusKey()}", token, **{"Content-Length": 100_000, "X-Content-SHA256": "0" * 64}
        )
        starts = (
            b"",
            b"GET /v1/settings HTTP/1.1\r\nHost:",
            b"POST /v1/join HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n",
            crawl + b"a",
        )
        port, opened = int(federation.url.rpartition(":")[2]), []

        def flood() -> None:
            for number in range(1000):
                connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
                opened.append(connection)
                with suppress(ConnectionError):  # if it has made room for others already
                    connection.sendall(starts[number % len(starts) if number < 100 else number % 3])

        with federation.client("A") as a, federation.client("B") as b:
            flooding = threading.Thread(target=flood)
            flooding.start()
            wait_until(lambda: len(opened) > 300)
            digests = in_threads(
                lambda: train(a, seed=1, num_rounds=num_rounds), lambda: train(b, seed=2, num_rounds=num_rounds)
            )
            flooding.join(PATIENCE_S)
            assert len(opened) == 1000 and digests[0] == digests[1] and isinstance(digests[0], str)
            assert a.settings().sites == ("A", "B")
        for connection in opened:
            connection.close()


# ------------------------------------------------------------------------------------------------------------ replays
def test_replayed_requests_change_nothing(federation, peers):
    start_run(peers)
    body = peers["A"].document(messages.Update(), make_weights(1))
    first = peers["A"].put(RoundKey(RUN, 0), body).json()
    for _ in range(3):
        assert peers["A"].put(RoundKey(RUN, 0), body).json() == first
    weights = peers["A"].document(messages.Update(), make_weights(0))
    assert peers["A"].put(InitialKey(RUN), weights).json()["already"]
    other = peers["A"].put(RoundKey(RUN, 0), peers["A"].document(messages.Update(), make_weights(2))).json()
    assert other["already"] and other["digest"] == first["digest"]
    stored = federation.state.store
    assert len([event for event in stored.load_events("contribution") if event.key == RoundKey(RUN, 0)]) == 1
    with open_document(stored.contribution_path(RoundKey(RUN, 0), "A", first["digest"])) as document:
        for name in SHAPES:
            np.testing.assert_array_equal(document.read(name), make_weights(1)[name])


def test_a_result_that_is_deleted_while_it_is_asked_for_is_asked_for_again(federation, peers):
    start_run(peers)
    federation.state.store.result_path(InitialKey(RUN)).unlink()
    answer = peers["A"].get(f"gatherings/{InitialKey(RUN)}")
    assert (answer.status_code, answer.json()["code"]) == (503, "coordinator_trouble")


def test_a_registration_for_another_run_or_with_a_path_in_its_plans_is_refused(peers):
    mallory = peers["M"]
    body = mallory.document(make_registration(1))
    assert mallory.put(RegistrationKey("2d.fold_0.nnUNetTrainer"), body).status_code == 400
    body = mallory.document(make_registration(1, plans=make_plans(plans_name="../../evil")))
    assert mallory.put(RegistrationKey(RUN), body).status_code == 400


def test_a_failure_report_is_bounded(peers):
    with pytest.raises(ValueError, match="reason"):
        FailureReport(run=RUN, round=0, reason="x" * 8001)
    assert peers["M"].post("failures", {"run": RUN, "round": 0, "reason": "x" * 8001}).status_code == 400
    assert peers["M"].post("failures", {"run": RUN, "round": 0, "reason": "x" * 80_000}).status_code == 413


@contextmanager
def bare_server(app: Starlette, folder, *, encrypted: bool):
    """Serve an application that is no coordinator's; yield the server, its address and who vouches for it."""
    certificate = private_certificate(folder, ["127.0.0.1"]) if encrypted else None
    files = {"ssl_certfile": str(certificate.certificate), "ssl_keyfile": str(certificate.key)} if encrypted else {}
    server = GuardedServer(guarded_config(app, timeout_graceful_shutdown=1, **files))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield server, listening.getsockname(), str(certificate.authority) if encrypted else None
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        listening.close()
    assert not thread.is_alive()


def test_a_handshake_that_does_not_come_ends_the_connection(tmp_path, monkeypatch):
    monkeypatch.setattr(listener, "HANDSHAKE_S", 3.0)
    with bare_server(Starlette(), tmp_path, encrypted=True) as (_, address, authority):
        with (
            socket.create_connection(address, timeout=PATIENCE_S) as silent,
            socket.create_connection(address, timeout=PATIENCE_S) as halting,
        ):
            halting.sendall(b"\x16\x03\x01\x02\x00\x01")
            assert is_dropped(silent) and is_dropped(halting)
        answer = requests.get(f"https://127.0.0.1:{address[1]}/", timeout=PATIENCE_S, verify=authority)
        assert answer.status_code == 404


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "tls"])
def test_answers_that_nobody_reads_do_not_pile_up(tmp_path, encrypted):
    """One waits; the next is computed when it has gone."""
    size = 50_000
    app = Starlette(routes=[Route("/", lambda request: Response(bytes(size)))])
    with (
        bare_server(app, tmp_path, encrypted=encrypted) as (server, address, authority),
        socket.create_connection(address, timeout=PATIENCE_S) as plain,
    ):
        context = ssl.create_default_context(cafile=authority)
        connection = context.wrap_socket(plain, server_hostname="127.0.0.1") if encrypted else plain
        for _ in range(400):  # more answers than the system's own buffers hold
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        # A connection is counted before TLS, and has no flow to control before its handshake is over.
        wait_until(lambda: any(one.flow is not None and one.flow.write_paused for one in list(server.registry)))
        [one] = server.registry
        assert 0 < one.transport.get_write_buffer_size() < 3 * size
        received = len(connection.recv(1 << 16))
        while received < 400 * size:
            received += len(connection.recv(1 << 16))
        connection.close()


def test_a_request_may_come_ahead_of_its_turn_but_not_a_thousand(federation, peers):
    token = federation.credential("M").token
    first, next_one = head("GET", f"gatherings/{CensusKey()}?wait=1", token), head("GET", "settings", token)
    with raw(federation, first + next_one) as connection:
        assert read_head(connection).startswith(b"HTTP/1.1 202 ")
    many = first.replace(b"wait=1", b"wait=50") + next_one * 1000
    with raw(federation, many) as connection, suppress(ConnectionError):
        assert read_head(connection) == b"", "answered instead of dropped"
