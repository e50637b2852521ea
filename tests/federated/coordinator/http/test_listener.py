"""Accepting connections: what happens when there are too many of them, or no file descriptor is left."""

import asyncio
import errno
import os
import socket
import ssl
import sys
from contextlib import suppress

import pytest

from nnunetv2.federated.coordinator.http import listener
from nnunetv2.federated.coordinator.http.listen_address import open_socket
from nnunetv2.federated.coordinator.http.listener import Listener
from nnunetv2.federated.coordinator.http.rate_limits import ConnectionRegistry, Limits
from nnunetv2.federated.coordinator.http.tls import private_certificate


class Echo(asyncio.Protocol):
    """A connection that answers what it hears."""

    def __init__(self, registry: ConnectionRegistry) -> None:
        self.registry = registry
        self.socket = self.transport = None
        self.is_dropped = False

    def connection_made(self, transport):
        self.transport = transport
        if self.socket is None:
            self.attach(transport)

    def data_received(self, data):
        self.heard()
        self.transport.write(data)

    def connection_lost(self, exc):
        self.detached()

    def attach(self, transport):
        self.socket = transport
        if self.is_dropped:
            transport.abort()

    def heard(self):
        self.registry.heard(self)

    def detached(self):
        self.registry.closed(self)

    def drop(self):
        self.is_dropped = True
        if self.socket is not None:
            self.socket.abort()


class OutOfFiles(socket.socket):
    """A listening socket that has no descriptor for a while."""

    failures = 0

    def accept(self):
        if self.failures:
            type(self).failures -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


class Serving:
    """A listener and its connections, in the loop of a test."""

    def __init__(self, listening: socket.socket | None = None, context=None, **limits) -> None:
        self.registry = ConnectionRegistry(Limits(**limits))
        self.made: list[Echo] = []
        self.listening = listening or open_socket("127.0.0.1", 0)
        self.address = self.listening.getsockname()
        self.listener = Listener(self.listening, self.make, self.registry, context)

    def make(self) -> Echo:
        self.made.append(Echo(self.registry))
        return self.made[-1]

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        self.listener.close()
        for one in list(self.registry):
            one.drop()
        await until(lambda: not len(self.registry) and not self.listener._beginnings)
        self.listening.close()

    async def connect(self, **options):
        return await asyncio.wait_for(asyncio.open_connection(*self.address, **options), 30)


async def until(condition):
    deadline = asyncio.get_running_loop().time() + 30
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


async def answers(connection) -> bool:
    reader, writer = connection
    try:
        writer.write(b"x")
        return await asyncio.wait_for(reader.read(1), 30) == b"x"
    except ConnectionError:
        return False


async def close(*connections):
    for _, writer in connections:
        writer.close()
        with suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()


def test_answers_are_sent_at_once():
    async def run():
        async with Serving() as serving:
            connection = await serving.connect()
            assert await answers(connection)
            accepted = serving.made[0].socket.get_extra_info("socket")
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            await close(connection)

    asyncio.run(run())


@pytest.mark.parametrize("failures", [1, 3])
def test_without_descriptors_strangers_make_room_and_members_stay(monkeypatch, caplog, failures):
    monkeypatch.setattr(listener, "ACCEPT_PAUSE_S", 0.02)

    async def run():
        listening = OutOfFiles(socket.AF_INET, socket.SOCK_STREAM)
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)
        async with Serving(listening) as serving:
            member, stranger = await serving.connect(), await serving.connect()
            assert await answers(member) and await answers(stranger)
            serving.registry.busy(serving.made[0]), serving.registry.idle(serving.made[0])
            OutOfFiles.failures = failures
            newcomer = await serving.connect()
            assert await answers(newcomer), "it was accepted when there was room again"
            assert await answers(member) and not await answers(stranger)
            assert OutOfFiles.failures == 0
            await close(member, stranger, newcomer)

    asyncio.run(run())
    assert caplog.text.count("no connection can be accepted for the moment") == 1, "not a line for each attempt"


def test_when_all_are_at_work_a_newcomer_is_sent_away():
    async def run():
        async with Serving(connections=1) as serving:
            member = await serving.connect()
            assert await answers(member)
            serving.registry.busy(serving.made[0])
            newcomer = await serving.connect()
            assert not await answers(newcomer) and await answers(member)
            await close(member, newcomer)

    asyncio.run(run())


def test_a_handshake_that_is_not_over_counts_and_makes_room(tmp_path):
    certificate = private_certificate(tmp_path, ["localhost"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.certificate, certificate.key)

    async def run():
        async with Serving(context=context, idle_connections_per_address=2) as serving:
            silent = [await serving.connect() for _ in range(2)]
            await until(lambda: len(serving.registry) == 2)
            trusting = ssl.create_default_context(cafile=str(certificate.authority))
            speaking = [await serving.connect(ssl=trusting, server_hostname="localhost") for _ in range(2)]
            assert [await answers(one) for one in speaking] == [True, True]
            assert [await answers(one) for one in silent] == [False, False]
            assert len(serving.registry) == 2
            await close(*silent, *speaking)

    asyncio.run(run())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="there they have none")
def test_encrypted_connections_share_one_buffer(tmp_path):
    certificate = private_certificate(tmp_path, ["localhost"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.certificate, certificate.key)

    async def run():
        async with Serving(context=context) as serving:
            trusting = ssl.create_default_context(cafile=str(certificate.authority))
            connections = [await serving.connect(ssl=trusting, server_hostname="localhost") for _ in range(2)]
            layers = [made.socket.get_protocol() for made in serving.made]
            assert all(layer.get_buffer(-1).obj is serving.listener._buffer for layer in layers)
            for (_, writer), text in zip(connections, (b"a" * 300_000, b"b" * 300_000)):
                writer.write(text)
            for (reader, _), letter in zip(connections, (b"a", b"b")):
                assert await asyncio.wait_for(reader.readexactly(300_000), 30) == letter * 300_000
            await close(*connections)

    asyncio.run(run())
