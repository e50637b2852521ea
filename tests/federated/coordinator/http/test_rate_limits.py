"""What anybody may take of a coordinator, as plain state and a clock that is told."""

import asyncio
import re
from pathlib import Path

import pytest

import nnunetv2.federated
from nnunetv2.federated.coordinator.http.error_responses import STATUS_OF_CODE
from nnunetv2.federated.coordinator.http.rate_limits import (
    PACE,
    ConnectionRegistry,
    Limits,
    ProgressWatchdog,
    RateLimiter,
    address_group,
    lines_caused,
)
from nnunetv2.federated.coordinator.storage import quotas
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.exchanges.exchange import Contribution, with_contribution
from nnunetv2.federated.exchanges.registry import ExchangeRegistry
from nnunetv2.federated.exchanges.steps import fresh_exchange, parse_key
from nnunetv2.federated.protocol.api import FederationSettings


@pytest.mark.parametrize(
    ("host", "group"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8::ffff:1", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("unknown", "unknown"),
        ("x" * 99, "x" * 64),
    ],
)
def test_addresses_that_one_user_has_count_as_one(host, group):
    assert address_group(host) == group


@pytest.mark.parametrize(
    ("method", "path", "status", "lines"),
    [
        ("GET", "/v1/gatherings/x", 404, 0),
        ("PUT", "/v1/gatherings/runs/r/rounds/7", 200, 0),
        ("PUT", "/v1/gatherings/runs/r/rounds/7", 400, 1),
        ("POST", "/v1/offers/plans/p", 202, 0),
        ("PUT", "/v1/gatherings/plans/p", 200, 1),
        ("POST", "/v1/failures", 204, 1),
        ("PUT", "/v1/gatherings/runs/r/validations/7", 200, 0),
        ("PUT", "/v1/gatherings/runs/r/uploads/7", 200, 0),
        ("PUT", "/v1/gatherings/runs/r/survivors/7", 409, 1),
        ("PUT", "/v1/gatherings/runs/r/validations/7/survivors", 200, 0),
        ("PUT", "/v1/gatherings/runs/r/validations/7/others", 200, 1),
        ("POST", "/v1/runs/r/actions", 200, 1),
    ],
)
def test_what_fills_the_log_is_counted(method, path, status, lines):
    assert lines_caused(method, path, status) == lines


# ------------------------------------------------------------------------------------------------------------- pace
@pytest.mark.parametrize("phase", ["headers", "rest"])
def test_headers_and_unwanted_bodies_have_a_deadline(phase):
    pace, (seconds, _) = ProgressWatchdog(), PACE[phase]
    assert not any(pace.is_too_slow(phase, 10.0**9 * now, now) for now in range(int(seconds)))
    assert pace.is_too_slow(phase, 1e12, seconds)


def test_a_body_must_make_progress():
    pace, (seconds, least) = ProgressWatchdog(), PACE["body"]
    assert not pace.is_too_slow("body", 0, 0.0)
    assert not pace.is_too_slow("body", least, seconds)
    assert not pace.is_too_slow("body", 2 * least - 1, 2 * seconds - 1)
    assert pace.is_too_slow("body", 2 * least - 1, 2 * seconds)


def test_waiting_is_no_fault():
    pace = ProgressWatchdog()
    assert not any(pace.is_too_slow("other", 0, now) for now in (0.0, 1e6))
    assert not pace.is_too_slow("headers", 0, 1e6)


# ------------------------------------------------------------------------------------------------------ connections
def make_book(**limits) -> ConnectionRegistry:
    return ConnectionRegistry(
        Limits(**{"connections": 5, "idle_connections": 4, "idle_connections_per_address": 2, **limits})
    )


def test_the_oldest_connection_of_an_address_makes_room():
    book = make_book()
    assert [book.opened(number, "192.0.2.1") for number in range(3)] == [None, None, 0]
    assert book.opened("other", "192.0.2.2") is None


