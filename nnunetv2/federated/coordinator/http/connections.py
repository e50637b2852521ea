"""Serve HTTP connections, and drop those too slow or too many.

uvicorn waits for ever for the headers of a new connection, for the rest of a body and for a reader that does not read.
Its protocol class gets the missing limits here; `rate_limits.py` sets them.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from nnunetv2.federated.coordinator.http.large_bodies import CONNECTION, BufferPool, LargeBody, can_bypass
from nnunetv2.federated.coordinator.http.listener import Connection, Listener
from nnunetv2.federated.coordinator.http.rate_limits import ConnectionRegistry, Limits, Phase, ProgressWatchdog
from nnunetv2.federated.protocol import api
from nnunetv2.federated.protocol.strict_json import encode_json

HEADER_BYTES = 16 << 10
"""Bytes that the headers of a request may have, or one line of a chunked body."""
REST_BYTES = 5 << 20
"""How much of a body is taken, and thrown away, after its request was answered: a sender that is cut off while it
sends would miss the answer."""
UNSENT_BYTES = 16 << 10
"""How much of the answers may wait for a reader before no more is written: asyncio keeps up to 512 KiB of each
encrypted connection, and strangers have many."""
AHEAD_BYTES = 12 << 10
"""Bytes of requests that may come ahead of their turn; less than is received at once, or nobody would notice them."""
RECEIVED_BYTES = 16 << 10
"""How much the parser is given at a time. It keeps as much memory until its request is over, and hundreds may upload:
asyncio would give it 256 KiB."""
KEEP_ALIVE_S = 75
WATCH_S = 2.0
STARTUP_FAILED = 3
"""Exit status where the application does not start; the log says why."""
PARTING_S = 0.3
"""How long a connection whose last answer was sent lasts when the server stops."""


class GuardedProtocol(H11Protocol, Connection):
    """One connection, watched.

    Args:
        registry: Of all connections of this server.
        options: The arguments that uvicorn gives its protocols.
    """

    def __init__(self, registry: ConnectionRegistry[Connection], **options: Any) -> None:
        super().__init__(**options)
        self.app_state = {**self.app_state, CONNECTION: self}  # where the application finds it: scope["state"]
        self._registry = registry
        self._socket: asyncio.Transport | None = None
        """Below TLS. The one above is of little use once it is closed: asyncio then waits for the other side."""
        self._is_dropped = False
        self._is_heard = False
        self._body: LargeBody | None = None
        self._watchdog = ProgressWatchdog()
        self._received = 0
        self._received_in_rest = 0
        self._unsent = 0
        self._times_sent = 0
        self._timer: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------------------------------------- called by asyncio
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport), "a connection is read and written"
        super().connection_made(transport)
        transport.set_write_buffer_limits(UNSENT_BYTES)
        if hasattr(transport, "max_size"):  # of asyncio's own loops but the one of Windows
            transport.max_size = RECEIVED_BYTES
        if self._socket is None:  # no TLS in between
            self.attach(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        self.heard()
        self.note_received(len(data))
        if self._phase() == "rest":
            self._received_in_rest += len(data)
            if self._received_in_rest > REST_BYTES:
                self.drop()
                return
        super().data_received(data)
        if self._has_many_requests_waiting():
            self.drop()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.detached()
        super().connection_lost(exc)

    # ------------------------------------------------------------------------------------------- called by the listener
    def attach(self, transport: asyncio.Transport) -> None:
        """Remember the transport that is the socket itself, below TLS."""
        self._socket = transport
        transport.set_write_buffer_limits(UNSENT_BYTES)
        if self._is_dropped:
            transport.abort()

    def heard(self) -> None:
        """Mark the connection as no longer silent."""
        if not self._is_heard:
            self._is_heard = True
            self._registry.heard(self)

    def detached(self) -> None:
        """Forget the connection: its socket is closed."""
        self._registry.closed(self)
        self.app_state = {}  # no circle: connections of strangers are freed at once

    def drop(self) -> None:
        """Close the socket at once, whatever the other side does."""
        self._is_dropped = True
        if self._socket is not None:
            self._socket.abort()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Serve a member's request: meanwhile this connection makes room for nobody."""
        self._registry.busy(self)
        try:
            yield
        finally:
            gives_way = self._registry.idle(self)
            if gives_way is not None:
                gives_way.drop()

    # --------------------------------------------------------------------------------------------- called by uvicorn
    def shutdown(self) -> None:
        """Take no further request, and end when the present one is answered."""
        if not self.transport.is_closing():
            super().shutdown()
        self._part()

    def _part(self) -> None:
        """End the connection soon after its last answer.

        To close it is not enough: with TLS, asyncio waits for the other side to close too, and a client that keeps a
        connection for its next request does not even notice that it should.
        """
        if self._timer is not None:
            self._timer.cancel()
        is_over = self._is_answered() and not self._count_unsent()
        self._timer = self.loop.call_later(PARTING_S, self.drop if is_over else self._part)

    # --------------------------------------------------------------------------------------------------- large bodies
    @asynccontextmanager
    async def large_body(self, remaining: int, pool: BufferPool) -> AsyncIterator[LargeBody]:
        """Receive the rest of the present body, of known length, past the parser.

        Enter it right after a part of the body was received, before anything else is awaited. The connection is closed
        after the answer.
        """
        # As if the request had asked for it.
        self.scope["headers"] = [*self.scope["headers"], (b"connection", b"close")]
        self.flow.pause_reading()  # the body itself says when to read; afterwards there is nothing to read
        self._body = LargeBody(self, remaining, pool)
        self.transport.set_protocol(self._body)
        pool.opened()
        try:
            yield self._body
        except Exception:
            await self._body.discard(REST_BYTES)
            raise
        finally:
            pool.closed()
            self.transport.set_protocol(self)
            self._body = None

    def can_bypass_parser(self) -> bool:
        """Return whether this connection can take a body with `large_body`."""
        return can_bypass(self.transport, self.loop)

    def note_received(self, count: int) -> None:
        """Count bytes that have arrived."""
        self._received += count

    # ------------------------------------------------------------------------------------------------------ watching
    def _watch(self) -> None:
        """Look again and again whether the connection makes progress, and drop it if not."""
        unsent = self._count_unsent()
        self._times_sent += unsent != self._unsent
        self._unsent = unsent
        phase = self._phase()
        progress = self._times_sent if phase == "answer" else self._received
        if self._watchdog.is_too_slow(phase, progress, self.loop.time()):
            self.drop()
        else:
            self._timer = self.loop.call_later(WATCH_S, self._watch)

    def _count_unsent(self) -> int:
        """Return the bytes of answers that wait for a reader."""
        assert self._socket is not None, "whoever made the connection has attached its socket"
        return self._socket.get_write_buffer_size()

    def _phase(self) -> Phase:
        if self._body is not None:
            return "body" if self._body.is_awaited else "other"
        if self._count_unsent():
            return "answer"
        answered = self._is_answered()
        if self.conn.their_state is h11.SEND_BODY:
            if answered:
                return "rest"
            return "other" if self.flow.read_paused else "body"
        has_begun = self.cycle is None or bool(self.conn.trailing_data[0])
        return "headers" if answered and has_begun else "other"

    def _has_many_requests_waiting(self) -> bool:
        """Tell whether many requests have come ahead of their turn; honest ones do not."""
        is_done = self._body is None and self.conn.their_state is h11.DONE
        return is_done and len(self.conn.trailing_data[0]) > AHEAD_BYTES

    def _is_answered(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    # ------------------------------------------------------------------------------------------------------- answers
    def send_400_response(self, msg: str) -> None:
        """Answer malformed HTTP with a problem document, if that can still be sent."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        body = encode_json(
            api.Problem(
                code="damaged_in_transit",
                message="the request is no proper HTTP",
                remedy="If this happens again, something in between damages requests.",
            )
        )
        head = h11.Response(
            status_code=400,
            reason=b"Bad Request",
            headers=[("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")],
        )
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()


def guarded_config(app: ASGIApp, **options: Any) -> uvicorn.Config:
    """Return the configuration of a guarded server."""
    # Below "error", uvicorn writes a line for every request that is no HTTP: whoever likes could fill a disk.
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="on",
        loop="asyncio",
        access_log=False,
        log_config=None,
        log_level="error",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        h11_max_incomplete_event_size=HEADER_BYTES,
        **options,
    )


class GuardedServer(uvicorn.Server):
    """A server that counts connections when they are accepted, and watches them."""

    def __init__(self, config: uvicorn.Config, limits: Limits | None = None) -> None:
        super().__init__(config)
        self.registry = ConnectionRegistry[Connection](limits or Limits())
        self.servers = []  # uvicorn closes asyncio's own at the end; here are listeners instead
        self._listeners: list[Listener] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then accept connections."""
        assert sockets, "a guarded server is given the sockets that it listens on"
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(STARTUP_FAILED)
        make_connection = partial(
            GuardedProtocol,
            self.registry,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            _loop=asyncio.get_running_loop(),
        )
        self._listeners = [Listener(one, make_connection, self.registry, self.config.ssl) for one in sockets]
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop; connections in their handshake, unknown to uvicorn, end at once."""
        for listener in self._listeners:
            listener.close()
        for connection in set(self.registry).difference(self.server_state.connections):
            connection.drop()
        await super().shutdown(sockets)


def allow_many_files() -> int:
    """Raise the soft limit of open files, and return it."""
    try:
        import resource
    except ImportError:  # Windows, which sets no such limit
        return 1 << 16
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1 << 16
    wanted = most if hard == resource.RLIM_INFINITY else min(hard, most)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return most if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted
