"""Rehearsals: bytes that go to a coordinator and back as weights do, and leave nothing."""

import hashlib
import http.client
import json
import os
from urllib.parse import urlsplit

import pytest
from fake_federation import make_settings, served, wait_until
from patience import PATIENCE_S

from nnunetv2.federated.commands.audit_log import describe
from nnunetv2.federated.coordinator.http import rehearsal_budget
from nnunetv2.federated.coordinator.http.rehearsal import PIECE_BYTES, content, digest_of_content
from nnunetv2.federated.coordinator.http.rehearsal_budget import BYTES_AT_ONCE, Rehearsals
from nnunetv2.federated.errors import NotJoinedError, RefusedError
from nnunetv2.federated.protocol import api
from nnunetv2.federated.site import rehearsal
from nnunetv2.federated.site.transports.http_requests import NoAnswerError


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    with served(tmp_path_factory.mktemp("rehearsal") / "federation", make_settings()) as one:
        yield one


def files_of(folder) -> dict[str, int]:
    return {str(file): file.stat().st_size for file in folder.rglob("*") if "sqlite" not in file.name}


def when_free(rehearse):
    """Rehearse as soon as the coordinator has noticed that the rehearsal before was broken off."""
    results = []

    def attempt() -> bool:
        try:
            results.append(rehearse())
        except RefusedError as error:
            if error.code != "refused":
                raise
        return bool(results)

    wait_until(attempt)
    return results[0]


def audit_log(store) -> str:
    return "\n".join(describe(row[2], row[4], json.loads(row[5])) for row in store.load_log())


@pytest.mark.parametrize("size", [1, 100_000, 5_000_001])
def test_bytes_go_there_and_back_and_none_is_kept(federation, size):
    with federation.client("A") as client:
        before = files_of(federation.state.store.folder)
        sent = rehearsal.send(client, size, limit_s=PATIENCE_S)
        fetched = rehearsal.fetch(client, size, limit_s=PATIENCE_S)
        assert (sent.num_bytes, sent.is_whole) == (fetched.num_bytes, fetched.is_whole) == (size, True)
        assert files_of(federation.state.store.folder) == before


def test_the_audit_log_and_the_traffic_tell_of_it(federation):
    with federation.client("B") as client:
        rehearsal.send(client, 123_456, limit_s=PATIENCE_S)
        assert "123456 bytes without content, not kept" in audit_log(federation.state.store)
        (own,) = (site for site in client.status().sites if site.site == "B")
        assert own.bytes_received >= 123_456


def test_a_line_that_is_too_slow_is_measured_all_the_same(federation):
    with federation.client("A") as client:
        sent = rehearsal.send(client, 200_000_000, limit_s=0)
        assert not sent.is_whole and sent.num_bytes < 200_000_000
        fetched = when_free(lambda: rehearsal.fetch(client, 200_000_000, limit_s=0))
        assert not fetched.is_whole and fetched.num_bytes < 200_000_000
        assert when_free(lambda: rehearsal.send(client, 1000, limit_s=PATIENCE_S)).is_whole


def test_strangers_cost_nothing(federation):
    """Their bodies are not read beyond what answers them."""
    address = urlsplit(federation.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=PATIENCE_S)
    connection.putrequest("PUT", "/v1/rehearsal")
    connection.putheader("Content-Length", str(400 << 20))
    connection.putheader("X-Content-SHA256", "0" * 64)
    connection.endheaders()
    assert connection.getresponse().status == 401
    connection.close()
    connection.request("GET", f"/v1/rehearsal?size={1 << 20}")
    assert connection.getresponse().status == 401
    connection.close()


@pytest.mark.parametrize("size", ["0", "-1", "", "1e9", str(api.LARGEST_REHEARSAL + 1)])
def test_sizes_that_make_no_sense_are_refused(federation, size):
    with (
        federation.client("A") as client,
        pytest.raises(RefusedError),
        client._request("GET", f"rehearsal?size={size}"),
    ):
        pass


def test_a_body_that_was_changed_on_its_way_is_refused(federation):
    body = rehearsal.RandomBody(1000, PATIENCE_S)
    with federation.client("A") as client, pytest.raises(NoAnswerError, match="damaged on its way"):
        client.rehearse_upload(body, "0" * 64)


def test_a_site_that_was_revoked_cannot_rehearse(tmp_path):
    with served(tmp_path / "federation", make_settings(sites=("A", "B", "C"))) as one, one.client("C") as client:
        one.coordinator.revoke("C", by="operator")
        with pytest.raises(NotJoinedError):
            rehearsal.send(client, 1000, limit_s=PATIENCE_S)


def test_a_site_rehearses_once_at_a_time_and_within_its_budget():
    now = 0.0
    rehearsals = Rehearsals(clock=lambda: now)
    with rehearsals.admitted("A", 1), pytest.raises(RefusedError, match="going on"), rehearsals.admitted("A", 1):
        pass
    for _ in range(BYTES_AT_ONCE // api.LARGEST_REHEARSAL):
        with rehearsals.admitted("A", api.LARGEST_REHEARSAL):
            pass
    with pytest.raises(RefusedError, match="enough bytes") as refusal, rehearsals.admitted("A", 1):
        pass
    assert refusal.value.code == "too_many_bytes"
    with rehearsals.admitted("B", api.LARGEST_REHEARSAL):
        pass
    now = 86_400.0
    with rehearsals.admitted("A", 1):
        pass


def test_no_more_than_a_few_sites_rehearse_at_the_same_time():
    rehearsals = Rehearsals()
    holds = [rehearsals.admitted(f"site{number}", 1) for number in range(rehearsal_budget.MOST_SITES)]
    for hold in holds:
        hold.__enter__()
    with pytest.raises(RefusedError, match="going on"), rehearsals.admitted("another", 1):
        pass
    for hold in holds:
        hold.__exit__(None, None, None)
    with rehearsals.admitted("another", 1):
        pass


def test_content_has_its_size_and_digest():
    whole = b"".join(content(PIECE_BYTES + 17))
    assert len(whole) == PIECE_BYTES + 17
    assert digest_of_content(len(whole)) == hashlib.sha256(whole).hexdigest()


def test_a_body_of_random_bytes_is_what_its_digest_says():
    body = rehearsal.RandomBody(2 * rehearsal.BLOCK_BYTES + 5, PATIENCE_S)
    read = b"".join(iter(lambda: body.read(os.getpid() % 1000 + 60_000), b""))
    assert len(read) == len(body) and hashlib.sha256(read).hexdigest() == body.digest()
