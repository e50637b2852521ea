"""Documents on their way through an engine that is slow, loses messages, or is away."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from fake_engine import FakeChannel
from fake_federation import RUN, make_census, make_registration, make_settings, make_weights, wait_until
from patience import PATIENCE_S

from nnunetv2.federated.coordinator.http.rate_limits import Limits
from nnunetv2.federated.coordinator.members import Member, create_federation
from nnunetv2.federated.coordinator.service import Coordinator
from nnunetv2.federated.coordinator.site_service import Result
from nnunetv2.federated.coordinator.storage.store import Store
from nnunetv2.federated.engine import remote as remote_module
from nnunetv2.federated.engine.channel import PIECE_BYTES, Answer, Available, Request, decode_frame, encode_frame
from nnunetv2.federated.engine.remote import RemoteCoordinator
from nnunetv2.federated.engine.responder import Responder
from nnunetv2.federated.errors import RefusedError, WireError
from nnunetv2.federated.protocol import api, messages
from nnunetv2.federated.protocol.api import Secure
from nnunetv2.federated.protocol.document import TensorSpec, open_document, write_document
from nnunetv2.federated.protocol.keys import CensusKey, InitialKey, PlansKey, RegistrationKey, RoundKey
from nnunetv2.federated.site.results import weights_bytes

SHAPES = {"encoder.weight": (1000, 1300)}
"""5 MB: more than one piece."""


class Ends:
    """Both ends of an engine, with a channel for each of two sites."""

    def __init__(self, folder: Path, coordinator: Coordinator, **options) -> None:
        self.folder = folder
        self.coordinator = coordinator
        self.responder = Responder(coordinator, limits=options.pop("limits", Limits()))
        self.channels = {site: FakeChannel(self.responder, site) for site in ("A", "B")}
        self.options = {"away_s": 0.5, "piece_bytes": 1 << 20, **options}
        self.remotes = {site: self.remote(site) for site in self.channels}

    def remote(self, site: str) -> RemoteCoordinator:
        """Return the gateway's end of a site; of a gateway that was started again, if asked once more."""
        return RemoteCoordinator(
            self.channels[site],
            site=site,
            token=f"{site}.secret",
            folder=self.folder / f"gateway.{site}",
            **self.options,
        )

    def document(self, site: str, message, tensors=None) -> tuple[Path, str, int]:
        """Write a document as the gateway's HTTP side hands it over."""
        tensors = tensors or {}
        path = self.folder / f"gateway.{site}" / "incoming" / "whole"
        specs = {name: TensorSpec.of(values) for name, values in tensors.items()}
        digest = write_document(path, message, specs, tensors.values())
        return path, digest, path.stat().st_size

    def contribute(self, site: str, key: str, message, tensors=None) -> api.Receipt:
        return self.remotes[site].contribute(key, site, *self.document(site, message, tensors))

    def begin(self) -> None:
        """Let both sites register for a network of one tensor; A is to give its initial weights."""
        for site, cases in (("A", 9), ("B", 3)):
            self.contribute(site, RegistrationKey(RUN), make_registration(cases, SHAPES, aliases={}))
        wait_until(lambda: self.coordinator.state.registry.is_closed(RegistrationKey(RUN)))


@contextmanager
def both_ends(folder: Path, **options) -> Iterator[Ends]:
    with Store(folder / "federation") as store:
        if store.load_settings() is None:
            create_federation(store, make_settings(), now=time.time(), membership="engine")
        coordinator = Coordinator(store, log=lambda line: None)
        coordinator.start()
        ends = Ends(folder, coordinator, **options)
        try:
            yield ends
        finally:
            for remote in ends.remotes.values():
                remote.close()
            ends.responder.close()
            coordinator.stop()


@pytest.fixture
def ends(tmp_path):
    with both_ends(tmp_path) as ends:
        yield ends


