"""A site's connection: what it says while it waits, and what it outlasts."""

import itertools
import re
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from cutter import Cutter, moved
from fake_federation import (
    LABELS,
    RUN,
    in_threads,
    make_census,
    make_client,
    make_registration,
    make_settings,
    make_weights,
    outcomes_in_threads,
    served,
    train,
    wait_until,
)
from patience import PATIENCE_S

from nnunetv2.federated.errors import CoordinatorUnreachable, FederationError, NotJoinedError, RefusedError
from nnunetv2.federated.protocol import api, messages
from nnunetv2.federated.protocol.document import TensorSpec
from nnunetv2.federated.protocol.keys import CensusKey, InitialKey, RegistrationKey, RoundKey
from nnunetv2.federated.protocol.strict_json import encode_json
from nnunetv2.federated.site.credential import SiteCredential
from nnunetv2.federated.site.transport import Transport
from nnunetv2.federated.site.transports import http as client_module
from nnunetv2.federated.site.transports.http import HttpTransport
from nnunetv2.federated.site.transports.http_requests import BearerToken, NoAnswerError, open_session

BIG = {"encoder.weight": (512, 1024), "encoder.bias": (512,)}  # 2 MiB


@pytest.fixture
def federation(tmp_path):
    with served(tmp_path / "federation", make_settings()) as federation:
        yield federation


# ----------------------------------------------------------------------------------------------------- the usual way
def test_two_sites_exchange_and_get_the_same_result(federation):
    def take_part(site, cases):
        with federation.client(site) as client:
            return client.exchange(CensusKey(), make_census(cases)).message.num_cases

    assert in_threads(lambda: take_part("A", 3), lambda: take_part("B", 4)) == [7, 7]


def test_the_client_is_a_transport(federation):
    with federation.client("A") as client:
        used: Transport = client
        assert used.settings() == federation.coordinator.settings
        state = used.run_state("nobody-has-registered-for-this")
        assert (state.registered, state.open_round, state.closed) == ((), None, False)
        assert client.status().federation == "test"


def test_the_progress_line_names_who_is_missing_and_only_when_that_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(client_module, "POLL_S", 1.0)  # gateways are not told of mere progress
    with served(tmp_path / "federation", make_settings(sites=("A", "B", "C"))) as federation:
        lines: list[str] = []

        def first():
            with federation.client("A", lines) as client:
                return client.exchange(CensusKey(), make_census()).message.num_cases

        def later(site, condition):
            wait_until(condition)
            with federation.client(site) as client:
                client.exchange(CensusKey(), make_census())

        federation.credential("A"), federation.credential("B"), federation.credential("C")
        results = in_threads(
            first, lambda: later("C", lambda: len(lines) == 1), lambda: later("B", lambda: len(lines) == 2)
        )
        assert results[0] == 9
        assert lines == ["fingerprint/census: waiting for B, C", "fingerprint/census: waiting for B"]


def test_results_do_not_pile_up_on_the_sites_disk(federation):
    with federation.client("A") as client:
        folder = client._folder.name

        def count_files(number: int) -> None:
            files = sorted(Path(folder).iterdir())
            assert len(files) <= 2, files  # the present result, and its digest

        with federation.client("B") as other:
            results = in_threads(
                lambda: train(client, seed=1, num_rounds=3, on_round=count_files),
                lambda: train(other, seed=2, num_rounds=3),
            )
    assert results[0] == results[1]
    assert not Path(folder).exists()


def test_specs_decide_how_tensors_travel(federation):
    with federation.client("A") as client:
        with pytest.raises(FederationError, match="float64"):
            client.contribute(CensusKey(), make_census(), {"x": np.zeros(3)})
        with pytest.raises(RefusedError, match="x is not expected"):
            client.contribute(
                CensusKey(), make_census(), {"x": np.zeros(3, np.float32)}, specs={"x": TensorSpec("F32", (3,))}
            )


