"""Receive large bodies into one buffer, past the HTTP parser.

A parser for all of HTTP copies every byte three times and wakes the application for every 64 KiB; of an upload of a
hundred MiB only the first few KiB need one. The rest has a known length, so the connection gets another protocol
until it is there (asyncio's own way, as for an upgrade to another protocol):

    socket --> parser --> application        headers, and the bytes that came with them
    socket --> buffer --> application        the rest
    socket <-- parser <-- application        the answer, after which the connection is closed: the parser has lost count

Every upload has one buffer, however long it takes, and all uploads together have about as much as `BUFFERS_BYTES`.
"""

from __future__ import annotations

import asyncio
import mmap
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Protocol

from starlette.requests import ClientDisconnect
from starlette.types import Scope

BUFFER_BYTES = 1 << 20
"""Bytes that one upload may hold,"""
SMALLEST_BUFFER_BYTES = 32 << 10
BUFFERS_BYTES = 8 << 20
"""or less, so that all that arrive at the same time hold about this much together."""
CONNECTION = "connection"
"""Where the state of a request's scope holds its connection."""


def can_bypass(transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> bool:
    """Return whether a protocol may choose the buffer that this connection fills.

    Elsewhere asyncio fills a buffer of its own first and pours it out, whether or not reading was paused meanwhile:
    on Windows, and with TLS before Python 3.11.
    """
    is_encrypted = transport.get_extra_info("sslcontext") is not None
    return (
        sys.platform != "win32"
        and isinstance(loop, asyncio.SelectorEventLoop)
        and (sys.version_info >= (3, 11) or not is_encrypted)
    )


class BufferPool:
    """Share memory among all bodies that arrive, or all that leave. For one event loop.

    Args:
        largest: Bytes that one body may hold.
        total: Bytes that all hold together, roughly: none is told to hold less than `SMALLEST_BUFFER_BYTES`.
    """

    def __init__(self, largest: int = BUFFER_BYTES, total: int = BUFFERS_BYTES) -> None:
        self._largest, self._total = largest, total
        self._number = 0

    def opened(self) -> None:
        """Count one more body."""
        self._number += 1

    def closed(self) -> None:
        """Count one body less."""
        self._number -= 1

    @property
    def share(self) -> int:
        """Return the bytes that each of them may hold now."""
        return min(self._largest, max(SMALLEST_BUFFER_BYTES, self._total // max(1, self._number)))


class Connection(Protocol):
    """The connection of a request, as its handlers see it."""

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport

    def at_work(self) -> AbstractContextManager[None]:
        """Serve a member's request: meanwhile this connection makes room for nobody."""

    def can_bypass_parser(self) -> bool:
        """Return whether this connection can take a body with `large_body`."""

    def large_body(self, remaining: int, pool: BufferPool) -> AbstractAsyncContextManager[LargeBody]:
        """Receive the rest of the present body, of known length, past the parser."""

    def note_received(self, count: int) -> None:
        """Count bytes that have arrived."""

    def connection_lost(self, exc: Exception | None) -> None:
        """End the connection."""

    def pause_writing(self) -> None:
        """Wait before more is written."""

    def resume_writing(self) -> None:
        """Go on writing."""


def connection_of(scope: Scope) -> Connection | None:
    """Return the connection of a request; None where another server than ours has received it."""
    connection: Connection | None = scope.get("state", {}).get(CONNECTION)
    return connection


class LargeBody(asyncio.BufferedProtocol):
    """The protocol of a connection while `remaining` bytes of a body arrive on it.

    The connection is read only while somebody waits for the next piece, so a slow disk slows the sender down.
    """

    def __init__(self, connection: Connection, remaining: int, pool: BufferPool) -> None:
        self.remaining = remaining
        self._connection = connection
        self._pool = pool
        # Pages that are not touched take no memory, and all of it goes back at once.
        self._memory = mmap.mmap(-1, BUFFER_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._buffer = memoryview(self._memory)
        self._filled = 0
        self._goal = 0
        self._arrival: asyncio.Future[None] | None = None
        self._is_lost = False

    @property
    def is_awaited(self) -> bool:
        """Whether it is the sender's turn."""
        return self._arrival is not None and not self._arrival.done()

    async def pieces(self) -> AsyncIterator[memoryview]:
        """Yield the body in pieces, each valid until the next is requested.

        Raises:
            ClientDisconnect: The connection broke before all was there.
        """
        share = SMALLEST_BUFFER_BYTES  # at first: when hundreds begin together, each takes itself for one of a few
        while self.remaining:
            if self._is_lost:
                raise ClientDisconnect
            self._set_goal(min(share, self.remaining))
            self._arrival = self._connection.loop.create_future()
            self._connection.transport.resume_reading()
            await self._arrival
            yield self._buffer[: self._filled]
            share = self._pool.share

    def _set_goal(self, goal: int) -> None:
        """Make room for so many bytes, and return the memory of more."""
        kept = -(-goal // mmap.PAGESIZE) * mmap.PAGESIZE
        if kept < self._goal and hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED, kept)
        self._filled, self._goal = 0, goal

    async def discard(self, at_most: int) -> None:
        """Discard the rest, up to a limit.

        A sender that is cut off misses the answer.
        """
        async for piece in self.pieces():
            at_most -= len(piece)
            if at_most < 0:
                return

    # ------------------------------------------------------------------------------------------- called by asyncio
    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer[self._filled : self._goal]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        self.remaining -= nbytes
        self._connection.note_received(nbytes)
        if self._filled == self._goal:
            self._hand_over()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
        self._hand_over()  # the bytes so far are kept: the sender resumes behind them
        self._connection.connection_lost(exc)

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()

    def _hand_over(self) -> None:
        self._connection.transport.pause_reading()
        if self._arrival is not None and not self._arrival.done():  # not if the request was cancelled
            self._arrival.set_result(None)