def persist(ask):
    """Ask as a site's command does, until the answer is not 'try again'."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return ask()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def pieces(ends: Ends, site: str = "A") -> list[int]:
    return [request.offset for request in ends.channels[site].asked if request.op == "piece"]


# ------------------------------------------------------------------------------------------------------------ frames
def test_a_frame_returns_what_was_put_in():
    request, content = decode_frame(Request, encode_frame(Request(op="piece", name="k", offset=3), b"abc"))
    assert (request.op, request.offset, bytes(content)) == ("piece", 3, b"abc")


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\0\0\0\x05{}",
        b"\0\0\0\x02[]",
        b"\0\0\0\x02{}" + bytes(PIECE_BYTES + 1),
        encode_frame(Request(op="settings"))[:-1],
        (40).to_bytes(4, "big") + b'{"op": "settings", "site": "somebody"}  ',
        (14).to_bytes(4, "big") + b'{"op": "exit"}',
    ],
)
def test_what_is_no_frame_is_refused(frame, ends):
    with pytest.raises(WireError):
        decode_frame(Request, frame)
    answer, _ = decode_frame(Answer, ends.responder.answer("A", frame))
    assert answer.problem is not None and answer.problem.code == "invalid"


# --------------------------------------------------------------------------------------------------------- transfers
def test_a_document_travels_in_pieces_and_its_result_comes_back(ends):
    ends.begin()
    weights = make_weights(1, SHAPES)
    receipt = ends.contribute("A", InitialKey(RUN), messages.Update(), weights)
    assert not receipt.already and pieces(ends)[-1] >= 4 << 20
    ends.contribute("B", InitialKey(RUN), messages.Update())
    wait_until(lambda: ends.coordinator.state.registry.is_closed(InitialKey(RUN)))
    for site in ("A", "B"):
        result = persist(lambda site=site: ends.remotes[site].result(InitialKey(RUN), site))
        assert isinstance(result, Result)
        with open_document(result.path) as document:
            np.testing.assert_array_equal(document.read("encoder.weight"), weights["encoder.weight"])
    assert {request.op for request in ends.channels["A"].asked} >= {"offer", "piece", "result", "read"}


def test_a_transfer_that_was_cut_sends_one_piece_again_at_most(ends):
    ends.begin()
    path, digest, size = ends.document("A", messages.Update(), make_weights(1, SHAPES))
    cut = threading.Event()
    ends.channels["A"].lose_answer = lambda request: (
        request.op == "piece" and request.offset >= 2 << 20 and not cut.is_set()
    )
    with pytest.raises(OSError, match="does not reach the coordinator"):
        ends.remotes["A"].contribute(InitialKey(RUN), "A", path, digest, size)
    before = len(pieces(ends))
    cut.set()
    receipt = persist(lambda: ends.remotes["A"].offer(InitialKey(RUN), "A", digest, size))
    assert receipt.digest == digest
    again = [offset for offset in pieces(ends)[before:] if offset < 2 << 20]
    assert again == [], "what has arrived is not sent again"


def test_a_gateway_that_was_killed_goes_on_where_the_coordinator_is(ends):
    ends.begin()
    path, digest, size = ends.document("A", messages.Update(), make_weights(1, SHAPES))
    copy = path.read_bytes()
    ends.channels["A"].fault = lambda request: request.op == "piece" and request.offset >= 3 << 20
    with pytest.raises(OSError, match="does not reach"):
        ends.remotes["A"].contribute(InitialKey(RUN), "A", path, digest, size)
    ends.channels["A"].fault = lambda request: False
    ends.remotes["A"].close()
    for file in (ends.folder / "gateway.A" / "outgoing").iterdir():
        file.unlink()  # the new job has a folder of its own
    ends.remotes["A"] = ends.remote("A")
    before = len(pieces(ends))
    assert ends.remotes["A"].offer(InitialKey(RUN), "A", digest, size) is None
    path.write_bytes(copy)
    receipt = persist(lambda: ends.remotes["A"].contribute(InitialKey(RUN), "A", path, digest, size))
    assert receipt.digest == digest and min(pieces(ends)[before:]) == 3 << 20


def test_a_slow_transfer_goes_on_while_nobody_waits(ends, monkeypatch):
    ends.begin()
    path, digest, size = ends.document("A", messages.Update(), make_weights(1, SHAPES))
    goes_on = threading.Event()
    ends.channels["A"].fault = lambda request: request.op == "piece" and not goes_on.wait(PATIENCE_S)
    before = len(pieces(ends))
    monkeypatch.setattr(remote_module, "TRANSFER_WAIT_S", 0.1)
    with pytest.raises(OSError, match=r"0\.0 of 5\.0 MiB have passed the engine; the transfer goes on"):
        ends.remotes["A"].contribute(InitialKey(RUN), "A", path, digest, size)
    goes_on.set()
    receipt = persist(lambda: ends.remotes["A"].offer(InitialKey(RUN), "A", digest, size))
    assert receipt.digest == digest
    sent = pieces(ends)[before:]
    assert sent == sorted(set(sent)), "no piece was sent twice"


def test_a_download_goes_on_at_its_byte(ends):
    ends.begin()
    ends.contribute("A", InitialKey(RUN), messages.Update(), make_weights(1, SHAPES))
    ends.contribute("B", InitialKey(RUN), messages.Update())
    wait_until(lambda: ends.coordinator.state.registry.is_closed(InitialKey(RUN)))
    channel = ends.channels["B"]
    channel.fault = lambda request: request.op == "read" and request.offset > 0
    with pytest.raises(OSError, match="does not reach"):
        ends.remotes["B"].result(InitialKey(RUN), "B")
    channel.fault = lambda request: False
    ends.remotes["B"].result(InitialKey(RUN), "B")
    reads = [request.offset for request in channel.asked if request.op == "read"]
    assert reads.count(0) == 1


def test_a_coordinator_that_was_started_again_shows_its_files_again(tmp_path):
    with both_ends(tmp_path) as ends:
        ends.begin()
        ends.contribute("A", InitialKey(RUN), messages.Update(), make_weights(1, SHAPES))
        ends.contribute("B", InitialKey(RUN), messages.Update())
        wait_until(lambda: ends.coordinator.state.registry.is_closed(InitialKey(RUN)))
        answer = ends.remotes["A"]._answer(Request(op="result", name=InitialKey(RUN)))[0]
    with both_ends(tmp_path) as ends:
        with pytest.raises(RefusedError) as refused:
            ends.remotes["A"]._answer(Request(op="read", digest=answer.file.digest))
        assert refused.value.code == "not_open"
        ends.begin()  # as a command does when it goes on: its gateway learns how large the run's results may be
        assert isinstance(ends.remotes["A"].result(InitialKey(RUN), "A"), Result)


def test_only_a_site_that_was_shown_a_file_may_read_it(ends):
    ends.begin()
    result = ends.remotes["A"].result(RegistrationKey(RUN), "A")
    with pytest.raises(RefusedError) as refused:
        ends.remotes["B"]._answer(Request(op="read", digest=result.digest))
    assert refused.value.code == "not_open"


@pytest.mark.parametrize("offset", [0, 3])
def test_what_is_too_large_is_refused_at_any_piece(ends, offset):
    large = Request(op="piece", name=CensusKey(), digest="0" * 64, size=10**12, offset=offset)
    answer, _ = decode_frame(Answer, ends.responder.answer("A", encode_frame(large, b"abc")))
    assert answer.problem.code == "too_large"


def test_what_was_damaged_is_not_kept(ends):
    ends.begin()
    frame = encode_frame(Request(op="piece", name=CensusKey(), digest="0" * 64, size=3), b"abc")
    answer, _ = decode_frame(Answer, ends.responder.answer("A", frame))
    assert answer.problem.code == "damaged_in_transit"
    assert list((ends.coordinator.state.store.folder / "incoming").iterdir()) == []


# --------------------------------------------------------------------------------------- a coordinator that announces
class Announcer:
    """A coordinator that announces files of any size, each with a digest of its own, and sends zeros."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.sends_until = size
        self.num_announced = 0
        self.asked: list[Request] = []

    def ask(self, frame: bytes, *, timeout_s: float, is_piece: bool = False) -> bytes:
        request, _ = decode_frame(Request, frame)
        self.asked.append(request)
        if request.op in ("result", "model"):
            self.num_announced += 1
            return encode_frame(
                Answer(file=Available(name=request.name, digest=f"{self.num_announced:064x}", size=self.size))
            )
        if request.op != "read" or request.offset >= self.sends_until:
            raise ConnectionError("nobody answers")
        return encode_frame(Answer(), bytes(min(PIECE_BYTES, self.size - request.offset)))


