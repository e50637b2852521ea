"""Bodies that bypass the HTTP parser, over real sockets."""

import hashlib
import http.client
import random
import socket
import ssl
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from patience import PATIENCE_S
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from nnunetv2.federated.coordinator.http import large_bodies
from nnunetv2.federated.coordinator.http.connections import GuardedServer, guarded_config
from nnunetv2.federated.coordinator.http.large_bodies import (
    BUFFER_BYTES,
    BUFFERS_BYTES,
    SMALLEST_BUFFER_BYTES,
    BufferPool,
)
from nnunetv2.federated.coordinator.http.listen_address import tls_options
from nnunetv2.federated.coordinator.http.request_bodies import Reception, read_upload_headers, receive
from nnunetv2.federated.coordinator.http.tls import private_certificate
from nnunetv2.federated.coordinator.http.traffic_meter import traffic_of
from nnunetv2.federated.coordinator.storage.partial_uploads import PartialUploads
from nnunetv2.federated.errors import RefusedError

CONTENT = random.Random(0).randbytes(5 << 20)


class Receiver:
    """A server that receives bodies into files, and remembers how."""

    def __init__(self, folder: Path) -> None:
        self.uploads = PartialUploads(folder)
        self.reception = Reception()
        self.bypassed: list[int] = []
        self.disconnected = 0
        self.port = 0
        self.authority: str | None = None

    async def put(self, request) -> PlainTextResponse:
        headers = read_upload_headers(request)
        try:
            with self.uploads.writing(
                "key", request.path_params["site"], headers.digest, offset=headers.offset
            ) as upload:
                await receive(request, upload, headers, self.reception)
                upload.complete()
                assert hashlib.sha256(upload.path.read_bytes()).hexdigest() == headers.digest
                upload.discard()
        except RefusedError as error:
            return PlainTextResponse(error.code, 409)
        except OSError as error:
            return PlainTextResponse(str(error), 503)
        except ClientDisconnect:
            self.disconnected += 1
            raise
        finally:
            self.bypassed.append(traffic_of(request.scope).bypassed)
        return PlainTextResponse("stored")

    @property
    def bypasses_the_parser(self) -> bool:
        """Whether large bodies can go past the parser: in Python 3.10 not with TLS."""
        return self.authority is None or sys.version_info >= (3, 11)

    def connect(self) -> http.client.HTTPConnection:
        """Return a new connection to it."""
        if self.authority is None:
            return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        return http.client.HTTPSConnection(
            "localhost", self.port, timeout=PATIENCE_S, context=ssl.create_default_context(cafile=self.authority)
        )