def test_a_connection_at_work_for_a_member_stays():
    book = make_book()
    book.opened("at work", "192.0.2.1")
    book.busy("at work")
    assert [book.opened(number, "192.0.2.1") for number in range(3)] == [None, None, 0]
    assert book.idle("at work") == 1, "when it is idle again there is one too many"
    assert [book.opened(number, "192.0.2.1") for number in (3, 4)] == [2, 3], "a member's is the last to go"


def test_all_connections_together_are_bounded():
    book = make_book(idle_connections_per_address=100)
    for number in range(4):
        assert book.opened(number, f"192.0.2.{number}") is None
    assert book.opened(4, "192.0.2.99") == 0
    for number in (1, 2, 3, 4):
        book.busy(number)
    assert book.opened(5, "192.0.2.99") is None
    assert book.opened(6, "192.0.2.99") == 5
    book.busy(6)
    assert book.opened(7, "192.0.2.99") == 7, "nobody else can make room"
    assert set(book) == {1, 2, 3, 4, 6}
    for number in range(8):
        book.closed(number)
    assert len(book) == len(book._idle) == 0 and not book._idle_of_address


def test_of_a_burst_all_that_are_too_many_make_room():
    """None of them has been closed yet when the last one comes."""
    book = ConnectionRegistry(Limits())
    evicted = {book.opened(number, "192.0.2.1") for number in range(15_000)} - {None}
    assert len(evicted) == 15_000 - Limits().idle_connections_per_address
    assert len(book) == Limits().idle_connections_per_address


def test_silent_connections_make_room_before_those_that_have_said_something():
    book = make_book(idle_connections_per_address=3)
    for number in range(3):
        book.opened(number, "192.0.2.1")
    book.heard(0)
    assert [book.opened(number, "192.0.2.1") for number in (3, 4)] == [1, 2]
    for number in (3, 4):
        book.heard(number)
    assert book.opened(5, "192.0.2.1") == 0
    book.heard(0), book.closed(0)  # what still happens on a connection that has made room
    assert set(book) == {3, 4, 5}


def test_when_files_run_out_only_strangers_make_room():
    book = make_book(idle_connections_per_address=4)
    for number in range(4):
        book.opened(number, "192.0.2.1")
    book.busy(0), book.busy(1), book.idle(1), book.heard(2)
    assert book.give_up_strangers(32) == [3, 2]
    assert set(book) == {0, 1}


@pytest.mark.parametrize(
    ("files", "expected"),
    [(65_536, (8192, 2048, 512)), (4096, (3072, 1536, 512)), (1024, (768, 384, 192)), (256, (192, 96, 48))],
)
def test_connections_leave_file_descriptors_to_the_rest(files, expected):
    limits = Limits().within_files(files)
    assert (limits.connections, limits.idle_connections, limits.idle_connections_per_address) == expected


# ------------------------------------------------------------------------------------------------------------- gate
class Caller:
    """A gate in front of an application that answers with a given status, and its clock."""

    def __init__(self, status: int = 200, **limits) -> None:
        self.now, self.status = 0.0, status
        self.gate = RateLimiter(
            self.answer,
            limits=Limits(**limits),
            clock=lambda: self.now,
            identify=lambda scope: scope["headers"] or None,
        )
        self.passed = 0
        self.hold: asyncio.Event | None = None

    async def answer(self, scope, receive, send) -> None:
        self.passed += 1
        if self.hold is not None:
            await self.hold.wait()
        await send({"type": "http.response.start", "status": self.status, "headers": []})

    async def ask(self, member: str = "", host: str = "192.0.2.1", method: str = "GET") -> tuple[int, dict]:
        sent = []

        async def send(message) -> None:
            sent.append(message)

        scope = {"type": "http", "method": method, "path": "/v1/settings", "headers": member, "client": (host, 1)}
        await self.gate(scope, None, send)
        return sent[0]["status"], dict(sent[0]["headers"])


