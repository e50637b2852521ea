"""Limit requests, connections and time, per member and per address.

Members are known by their credential, all others by their address. Requests of strangers cost members nothing: a site
whose neighbour behind the same address floods the coordinator is served as ever.
"""

from __future__ import annotations

import ipaddress
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Generic, Literal, TypeVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nnunetv2.federated.coordinator.http.error_responses import answer_too_many
from nnunetv2.federated.coordinator.http.large_bodies import connection_of
from nnunetv2.federated.coordinator.token_bucket import TokenBucket

Connection = TypeVar("Connection", bound=Hashable)

COSTLY_PATH = re.compile("/v1/status|/v1/runs/[^/]+/curves|/metrics")
COSTLY_REQUEST = 10.0
"""As how many requests one counts that makes more work than others."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits. A site in the busiest of rounds needs about a hundredth."""

    requests_per_s: float = 50.0
    """Of one member, in the long run,"""
    requests_at_once: float = 2000.0
    """and when it has been quiet before."""
    simultaneous_requests: int = 32
    """Of one member."""
    lines_per_s: float = 1 / 6
    """Lines of the audit log that one member may cause in the long run, refusals above all: 3 MB a day as a rule, 20
    with texts as long as they may be,"""
    lines_at_once: float = 300.0
    """and when it has caused none before."""
    stranger_requests_per_s: float = 20.0
    """Without a credential, from one address."""
    stranger_requests_at_once: float = 300.0
    connections: int = 8192
    """In all,"""
    idle_connections: int = 2048
    """those without a member's request on them,"""
    idle_connections_per_address: int = 512
    """and those of one address. The newest is let in: silent ones make room first, members' idle ones last."""

    def within_files(self, files: int) -> Limits:
        """Return limits that leave a quarter of the file descriptors to others."""
        connections = min(self.connections, files * 3 // 4)
        return replace(
            self,
            connections=connections,
            idle_connections=min(self.idle_connections, connections // 2),
            idle_connections_per_address=min(self.idle_connections_per_address, connections // 4),
        )


# -------------------------------------------------------------------------------------------------------- requests
def address_group(host: str) -> str:
    """Return the key under which an address is counted; for IPv6, its network."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host[:64]
    if address.version == 6 and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(getattr(address, "ipv4_mapped", None) or address)


_ROUTINE = re.compile(
    r"runs/[^/]+/(initial|(rounds|uploads|survivors|validations)/[0-9]+|validations/[0-9]+/(uploads|survivors))"
)
"""Keys of the documents that an orderly training sends, in clear or masked."""


def lines_caused(method: str, path: str, status: int) -> int:
    """Return the number of unwanted audit log lines that a member's request may have caused."""
    if method in ("GET", "HEAD"):
        return 0
    part, _, key = path.removeprefix("/v1/").partition("/")
    if part == "gatherings":
        return lines_of_contribution(key, is_refused=status >= 300)
    return 0 if status < 300 and part == "offers" else 1


def lines_of_contribution(key: str, *, is_refused: bool) -> int:
    """Return the number of unwanted audit log lines that a document may have caused."""
    return 0 if _ROUTINE.fullmatch(key) and not is_refused else 1


# ------------------------------------------------------------------------------------------------------------- pace
Phase = Literal["headers", "body", "rest", "answer", "other"]

PACE: dict[Phase, tuple[float, float]] = {
    "headers": (20.0, math.inf),
    "body": (30.0, 32 << 10),
    "rest": (5.0, math.inf),
    "answer": (60.0, 1),
}
"""Phase of a connection -> (seconds, progress that it must make in them); infinity: it must be over by then.

    headers  a request has begun, or the connection is new
    body     a body is being received
    rest     a request has been answered before its body was received
    answer   the other side has not taken the bytes that were sent
    other    it is the coordinator's turn, or nothing is going on
"""


class ProgressWatchdog:
    """Detect connections that are slower than they may be."""

    def __init__(self) -> None:
        self._phase: Phase = "other"
        self._since = 0.0
        self._progress = 0.0

    def is_too_slow(self, phase: Phase, progress: float, now: float) -> bool:
        """Check a connection's progress, a count that grows, against the pace of its phase."""
        if phase != self._phase:
            self._phase, self._since, self._progress = phase, now, progress
        seconds, least = PACE.get(phase, (math.inf, 0))
        if now - self._since < seconds:
            return False
        if progress - self._progress < least:
            return True
        self._since, self._progress = now, progress
        return False


# ------------------------------------------------------------------------------------------------------ connections
class Standing(IntEnum):
    """The order in which idle connections make room for others.

    The lowest first, of those the oldest.
    """

    SILENT = 0
    """Nothing has arrived on it."""
    STRANGER = 1
    """No request with a valid credential has."""
    MEMBER = 2


class _Idle(Generic[Connection]):
    """Idle connections, in the order in which they make room."""

    def __init__(self) -> None:
        # Dictionaries keep their order.
        self._by_standing: tuple[dict[Connection, None], ...] = tuple({} for _ in Standing)

    def __len__(self) -> int:
        return sum(map(len, self._by_standing))

    def add(self, connection: Connection, standing: Standing) -> None:
        self._by_standing[standing][connection] = None

    def remove(self, connection: Connection, standing: Standing) -> None:
        del self._by_standing[standing][connection]

    def first(self, highest: Standing = Standing.MEMBER) -> Connection | None:
        """Return the one that makes room first, if its standing is not above the highest."""
        return next((one for connections in self._by_standing[: highest + 1] for one in connections), None)


@dataclass(slots=True)
class _Entry:
    group: str
    standing: Standing = Standing.SILENT
    is_busy: bool = False


class ConnectionRegistry(Generic[Connection]):
    """Registry of the open connections; decides which makes room for others.

    One that makes room is forgotten at once, before it is closed: of a burst, all that are too many make room.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._entries: dict[Connection, _Entry] = {}
        self._idle = _Idle[Connection]()
        self._idle_of_address: dict[str, _Idle[Connection]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Connection]:
        return iter(self._entries)

    def opened(self, connection: Connection, host: str) -> Connection | None:
        """Add a connection; return the one that has to make room, if any.

        That is the new one itself, which is not noted then, if all others are at work for members.
        """
        entry = _Entry(address_group(host))
        gives_way = self._crowded_out(entry.group, len(self) >= self.limits.connections, connection)
        if gives_way is not connection:
            self._entries[connection] = entry
            self._add_idle(connection, entry)
        return gives_way

    def heard(self, connection: Connection) -> None:
        """Mark a connection as no longer silent: silent ones make room before it."""
        entry = self._entries.get(connection)
        if entry is not None and entry.standing is Standing.SILENT and not entry.is_busy:
            self._remove_idle(connection, entry)
            entry.standing = Standing.STRANGER
            self._add_idle(connection, entry)

    def busy(self, connection: Connection) -> None:
        """Mark a connection as at work for a member.

        It does not have to make room.
        """
        entry = self._entries.get(connection)
        if entry is not None and not entry.is_busy:
            self._remove_idle(connection, entry)
            entry.standing, entry.is_busy = Standing.MEMBER, True

    def idle(self, connection: Connection) -> Connection | None:
        """Mark a member's request as over.

        Returns the connection that has to make room, if any.
        """
        entry = self._entries.get(connection)
        if entry is None or not entry.is_busy:
            return None
        gives_way = self._crowded_out(entry.group, False, None)
        entry.is_busy = False
        self._add_idle(connection, entry)
        return gives_way

    def closed(self, connection: Connection) -> None:
        """Forget a connection."""
        entry = self._entries.pop(connection, None)
        if entry is not None and not entry.is_busy:
            self._remove_idle(connection, entry)

    def give_up_strangers(self, number: int) -> list[Connection]:
        """Forget and return up to so many idle connections of strangers.

        Files have run out.
        """
        given_up: list[Connection] = []
        while len(given_up) < number and (one := self._idle.first(Standing.STRANGER)) is not None:
            self.closed(one)
            given_up.append(one)
        return given_up

    def _crowded_out(self, group: str, is_full: bool, otherwise: Connection | None) -> Connection | None:
        """Forget and return the connection that makes room for one more, if any."""
        of_address = self._idle_of_address.get(group, ())
        if len(of_address) >= self.limits.idle_connections_per_address:
            gives_way = of_address.first() if of_address else otherwise
        elif is_full or len(self._idle) >= self.limits.idle_connections:
            gives_way = self._idle.first() if len(self._idle) else otherwise
        else:
            return None
        if gives_way is not None and gives_way is not otherwise:
            self.closed(gives_way)
        return gives_way

    def _add_idle(self, connection: Connection, entry: _Entry) -> None:
        self._idle.add(connection, entry.standing)
        self._idle_of_address.setdefault(entry.group, _Idle()).add(connection, entry.standing)

    def _remove_idle(self, connection: Connection, entry: _Entry) -> None:
        self._idle.remove(connection, entry.standing)
        of_address = self._idle_of_address[entry.group]
        of_address.remove(connection, entry.standing)
        if not of_address:
            del self._idle_of_address[entry.group]


# ------------------------------------------------------------------------------------------------------- middleware
class RateLimiter:
    """Answer 429 to those who ask too much, by the headers of their request alone.

    Args:
        identify: The name of the member whose credential a request shows, or None.
        clock: Seconds, from any moment on.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        identify: Callable[[Scope], str | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.app = app
        self._limits = limits
        self._identify = identify
        self._clock = clock
        self._requests = TokenBucket(per_s=limits.requests_per_s, at_once=limits.requests_at_once)
        self._lines = TokenBucket(per_s=limits.lines_per_s, at_once=limits.lines_at_once)
        self._strangers = TokenBucket(per_s=limits.stranger_requests_per_s, at_once=limits.stranger_requests_at_once)
        self._at_work: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        member = self._identify(scope)
        refusal = (
            self._refuse_stranger(scope)
            if member is None
            else self._refuse_member(member, scope["method"], scope["path"])
        )
        if refusal is not None:
            await answer_too_many(*refusal)(scope, receive, send)
        elif member is None:
            await self.app(scope, receive, send)
        else:
            await self._serve(member, scope, receive, send)

    def _refuse_stranger(self, scope: Scope) -> tuple[str, float] | None:
        address, now = address_group((scope.get("client") or ("unknown",))[0]), self._clock()
        if wait_s := self._strangers.wait_s(address, now):
            return f"too many requests without a valid credential come from {address}", wait_s
        self._strangers.spend(address, now)
        return None

    def _refuse_member(self, member: str, method: str, path: str) -> tuple[str, float] | None:
        """Return why a member has to wait, and the seconds; None if it need not."""
        now = self._clock()
        if self._at_work[member] >= self._limits.simultaneous_requests:
            return f"{member} has {self._at_work[member]} requests at work already", 1.0
        if wait_s := self._requests.wait_s(member, now):
            return f"{member} sends too many requests", wait_s
        if method not in ("GET", "HEAD") and (wait_s := self._lines.wait_s(member, now)):
            return f"too many requests of {member} were refused or reported something", wait_s
        self._requests.spend(member, now, COSTLY_REQUEST if COSTLY_PATH.fullmatch(path) else 1.0)
        return None

    async def _serve(self, member: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a member, whose connection makes room for nobody meanwhile."""
        status = 500
        connection = connection_of(scope)

        async def watching_send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        self._at_work[member] += 1
        try:
            with nullcontext() if connection is None else connection.at_work():
                await self.app(scope, receive, watching_send)
        finally:
            self._at_work[member] -= 1
            if not self._at_work[member]:
                del self._at_work[member]
            if lines := lines_caused(scope["method"], scope["path"], status):
                self._lines.spend(member, self._clock(), lines)