# --------------------------------------------------------------------------------------------------------- refusals
def test_a_failed_closing_reaches_every_site_as_one_readable_line(federation):
    def take_part(site, labels):
        with federation.client(site) as client:
            client.exchange(CensusKey(), make_census(labels=labels))

    errors = outcomes_in_threads(lambda: take_part("A", LABELS), lambda: take_part("B", {"background": 0, "tumour": 1}))
    for error in errors:
        assert isinstance(error, RefusedError)
        assert str(error) == (
            "the sites' datasets do not go together: labels.liver is 1 at A and absent at B. Make "
            "dataset.json (and the segmentations) agree, then run the command again. Sites that annotate different "
            "classes can train together where the coordinator was founded with --labels union."
        )
    assert errors[0].code == "datasets_differ"
    assert any("fingerprint/census is refused: the sites' datasets" in line for line in federation.lines)


def test_a_site_whose_token_is_not_known_has_not_joined(federation):
    credential = federation.credential("A")
    with make_client(SiteCredential(credential.url, "test", "A", "A.wrong")) as client, pytest.raises(NotJoinedError):
        client.settings()


@pytest.mark.slow
def test_what_is_no_coordinator_is_reported_and_asked_again():
    listener = socket.create_server(("127.0.0.1", 0))

    def answer():
        for _ in range(100):
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 6\r\nConnection: close\r\n\r\n<html>")

    threading.Thread(target=answer, daemon=True).start()
    lines: list[str] = []
    credential = SiteCredential(f"http://127.0.0.1:{listener.getsockname()[1]}", "test", "A", "A.x")
    with (
        make_client(credential, lines, give_up_after_s=0.3) as client,
        pytest.raises(CoordinatorUnreachable, match="answers with status 502"),
    ):
        client.settings()
    listener.close()
    assert len(lines) == 1 and "not as a coordinator would; trying again" in lines[0]


@pytest.mark.slow
def test_a_line_that_differs_from_the_last_by_a_time_alone_is_told_once(federation, monkeypatch):
    seconds, lines = itertools.count(10), []

    def refuse(*_, **__):
        raise NoAnswerError(f"it is 2026-11-30 06:38:{next(seconds)} UTC by the clock of this machine")

    with make_client(federation.credential("A"), lines, give_up_after_s=0.3) as client:
        monkeypatch.setattr(client._session, "request", refuse)
        with pytest.raises(CoordinatorUnreachable, match="2026-11-30 06:38:"):
            client.settings()
    assert len(lines) == 1 and lines[0].startswith("it is 2026-11-30 06:38:11 UTC by the clock")


# ------------------------------------------------------------------------------------------------------ broken lines
@contextmanager
def cut_off_everywhere(answer: bytes):
    """Serve an answer that breaks off after one byte, then after a few more, and so on; yield the address."""
    ends = iter([*range(1, len(answer), 5), len(answer)])
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for end in ends:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer[:end])

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(PATIENCE_S)
        assert next(ends, None) is None, "it was content with less"


def http_answer(status: str, content: bytes) -> bytes:
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nCache-Control: no-store\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    ).encode() + content


def test_an_answer_that_is_cut_off_anywhere_is_asked_for_again(monkeypatch):
    monkeypatch.setattr("nnunetv2.federated.site.transports.http.LONGEST_PAUSE_S", 0.001)
    settings = make_settings()
    problem = api.Problem(code="not_expected", message="site A is not expected")
    with (
        cut_off_everywhere(http_answer("200 OK", encode_json(settings))) as url,
        make_client(SiteCredential(url, "test", "A", "A.x")) as client,
    ):
        assert client.settings() == settings
    with (
        cut_off_everywhere(http_answer("403 Forbidden", encode_json(problem))) as url,
        make_client(SiteCredential(url, "test", "A", "A.x")) as client,
        pytest.raises(RefusedError, match="site A is not expected"),
    ):
        client.settings()


@pytest.mark.slow
def test_giving_up_takes_as_long_as_was_asked_for_and_says_so_once():
    lines: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    client = make_client(SiteCredential(f"http://127.0.0.1:{port}", "test", "A", "A.x"), lines, give_up_after_s=0.4)
    begin = time.monotonic()
    with client, pytest.raises(CoordinatorUnreachable, match="has not answered for 0.4 s.*refused"):
        client.settings()
    assert time.monotonic() - begin >= 0.4
    assert lines == ["the coordinator cannot be reached (connection refused); trying again"]