def test_strangers_are_limited_by_address_and_members_are_not_touched_by_that():
    caller = Caller(stranger_requests_at_once=2, stranger_requests_per_s=0.1)

    async def scenario() -> None:
        assert [(await caller.ask())[0] for _ in range(3)] == [200, 200, 429]
        _, headers = await caller.ask()
        assert headers[b"retry-after"] == b"10"
        assert (await caller.ask(member="A"))[0] == (await caller.ask(host="192.0.2.2"))[0] == 200
        caller.now += 10
        assert (await caller.ask())[0] == 200

    asyncio.run(scenario())


def test_members_are_limited_one_by_one():
    caller = Caller(requests_at_once=2, requests_per_s=1)

    async def scenario() -> None:
        assert [(await caller.ask("A"))[0] for _ in range(3)] == [200, 200, 429]
        assert (await caller.ask("B"))[0] == 200
        assert caller.passed == 3

    asyncio.run(scenario())


def test_a_member_whose_requests_are_refused_may_still_ask():
    caller = Caller(status=400, lines_at_once=2)

    async def scenario() -> None:
        assert [(await caller.ask("A", method="PUT"))[0] for _ in range(3)] == [400, 400, 429]
        assert (await caller.ask("A"))[0] == 400

    asyncio.run(scenario())


def test_requests_at_work_are_bounded():
    caller = Caller(simultaneous_requests=2)

    async def scenario() -> None:
        caller.hold = asyncio.Event()
        waiting = [asyncio.ensure_future(caller.ask("A")) for _ in range(2)]
        await asyncio.sleep(0)
        assert (await caller.ask("A"))[0] == 429
        caller.hold.set()
        assert [(await one)[0] for one in waiting] == [200, 200]
        assert (await caller.ask("A"))[0] == 200
        assert not caller.gate._at_work

    asyncio.run(scenario())


# ------------------------------------------------------------------------------------------------------------ quotas
def test_a_site_has_only_so_much_open(tmp_path, monkeypatch):
    monkeypatch.setattr(quotas, "MAX_OPEN", 3)
    monkeypatch.setattr(quotas, "RESERVED_BYTES", 0)
    settings = FederationSettings(federation="test", sites=("A", "B"))
    book = ExchangeRegistry(settings)
    for number in range(3):
        exchange = fresh_exchange(parse_key(f"plans/p{number}"), settings)
        book.put(with_contribution(exchange, "A", Contribution("0" * 64, 10, 0.0)))

    def check(key: str, site: str = "A", size: int = 10) -> None:
        quotas.check_room(parse_key(key), site, size, registry=book, folder=tmp_path)

    check("plans/p0"), check("plans/p3", site="B"), check("runs/r/rounds/0")
    with pytest.raises(RefusedError, match="3 gatherings that are still open") as info:
        check("plans/p3")
    assert info.value.code == "too_many_gatherings"
    with pytest.raises(RefusedError, match="more than 1024 MiB") as info:
        check("plans/p0", size=quotas.MAX_OPEN_BYTES)
    assert info.value.code == "too_many_bytes"


def test_room_is_kept_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(quotas, "RESERVED_BYTES", 1 << 60)
    book = ExchangeRegistry(FederationSettings(federation="test", sites=("A", "B")))
    with pytest.raises(RefusedError, match="disk is full") as info:
        quotas.check_room(parse_key("runs/r/rounds/0"), "A", 1, registry=book, folder=tmp_path)
    assert STATUS_OF_CODE[info.value.code] == 507  # the site asks again


# ------------------------------------------------------------------------------------------------------------- codes
def test_every_code_has_its_status():
    folder = Path(nnunetv2.federated.__file__).parent
    sources = [path.read_text(encoding="utf-8") for path in folder.rglob("*.py")]
    codes = {code for source in sources for code in re.findall(r'\bcode="([a-z_]+)"', source)}
    at_the_site = {
        "unexpected_answer",
        "not_allowed_here",
        "roster_unverified",
        "round_spent",
        "run_began_anew",
        "run_key_lost",
    }
    at_the_site |= {"second_set", "survivors_implausible", "false_envelope", "sum_too_small", "networks_differ"}
    assert len(codes) > 30 and codes - at_the_site <= STATUS_OF_CODE.keys()
    assert all(400 <= status < 600 for status in STATUS_OF_CODE.values())