@contextmanager
def gateway_of(announcer: Announcer, folder: Path) -> Iterator[RemoteCoordinator]:
    remote = RemoteCoordinator(announcer, site="A", token="A.secret", folder=folder, away_s=0.1)
    try:
        yield remote
    finally:
        remote.close()


def lying_in(folder: Path) -> list[str]:
    return sorted(path.name.rpartition(".")[2] for path in (folder / "results").iterdir())


@pytest.mark.parametrize("key", [RegistrationKey(RUN), PlansKey("p"), InitialKey(RUN), CensusKey()])
def test_a_result_that_is_announced_too_large_is_not_fetched(tmp_path, key):
    announcer = Announcer(2**61)
    with gateway_of(announcer, tmp_path) as remote, pytest.raises(WireError, match=r"at most \d+ are taken"):
        remote.result(key, "A")
    assert [request.op for request in announcer.asked] == ["result"] and lying_in(tmp_path) == []


@pytest.mark.parametrize(("free", "max_model_gb"), [(3 << 20, "64"), (1 << 40, "0.001")])
def test_a_model_that_is_announced_too_large_is_not_fetched(tmp_path, monkeypatch, free, max_model_gb):
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr("nnunetv2.federated.site.results.shutil.disk_usage", lambda folder: usage)
    monkeypatch.setenv("nnUNet_max_model_gb", max_model_gb)
    announcer = Announcer(2 << 20)  # the command that asks for it writes it once more
    with gateway_of(announcer, tmp_path) as remote, pytest.raises(WireError, match="the model of run"):
        remote.fetch_model("run", member="A")
    assert lying_in(tmp_path) == []