@pytest.mark.slow
def test_a_silent_coordinator_is_noticed():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        credential = SiteCredential(f"http://127.0.0.1:{listener.getsockname()[1]}", "test", "A", "A.x")
        with (
            make_client(credential, timeout_s=0.2, give_up_after_s=0.3) as client,
            pytest.raises(CoordinatorUnreachable, match="does not answer in time"),
        ):
            client.settings()


def test_a_failure_report_never_raises_and_never_waits(federation):
    with federation.client("A") as client:
        client.report_failure(RUN, 2, "no run of this name: it is not taken, and nothing is raised")
        client.contribute(RegistrationKey(RUN), make_registration())
        client.report_failure(RUN, 2, "out of memory")
    assert federation.coordinator.status().failures[0].reason == "out of memory"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    waits: list[float] = []
    with make_client(SiteCredential(f"http://127.0.0.1:{port}", "test", "A", "A.x")) as client:
        client._is_closing.wait = lambda seconds: waits.append(seconds)
        client.report_failure(RUN, 2, "out of memory")
    assert sum(waits) < 5


def start_big_run(federation) -> None:
    """Bring a run with tensors of 2 MiB to the point where round 0 takes updates."""

    def take_part(site, own):
        with federation.client(site) as client:
            client.exchange(RegistrationKey(RUN), make_registration(2 if own else 1, BIG, aliases={}))
            client.exchange(InitialKey(RUN), messages.Update(), make_weights(0, BIG) if own else {})

    assert in_threads(lambda: take_part("A", True), lambda: take_part("B", False)) == [None, None]


@pytest.mark.slow
def test_an_upload_that_breaks_is_repeated_and_counts_once(federation):
    start_big_run(federation)
    with Cutter(federation.url, upload=[700_000, 1_500_000]) as cutter:
        with make_client(moved(federation.credential("A"), cutter.url)) as client:
            receipt = client.contribute(RoundKey(RUN, 0), messages.Update(), make_weights(1, BIG))
        assert receipt.waiting_for == ("B",)
    events = [event for event in federation.state.store.load_events("contribution") if event.key == RoundKey(RUN, 0)]
    assert len(events) == 1


def test_an_upload_goes_on_where_it_broke_even_after_a_restart_of_the_connection(federation):
    start_big_run(federation)
    size = sum(4 * int(np.prod(shape)) for shape in BIG.values())
    with Cutter(federation.url, upload=[1_900_000, 900_000]) as cutter:
        with make_client(moved(federation.credential("A"), cutter.url)) as client:
            client.contribute(RoundKey(RUN, 0), messages.Update(), make_weights(1, BIG))
        assert size < cutter.carried["upload"] < 1_900_000 + 900_000 + size  # those of three beginnings
    wait_until(lambda: not any((federation.state.store.folder / "incoming").iterdir()))


@pytest.mark.slow
def test_a_receipt_that_gets_lost_costs_no_second_upload(federation):
    start_big_run(federation)
    size = sum(4 * int(np.prod(shape)) for shape in BIG.values())
    # The answer to the offer has about 100 bytes; the receipt for the upload is what exceeds 300.
    with Cutter(federation.url, download=[300]) as cutter:
        with make_client(moved(federation.credential("A"), cutter.url)) as client:
            client.contribute(RoundKey(RUN, 0), messages.Update(), make_weights(1, BIG))
        assert size < cutter.carried["upload"] < 1.2 * size


