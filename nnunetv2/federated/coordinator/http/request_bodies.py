"""Read the bodies of requests: small ones into messages, large ones into files."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request

from nnunetv2.federated.coordinator.http.large_bodies import BufferPool, Connection, connection_of
from nnunetv2.federated.coordinator.http.traffic_meter import traffic_of
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.protocol.strict_json import decode_json

Model = TypeVar("Model", bound=BaseModel)
Result = TypeVar("Result")

SMALL_BODY = 64 << 10
"""Bytes that a plain JSON body may have."""
DRAINED_BYTES = 64 << 20
"""A body up to this size is read to its end before it is refused, so that the refusal can be read."""
DOWNLOAD_BYTES, DOWNLOADS_BYTES = 256 << 10, 4 << 20
"""Bytes that one download holds at a time, and all of them roughly; bytes that the system has not taken count twice."""
WRITING_THREADS = min(8, max(2, os.cpu_count() or 1))
"""Threads that write and hash pieces: with more than there are cores, they only wait for one another."""
FINISHING_THREADS = 8
"""Threads that check and sync complete uploads. The threads that answer all other requests are not among these: however
many sites send, the rest is served."""


async def read_json(request: Request, model: type[Model]) -> Model:
    """Read a small JSON body."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > SMALL_BODY:
            raise RefusedError(f"the body has more than {SMALL_BODY} bytes", code="too_large")
    return decode_json(model, bytes(body))


@dataclass(frozen=True)
class UploadHeaders:
    """Digest, size and offset of an upload, by its headers."""

    digest: str
    """SHA-256 of the whole document."""
    size: int
    """Bytes of the whole document."""
    offset: int
    """The byte at which this request goes on."""


def read_upload_headers(request: Request) -> UploadHeaders:
    """Read the headers of an upload: Content-Length, X-Content-SHA256, and Content-Range where it goes on."""
    length = _length_header(request)
    text = request.headers.get("content-range")
    if text is None:
        return UploadHeaders(_digest_header(request), length, 0)
    match = re.fullmatch(r"bytes ([0-9]{1,15})-([0-9]{1,15})/([0-9]{1,15})", text)
    offset, last, size = map(int, match.groups()) if match else (0, 0, 0)
    if match is None or last != size - 1 or size - offset != length or length == 0:
        raise RefusedError(
            f"Content-Range {text[:80]!r} does not go with the length {length}", code="incomplete_request"
        )
    return UploadHeaders(_digest_header(request), size, offset)


def _length_header(request: Request) -> int:
    text = request.headers.get("content-length", "")
    if not re.fullmatch("[0-9]{1,15}", text):
        raise RefusedError("an upload must announce its length (Content-Length)", code="length_required")
    return int(text)


def _digest_header(request: Request) -> str:
    """Return the SHA-256 that the sender of a body has computed."""
    digest = request.headers.get("x-content-sha256", "")
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise RefusedError("an upload must announce its SHA-256 (X-Content-SHA256)", code="incomplete_request")
    return digest


class Reception:
    """Threads and memory that all uploads and downloads of one event loop share."""

    def __init__(self) -> None:
        self.buffers = BufferPool()
        self.downloads = BufferPool(DOWNLOAD_BYTES, DOWNLOADS_BYTES)
        self._writing = ThreadPoolExecutor(WRITING_THREADS, thread_name_prefix="writing")
        self._finishing = ThreadPoolExecutor(FINISHING_THREADS, thread_name_prefix="finishing")

    def close(self) -> None:
        """End the threads as soon as their work is done."""
        self._writing.shutdown(wait=False)
        self._finishing.shutdown(wait=False)

    async def write(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Run a function on a thread for writing."""
        return await asyncio.get_running_loop().run_in_executor(self._writing, function, *arguments)

    async def finish(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Run a function on a thread for complete uploads."""
        return await asyncio.get_running_loop().run_in_executor(self._finishing, function, *arguments)


class IncomingBody(Protocol):
    """The target of an incoming body, such as `PartialUpload`."""

    size: int

    def read_beginning(self) -> None:
        """Hash the bytes that have arrived already."""

    def append(self, *pieces: bytes) -> None:
        """Take the next pieces."""

    def hexdigest(self) -> str:
        """Return the SHA-256 of everything up to here."""

    def discard(self) -> None:
        """Forget all of it: it is of no use."""


async def receive(request: Request, upload: IncomingBody, headers: UploadHeaders, reception: Reception) -> None:
    """Stream the body of a request to the end of an upload.

    Raises:
        RefusedError: Its size or digest is not as announced.
    """
    await reception.write(upload.read_beginning)
    remaining, more_follow = headers.size - headers.offset, True
    while more_follow:
        piece, more_follow = await _next_piece(request)
        remaining -= len(piece)
        if remaining < 0:
            raise RefusedError(f"the body is longer than the {headers.size} bytes announced", code="too_large")
        connection = _bypass(request) if more_follow and remaining else None
        if connection is None:
            await reception.write(upload.append, piece)
            continue
        async with connection.large_body(remaining, reception.buffers) as rest:
            await reception.write(upload.append, piece)
            del piece  # else it lasts as long as the upload
            async for view in rest.pieces():
                traffic_of(request.scope).bypassed += len(view)
                await reception.write(upload.append, view)
        more_follow = False
    if upload.size != headers.size:
        raise RefusedError(
            f"the body has {upload.size} bytes, {headers.size} were announced", code="damaged_in_transit"
        )
    if upload.hexdigest() != headers.digest:
        upload.discard()
        raise RefusedError("the document was damaged on its way: its SHA-256 differs", code="damaged_in_transit")


async def _next_piece(request: Request) -> tuple[bytes, bool]:
    """Return the next bytes of the body, and whether more follow."""
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return message.get("body", b""), message.get("more_body", False)


def _bypass(request: Request) -> Connection | None:
    """Return the connection of a request if its body can be had without the parser."""
    connection = connection_of(request.scope)
    is_plain = "transfer-encoding" not in request.headers
    return connection if is_plain and connection is not None and connection.can_bypass_parser() else None


async def drain(request: Request) -> None:
    """Read and discard a small body: a client that is sending misses the answer."""
    length = request.headers.get("content-length", "")  # without one, a body has no end
    if re.fullmatch("[0-9]{1,15}", length) and int(length) <= DRAINED_BYTES:
        async for _ in request.stream():
            pass