def test_what_is_announced_in_place_of_another_file_ends_that_transfer(tmp_path):
    announcer = Announcer(4 << 20)
    announcer.sends_until = PIECE_BYTES
    with gateway_of(announcer, tmp_path) as remote:
        for _ in range(5):
            with pytest.raises(OSError, match="does not reach"):
                remote.result(CensusKey(), "A")
        assert lying_in(tmp_path) == ["part"], "of one thing, one file is here"


def test_few_files_of_broken_transfers_stay(tmp_path):
    announcer = Announcer(4 << 20)
    announcer.sends_until = PIECE_BYTES
    with gateway_of(announcer, tmp_path) as remote:
        for number in range(2 * remote_module.KEPT_RESULTS):
            with pytest.raises(OSError, match="does not reach"):
                remote.result(PlansKey(f"p{number}"), "A")
    assert lying_in(tmp_path) == ["part"] * (remote_module.KEPT_RESULTS + 1), "and the last one, to be gone on with"


def test_a_file_of_another_content_than_was_said_does_not_stay(tmp_path):
    with gateway_of(Announcer(3 << 20), tmp_path) as remote, pytest.raises(OSError, match="damaged on its way"):
        remote.result(CensusKey(), "A")
    assert lying_in(tmp_path) == []


def test_a_gateway_learns_the_size_of_a_network_from_a_registration_that_is_held_already(ends):
    ends.begin()
    ends.remotes["A"].close()
    ends.remotes["A"] = ends.remote("A")
    registration = make_registration(9, SHAPES, aliases={})
    path, digest, size = ends.document("A", registration)
    assert ends.remotes["A"].offer(RegistrationKey(RUN), "A", digest, size) is None
    assert ends.remotes["A"].contribute(RegistrationKey(RUN), "A", path, digest, size).digest == digest
    assert ends.remotes["A"].offer(RegistrationKey(RUN), "A", digest, size).digest == digest
    assert ends.remotes["A"]._sizes.largest(InitialKey(RUN)) > weights_bytes(registration) > 5_000_000