@pytest.mark.slow
def test_a_download_goes_on_where_it_broke(federation):
    start_big_run(federation)
    size = sum(4 * int(np.prod(shape)) for shape in BIG.values())
    with Cutter(federation.url, download=[900_000, 700_000]) as cutter:
        lines: list[str] = []
        with make_client(moved(federation.credential("A"), cutter.url), lines) as client:
            document = client.result(InitialKey(RUN))
            expected = make_weights(0, BIG)
            for name in BIG:
                np.testing.assert_array_equal(document.read(name), expected[name])
        assert size < cutter.carried["download"] < 900_000 + 700_000 + size  # those of three beginnings
        assert lines == [
            "the coordinator cannot be reached (the connection broke); trying again",
            "the coordinator answers again",
        ]


@pytest.mark.slow
def test_waiting_outlasts_a_restart_of_the_coordinator(tmp_path):
    settings = make_settings()
    with served(tmp_path / "federation", settings) as federation:
        a, b = federation.credential("A"), federation.credential("B")
        with make_client(a) as client:
            client.contribute(CensusKey(), make_census(1))
    with served(tmp_path / "federation", settings) as federation:
        with make_client(moved(b, federation.url)) as client:
            assert client.exchange(CensusKey(), make_census(2)).message.num_cases == 3
        with make_client(moved(a, federation.url)) as client:
            assert client.exchange(CensusKey(), make_census(1)).message.num_cases == 3


# ---------------------------------------------------------------------------------------------------- asymmetric runs
@pytest.mark.slow
def test_a_site_receives_only_the_tensors_that_it_shares(tmp_path):
    shapes = {
        "A": {"deep.weight": (3, 3), "stem.weight": (2, 2)},
        "B": {"deep.weight": (3, 3), "stem.weight": (2, 2)},
        "C": {"stem.weight": (2, 2), "own.weight": (5,)},
    }
    with served(tmp_path / "federation", make_settings(sites=("A", "B", "C"), num_epochs=None)) as federation:

        def take_part(site):
            with federation.client(site) as client:
                match = client.exchange(RegistrationKey(RUN), make_registration(3, shapes[site], aliases={})).message
                own = {name for name, owner in match.initial_owner.items() if owner == site}
                values = {name: np.full(shape, ord(site), np.float32) for name, shape in shapes[site].items()}
                client.exchange(InitialKey(RUN), messages.Update(), {name: values[name] for name in own})
                shared = {name: values[name] for name, sites in match.shared.items() if site in sites}
                document = client.exchange(RoundKey(RUN, 0), messages.Update(), shared)
                return {name: float(document.read(name).max()) for name in sorted(document.specs)}

        results = in_threads(*(lambda site=site: take_part(site) for site in "ABC"))
    assert results == [
        {"deep.weight": 65.5, "stem.weight": 66.0},
        {"deep.weight": 65.5, "stem.weight": 66.0},
        {"stem.weight": 66.0},
    ]


@pytest.mark.slow
def test_who_misses_a_round_gets_the_latest_aggregate(tmp_path):
    settings = make_settings(sites=("A", "B", "C"), num_epochs=4, quorum=2, deadline_s=0.1)
    with served(tmp_path / "federation", settings) as federation:
        clients = {site: federation.client(site) for site in "ABC"}

        def begin(site):
            match = clients[site].exchange(RegistrationKey(RUN), make_registration()).message
            own = [name for name, owner in match.initial_owner.items() if owner == site]
            clients[site].exchange(InitialKey(RUN), messages.Update(), {name: make_weights(0)[name] for name in own})

        def play(site, number):
            return clients[site].exchange(RoundKey(RUN, number), messages.Update(), make_weights(number)).message

        assert in_threads(*(lambda site=site: begin(site) for site in "ABC")) == [None] * 3
        for number in range(3):
            for aggregate in in_threads(lambda: play("A", number), lambda: play("B", number)):  # noqa: B023
                assert (aggregate.round, aggregate.missing) == (number, ("C",))
        late = play("C", 0)  # not counted, and told where the others are
        assert (late.round, sorted(late.contributors)) == (2, ["A", "B"])
        last = in_threads(lambda: play("A", 3), lambda: play("B", 3), lambda: play("C", 3))
        assert all(aggregate.round == 3 for aggregate in last)
        for client in clients.values():
            client.close()
        assert any("round 0 is closed: A, B, missing C" in line for line in federation.lines)