@contextmanager
def receiving(folder: Path, *, is_encrypted: bool = False):
    """Run a receiver."""
    receiver = Receiver(folder)
    certificate = private_certificate(folder.parent / "tls", ["localhost"]) if is_encrypted else None
    if certificate is not None:
        receiver.authority = str(certificate.authority)
    app = Starlette(
        routes=[Route("/{site}", receiver.put, methods=["PUT"])],
        exception_handlers={ClientDisconnect: lambda request, error: PlainTextResponse("", 499)},
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        receiver.port = listener.getsockname()[1]
        server = GuardedServer(guarded_config(app, timeout_graceful_shutdown=2, **tls_options(certificate)))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield receiver
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
def receiver(request, tmp_path):
    folder = tmp_path / "uploads"
    folder.mkdir()
    with receiving(folder, is_encrypted=request.param) as receiver:
        yield receiver


def begin(
    receiver: Receiver, site: str, content: bytes, *, offset: int = 0, **headers: str
) -> http.client.HTTPConnection:
    """Send the headers of an upload."""
    connection = receiver.connect()
    connection.putrequest("PUT", f"/{site}")
    own = {"Content-Length": str(len(content) - offset), "X-Content-SHA256": hashlib.sha256(content).hexdigest()}
    if offset:
        own["Content-Range"] = f"bytes {offset}-{len(content) - 1}/{len(content)}"
    for name, value in {**own, **headers}.items():
        connection.putheader(name, value)
    connection.endheaders()
    return connection


def answer_of(connection: http.client.HTTPConnection) -> tuple[int, str]:
    """Read the answer, and let go of the connection."""
    answer = connection.getresponse()
    content = answer.read().decode()
    connection.close()
    return answer.status, content


def eventually(condition) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.mark.slow
def test_a_body_of_any_size_in_any_pieces_arrives_as_it_was_sent(receiver):
    def send(number: int) -> tuple[int, str]:
        rng = random.Random(number)
        content = CONTENT[: rng.choice([0, 1, 5000, 70_000, rng.randrange(1, len(CONTENT)), len(CONTENT)])]
        connection = begin(receiver, f"site{number}", content)
        position = 0
        while position < len(content):
            count = max(rng.choice([1, 1000, 70_000, 1 << 20]), len(content) // 40)
            connection.sock.sendall(content[position : position + count])
            position += count
        return answer_of(connection)

    with ThreadPoolExecutor(12) as pool:
        assert set(pool.map(send, range(48))) == {(200, "stored")}
    assert (sum(receiver.bypassed) > 20 * 2**20) is receiver.bypasses_the_parser


def test_a_connection_is_closed_after_a_body_that_bypassed_the_parser_and_kept_after_a_small_one(receiver):
    for content, is_kept in ((b"small", True), (CONTENT, not receiver.bypasses_the_parser)):
        connection = receiver.connect()
        connection.request("PUT", "/A", content, {"X-Content-SHA256": hashlib.sha256(content).hexdigest()})
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200
        assert (answer.headers.get("Connection") != "close") is is_kept
        connection.close()


def test_what_has_arrived_when_a_connection_breaks_can_be_gone_on_behind(receiver):
    connection = begin(receiver, "A", CONTENT)
    connection.sock.sendall(CONTENT[:3_500_000])
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert eventually(lambda: receiver.uploads.offset("key", "A", digest) > 2 << 20)
    connection.close()
    assert eventually(lambda: receiver.disconnected == 1)
    offset = receiver.uploads.offset("key", "A", digest)
    assert 2 << 20 < offset <= 3_500_000
    connection = begin(receiver, "A", CONTENT, offset=offset)
    connection.sock.sendall(CONTENT[offset:])
    assert answer_of(connection) == (200, "stored")


def test_a_sender_that_waits_to_be_told_to_go_on_is_told(receiver):
    connection = begin(receiver, "A", CONTENT, Expect="100-continue")
    assert connection.sock.recv(100).startswith(b"HTTP/1.1 100 ")
    connection.sock.sendall(CONTENT)
    assert answer_of(connection) == (200, "stored")


def test_a_body_in_chunks_goes_through_the_parser(receiver):
    connection = begin(receiver, "A", CONTENT, **{"Transfer-Encoding": "chunked"})
    for position in range(0, len(CONTENT), 1 << 20):
        piece = CONTENT[position : position + (1 << 20)]
        connection.sock.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
    connection.sock.sendall(b"0\r\n\r\n")
    assert answer_of(connection) == (200, "stored")
    assert receiver.bypassed == [0]


def test_a_refusal_in_the_middle_of_a_body_can_be_read(receiver, monkeypatch):
    from nnunetv2.federated.coordinator.storage import partial_uploads

    written = []

    def write_until_full(file, piece) -> None:
        written.append(len(piece))
        if sum(written) > 1 << 20:
            raise OSError("the disk is full")
        file.write(piece)

    monkeypatch.setattr(partial_uploads, "_write_all", write_until_full)
    connection = begin(receiver, "A", CONTENT)
    connection.sock.sendall(CONTENT)
    assert answer_of(connection) == (503, "the disk is full")


def test_a_damaged_body_is_refused(receiver):
    connection = begin(receiver, "A", CONTENT)
    connection.sock.sendall(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    assert answer_of(connection) == (409, "damaged_in_transit")


def test_all_bodies_together_hold_about_as_much_as_a_few():
    book = BufferPool()
    for number in (1, 4, 16, 64, 256):
        while book._number < number:
            book.opened()
        assert SMALLEST_BUFFER_BYTES <= book.share <= BUFFER_BYTES
        assert number * book.share <= BUFFERS_BYTES
    book.closed()
    assert book._number == 255


def test_without_an_event_loop_that_fills_buffers_the_parser_serves(receiver, monkeypatch):
    monkeypatch.setattr(large_bodies.sys, "platform", "win32")
    connection = begin(receiver, "A", CONTENT)
    connection.sock.sendall(CONTENT)
    assert answer_of(connection) == (200, "stored")
    assert receiver.bypassed == [0]