# -------------------------------------------------------------------------------------------------------------- away
def test_an_engine_that_is_away_is_trouble_and_nothing_is_lost(ends):
    ends.channels["A"].is_away = True
    begin = time.monotonic()
    with pytest.raises(OSError, match="the engine does not reach the coordinator: the engine is away"):
        _ = ends.remotes["A"].settings
    assert time.monotonic() - begin < PATIENCE_S
    path, digest, size = ends.document("A", make_census())
    with pytest.raises(OSError, match="does not reach"):
        ends.remotes["A"].contribute(CensusKey(), "A", path, digest, size)
    ends.channels["A"].is_away = False
    assert ends.remotes["A"].offer(CensusKey(), "A", digest, size).digest == digest


def test_a_receipt_that_was_lost_is_asked_for_again(ends):
    lost = []

    def lose(request: Request) -> bool:
        lost.append(request.op)
        return request.op == "piece" and lost.count("piece") == 1

    ends.channels["A"].lose_answer = lose
    receipt = ends.contribute("A", CensusKey(), make_census())
    assert receipt.waiting_for == ("B",)
    assert len(ends.coordinator.state.store.load_events("contribution")) == 1


# -------------------------------------------------------------------------------------------------------- who may ask
def test_a_revoked_site_is_refused(ends):
    ends.coordinator.revoke("A", by="operator")
    with pytest.raises(RefusedError) as refused:
        _ = ends.remotes["A"].settings
    assert refused.value.code == "unauthorized"


def test_who_asks_too_much_has_to_wait(tmp_path):
    with both_ends(tmp_path, limits=Limits(requests_per_s=0.01, requests_at_once=3.0)) as ends:
        for _ in range(3):
            assert ends.remotes["A"].settings.federation == "test"
        with pytest.raises(RefusedError) as refused:
            _ = ends.remotes["A"].settings
        assert refused.value.code == "too_many_requests"
        assert ends.remotes["B"].settings.federation == "test"


def test_being_told_to_wait_costs_nothing(tmp_path):
    """Else who asks again too early never gets out."""
    with both_ends(tmp_path, limits=Limits(lines_per_s=1.0, lines_at_once=2.0)) as ends:
        ends.begin()
        now = time.monotonic() + 60
        ends.responder._clock = lambda: now
        request = Request(op="report_failure", body=api.FailureReport(run=RUN, reason="x").model_dump_json())

        def ask() -> str:
            answer, _ = decode_frame(Answer, ends.responder.answer("A", encode_frame(request)))
            return "" if answer.problem is None else answer.problem.code

        assert [ask() for _ in range(4)] == ["", "", "too_many_requests", "too_many_requests"]
        for _ in range(50):
            assert ask() == "too_many_requests"
        now += 2.1
        assert ask() == ""


def test_a_site_of_an_engine_cannot_fill_the_log_either(tmp_path):
    limits = Limits(lines_per_s=1e-6, lines_at_once=6.0)

    def leave_for_ever(ends) -> None:
        for number in range(99):
            action = api.RunAction(action="leave" if number % 2 == 0 else "return")
            ends.remotes["A"].act(RUN, action, Member("A", "site"))

    def fail_for_ever(ends) -> None:
        request = Request(op="report_failure", body=api.FailureReport(run=RUN, reason="x").model_dump_json())
        for _ in range(99):
            answer, _ = decode_frame(Answer, ends.responder.answer("A", encode_frame(request)))
            if answer.problem is not None:
                raise RefusedError(answer.problem.message, code=answer.problem.code)

    def contribute_for_ever(ends) -> None:
        for number in range(99):
            ends.contribute("A", CensusKey(), make_census(num_cases=3 + number))

    for number, act in enumerate((leave_for_ever, fail_for_ever, contribute_for_ever)):
        with both_ends(tmp_path / str(number), limits=limits) as ends:
            ends.begin()
            with pytest.raises(RefusedError) as refused:
                act(ends)
            assert refused.value.code == "too_many_requests"
            assert ends.remotes["B"].settings.federation == "test"
            assert len(ends.coordinator.state.store.load_events()) <= 16


