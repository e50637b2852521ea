"""Accept connections, and count each before its TLS handshake.

asyncio's own server counts nobody, tells its protocols of a connection only when the handshake is over, gives each
encrypted one a buffer of 256 KiB, and accepts on and on when no file descriptor is left.

    listening socket --> ConnectionRegistry --> [TlsLayer] --> HTTP
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
import sys
import time
from abc import ABC, abstractmethod
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable
from functools import partial
from typing import TypedDict

from nnunetv2.federated.coordinator.http.rate_limits import ConnectionRegistry

logger = logging.getLogger(__name__)

BACKLOG = 128
"""Connections that wait to be accepted."""
ACCEPTED_AT_ONCE = 32
"""Connections that are accepted before the others are served again."""
HANDSHAKE_S = 15.0
TLS_PARTING_S = 10.0
"""How long the other side has to agree to the end of an encrypted connection."""
RECEIVED_AT_ONCE = 256 << 10
OUT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
ACCEPT_PAUSE_S = 0.1
"""How long nobody is accepted after that has failed."""
LOG_EVERY_S = 60.0
"""How often that is logged at most."""


class Connection(asyncio.Protocol, ABC):
    """Base of the protocols above a listener."""

    @abstractmethod
    def attach(self, transport: asyncio.Transport) -> None:
        """Remember the transport that is the socket itself, below TLS."""

    @abstractmethod
    def heard(self) -> None:
        """Mark the connection as no longer silent."""

    @abstractmethod
    def detached(self) -> None:
        """Forget the connection: its socket is closed."""

    @abstractmethod
    def drop(self) -> None:
        """Close the socket at once."""


class _Deadlines(TypedDict, total=False):
    """Deadlines that asyncio sets for the encryption of a connection; before Python 3.11, for its beginning only."""

    ssl_handshake_timeout: float
    ssl_shutdown_timeout: float


class TlsLayer(SSLProtocol):
    """The encryption of one connection, without a buffer of its own.

    Data are decrypted in the call that has received them, so one buffer serves all connections of a loop. (Were
    asyncio to rename its two attributes, a connection would have a buffer of `max_size`.)
    """

    max_size = 16 << 10
    """Bytes that are decrypted at a time: one record."""

    def __init__(self, connection: Connection, context: ssl.SSLContext, buffer: bytearray) -> None:
        deadlines = _Deadlines(ssl_handshake_timeout=HANDSHAKE_S)
        if sys.version_info >= (3, 11):
            deadlines["ssl_shutdown_timeout"] = TLS_PARTING_S
        loop = asyncio.get_running_loop()
        # The stubs do not know that nobody need wait for the handshake, and that its deadline may be a fraction.
        super().__init__(loop, connection, context, None, server_side=True, **deadlines)  # type: ignore[arg-type]
        self._ssl_buffer, self._ssl_buffer_view = buffer, memoryview(buffer)
        self._connection = connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport), "a socket is read and written"
        self._connection.attach(transport)
        super().connection_made(transport)

    def buffer_updated(self, nbytes: int) -> None:
        self._connection.heard()
        super().buffer_updated(nbytes)

    def connection_lost(self, exc: BaseException | None) -> None:
        connection = self._connection
        del self._connection  # no circle: the connection holds its transport, which holds this layer
        super().connection_lost(exc)
        connection.detached()


class Listener:
    """Accept the connections of a listening socket until it is closed. For one event loop.

    Args:
        listening: The socket. Accepted ones have its options: TCP_NODELAY is set where its protocol is IPPROTO_TCP.
        make_connection: Returns the HTTP protocol of a new connection.
        registry: Of all connections.
        context: For TLS; None: plain HTTP.
    """

    def __init__(
        self,
        listening: socket.socket,
        make_connection: Callable[[], Connection],
        registry: ConnectionRegistry[Connection],
        context: ssl.SSLContext | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._listening = listening
        self._make_connection = make_connection
        self._registry = registry
        self._context = context
        self._buffer = bytearray(RECEIVED_AT_ONCE)
        self._beginnings: set[asyncio.Task[object]] = set()
        self._pause: asyncio.TimerHandle | None = None
        self._logged = -LOG_EVERY_S
        listening.setblocking(False)
        listening.listen(BACKLOG)
        self._resume()

    def close(self) -> None:
        """Accept nobody any more."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._listening)

    # ------------------------------------------------------------------------------------------------------ accepting
    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listening, self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                accepted, address = self._listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._wait_for_room(error)
                return
            self._admit(accepted, address[0])

    def _admit(self, accepted: socket.socket, host: str) -> None:
        """Begin to serve a connection, in place of another one if there are too many."""
        connection = self._make_connection()
        gives_way = self._registry.opened(connection, host)
        if gives_way is connection:
            accepted.close()
            return
        if gives_way is not None:
            gives_way.drop()
        accepted.setblocking(False)
        protocol: asyncio.BaseProtocol = connection
        if self._context is not None:
            protocol = TlsLayer(connection, self._context, self._buffer)
        beginning = self._loop.create_task(self._loop.connect_accepted_socket(lambda: protocol, accepted))
        self._beginnings.add(beginning)
        beginning.add_done_callback(partial(self._has_begun, accepted, connection))

    def _has_begun(self, accepted: socket.socket, connection: Connection, beginning: asyncio.Task[object]) -> None:
        self._beginnings.discard(beginning)
        if beginning.cancelled() or beginning.exception() is not None:
            accepted.close()
            connection.detached()

    def _wait_for_room(self, error: OSError) -> None:
        """Stop accepting for a moment. If descriptors have run out, strangers' idle connections give theirs back."""
        if error.errno in OUT_OF_FILES:
            for connection in self._registry.give_up_strangers(ACCEPTED_AT_ONCE):
                connection.drop()
        now = time.monotonic()
        if now - self._logged >= LOG_EVERY_S:
            self._logged = now
            logger.error(
                "no connection can be accepted for the moment: %s. Allow more open files (ulimit -n, "
                "LimitNOFILE) if this goes on",
                error.strerror or error,
            )
        self._loop.remove_reader(self._listening)
        self._pause = self._loop.call_later(ACCEPT_PAUSE_S, self._resume)