# -------------------------------------------------------------------------------------------------------- the session
def test_proxies_are_used_except_for_this_machine(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    with open_session(SiteCredential("http://127.0.0.1:1", "test", "A", "A.x")) as session:
        assert session.trust_env is False
    with open_session(SiteCredential("https://hospital.example", "test", "A", "A.x")) as session:
        settings = session.merge_environment_settings("https://hospital.example", {}, None, None, None)
        assert settings["proxies"]["https"] == "http://proxy.example:3128"


def test_a_netrc_does_not_replace_the_token(tmp_path, monkeypatch):
    import requests

    (tmp_path / ".netrc").write_text("machine hospital.example login user password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    with open_session(SiteCredential("https://hospital.example", "test", "A", "A.token")) as session:
        prepared = session.prepare_request(requests.Request("GET", "https://hospital.example/v1/status"))
    assert prepared.headers["Authorization"] == "Bearer A.token"
    assert isinstance(session.auth, BearerToken)


def test_a_pinned_authority_is_not_overruled_by_the_environment(monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/etc/ssl/everybody.pem")
    for authority, expected in (("/site/ca.pem", "/site/ca.pem"), (None, "/etc/ssl/everybody.pem")):
        with open_session(SiteCredential("https://h.example", "test", "A", "A.x", authority=authority)) as session:
            settings = session.merge_environment_settings("https://h.example", {}, None, None, None)
            assert settings["verify"] == expected


def test_plain_http_beyond_this_machine_must_be_allowed():
    with pytest.raises(FederationError, match=re.escape("http://hospital.example is plain HTTP")):
        HttpTransport(SiteCredential("http://hospital.example", "test", "A", "A.x"))
    HttpTransport(SiteCredential("http://hospital.example", "test", "A", "A.x", insecure=True)).close()


def test_closing_ends_what_another_thread_waits_for(tmp_path, monkeypatch):
    monkeypatch.setattr(client_module, "POLL_S", 1.0)
    with served(tmp_path / "federation", make_settings(sites=("A", "B", "C"))) as federation:
        lines: list[str] = []
        client = federation.client("A", lines)

        def wait():
            with pytest.raises(FederationError, match="closed while it was in use"):
                client.exchange(CensusKey(), make_census())

        def close():
            wait_until(lambda: any("waiting for B, C" in line for line in lines))
            client.close()
            with federation.client("B") as other:  # ends the long poll
                other.contribute(CensusKey(), make_census())

        assert in_threads(wait, close) == [None, None]


@pytest.mark.slow
@pytest.mark.parametrize(("text", "seconds"), [(None, 86_400), ("48", 172_800), ("0.5", 1800)])
def test_people_at_the_site_say_how_long_to_wait(federation, monkeypatch, text, seconds):
    if text is not None:
        monkeypatch.setenv("nnUNet_fed_give_up_after_h", text)
    with HttpTransport(federation.credential("A")) as client:
        assert client.give_up_after_s == seconds


def test_patience_is_a_number_of_hours(federation, monkeypatch):
    monkeypatch.setenv("nnUNet_fed_give_up_after_h", "a day")
    with pytest.raises(ValueError, match="set it to a number of hours"):
        HttpTransport(federation.credential("A"))


def test_a_site_says_that_too_few_take_part(tmp_path):
    with served(tmp_path / "federation", make_settings(sites=("A", "B", "C"), min_sites=3)) as federation:
        federation.coordinator.revoke("C", by="boss")
        lines: list[str] = []

        def take_part(site):
            with federation.client(site, lines) as client:
                return client.exchange(CensusKey(), make_census()).message

        def come_back():
            wait_until(lambda: any("too few sites take part at the moment, waiting for 1 more" in one for one in lines))
            wait_until(
                lambda: any("fingerprint/census waits: A, B have contributed" in one for one in federation.lines)
            )
            federation.coordinator.invite("C", "site", by="boss")
            return take_part("C")

        results = in_threads(lambda: take_part("A"), lambda: take_part("B"), come_back)
        assert [result.num_cases for result in results] == [9, 9, 9]