@pytest.mark.slow
def test_a_site_of_an_engine_may_send_as_many_updates_as_there_are_rounds(tmp_path):
    with both_ends(tmp_path, limits=Limits(lines_per_s=1e-6, lines_at_once=2.0)) as ends:
        ends.begin()
        ends.contribute("A", InitialKey(RUN), messages.Update(), make_weights(0, SHAPES))
        ends.contribute("B", InitialKey(RUN), messages.Update())
        wait_until(lambda: ends.coordinator.state.registry.is_closed(InitialKey(RUN)))
        for number in range(3):
            for site in "AB":
                ends.contribute(site, RoundKey(RUN, number), messages.Update(), make_weights(number, SHAPES))
            wait_until(lambda: ends.coordinator.state.registry.is_closed(RoundKey(RUN, number)))  # noqa: B023


def test_traffic_is_counted_for_the_site_that_asks(ends):
    ends.contribute("A", CensusKey(), make_census())
    traffic = {(one.site, one.key): one for one in ends.coordinator.status().traffic}
    assert traffic["A", CensusKey()].bytes_received > 100


# ------------------------------------------------------------------------------------------------------------ members
def test_no_request_over_http_is_that_of_a_site_of_an_engine(ends):
    members = ends.coordinator.members
    for token in ("A.", "A.secret", "A"):
        with pytest.raises(RefusedError) as refused:
            members.authenticate(token)
        assert refused.value.code == "unauthorized"
    with pytest.raises(RefusedError, match="come through NVFlare: C cannot be invited") as refused:
        ends.coordinator.invite("C", "site", by="operator")
    assert refused.value.code == "forbidden"
    assert ends.coordinator.invite("eve", "observer", by="operator")


def test_sites_that_are_new_in_a_job_are_admitted_and_the_others_stay(ends):
    ends.coordinator.admit(("C", "A"), by="nvflare")
    assert ends.coordinator.settings.sites == ("A", "B", "C")
    ends.coordinator.revoke("C", by="operator")
    ends.coordinator.admit(("C",), by="nvflare")
    assert ends.coordinator.settings.sites == ("A", "B"), "what an operator has said stays"


def test_an_operator_lets_a_revoked_site_back_in(ends):
    ends.contribute("A", CensusKey(), make_census())
    ends.coordinator.revoke("A", by="operator")
    assert ends.coordinator.invite("A", "site", by="operator") == ""
    assert ends.remotes["A"].settings.sites == ("A", "B")
    assert {one.site: one.state for one in ends.coordinator.members.status()} == {"A": "active", "B": "active"}
    assert not ends.coordinator.state.registry.get(CensusKey()).contributions, "it may have been somebody else's"
    again = Coordinator(ends.coordinator.state.store)
    assert again.settings == ends.coordinator.settings and not again.members.is_revoked("A")
    with pytest.raises(RefusedError, match="come through NVFlare: A cannot be invited"):
        ends.coordinator.invite("A", "site", by="operator")


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (("C", "a"), "name_taken"),
        (("C", "c"), "name_taken"),
        (("C", "eve"), "name_taken"),
        (("Operator",), "name_taken"),
    ],
)
def test_a_job_admits_no_site_that_an_invitation_could_not_bring(ends, names, code):
    ends.coordinator.invite("eve", "observer", by="operator")
    with pytest.raises(RefusedError) as refused:
        ends.coordinator.admit(names, by="nvflare")
    assert refused.value.code == code and ends.coordinator.settings.sites == ("A", "B")


@pytest.mark.parametrize(
    ("settings", "most", "code"),
    [({}, 1000, "too_many_sites"), ({"secure": Secure(k=3), "min_sites": 3}, 64, "too_many_sites_for_secure")],
)
def test_a_job_admits_no_more_sites_than_there_can_be(tmp_path, settings, most, code):
    sites = tuple(f"S{number:04}" for number in range(most))
    with Store(tmp_path) as store:
        create_federation(store, make_settings(sites=sites[:-1], **settings), now=1.0, membership="engine")
        coordinator = Coordinator(store, log=lambda line: None)
        coordinator.admit(sites, by="nvflare")
        with pytest.raises(RefusedError) as refused:
            coordinator.admit((*sites, "T"), by="nvflare")
        assert refused.value.code == code and coordinator.settings.sites == sites
