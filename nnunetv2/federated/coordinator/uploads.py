"""Read the bodies of requests: small ones into messages, large ones into files, none beyond its limit."""
from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from anyio import CapacityLimiter, to_thread
from pydantic import BaseModel
from starlette.requests import Request

from nnunetv2.federated.coordinator.partial_uploads import PartialUpload
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.strict_json import decode_json

Model = TypeVar("Model", bound=BaseModel)
Result = TypeVar("Result")

SMALL_BODY = 64 << 10
"""Bytes that a plain JSON body may have."""
DRAINED_BYTES = 4 << 20
"""A body up to this size is read to its end before it is refused, so that the refusal can be read."""
PIECE_BYTES = 2 << 20
"""A body is written in pieces of this size,"""
SMALLEST_PIECE_BYTES = 256 << 10
RECEIVED_BYTES = 32 << 20
"""or smaller ones, so that all bodies that arrive at the same time hold about this much together."""
WRITING_THREADS = 8
FINISHING_THREADS = 8
"""Threads that write and hash pieces, and that check and sync what is complete. The threads that answer all other
requests are not among them: however many sites send, the rest is served."""


async def read_json(request: Request, model: type[Model]) -> Model:
    """Read a small JSON body."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > SMALL_BODY:
            raise RefusedError(f"the body has more than {SMALL_BODY} bytes", code="too_large")
    return decode_json(model, bytes(body))


@dataclass(frozen=True)
class Announcement:
    """What the headers of an upload say about it."""

    digest: str
    """SHA-256 of the whole document."""
    size: int
    """Bytes of the whole document."""
    offset: int
    """The byte at which this request goes on."""


def announced(request: Request) -> Announcement:
    """Read the headers of an upload: Content-Length, X-Content-SHA256, and Content-Range where it goes on."""
    length = _announced_length(request)
    text = request.headers.get("content-range")
    if text is None:
        return Announcement(announced_digest(request), length, 0)
    match = re.fullmatch(r"bytes ([0-9]{1,15})-([0-9]{1,15})/([0-9]{1,15})", text)
    offset, last, size = map(int, match.groups()) if match else (0, 0, 0)
    if match is None or last != size - 1 or size - offset != length or length == 0:
        raise RefusedError(f"Content-Range {text[:80]!r} does not go with the length {length}",
                           code="incomplete_request")
    return Announcement(announced_digest(request), size, offset)


def _announced_length(request: Request) -> int:
    text = request.headers.get("content-length", "")
    if not re.fullmatch("[0-9]{1,15}", text):
        raise RefusedError("an upload must announce its length (Content-Length)", code="length_required")
    return int(text)


def announced_digest(request: Request) -> str:
    """Return the SHA-256 that the sender of a body has computed."""
    digest = request.headers.get("x-content-sha256", "")
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise RefusedError("an upload must announce its SHA-256 (X-Content-SHA256)", code="incomplete_request")
    return digest


class Reception:
    """What all uploads that arrive at the same time share: threads and memory. For one event loop."""

    def __init__(self) -> None:
        self._num_uploads = 0
        self._writing: CapacityLimiter | None = None
        self._finishing: CapacityLimiter | None = None

    @property
    def piece_bytes(self) -> int:
        """How much one upload may collect before it is written."""
        return min(PIECE_BYTES, max(SMALLEST_PIECE_BYTES, RECEIVED_BYTES // (2 * max(1, self._num_uploads))))

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """Count an upload for as long as the block lasts."""
        self._num_uploads += 1
        try:
            yield
        finally:
            self._num_uploads -= 1

    async def write(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Run a function on a thread for writing."""
        self._writing = self._writing or CapacityLimiter(WRITING_THREADS)
        return await to_thread.run_sync(function, *arguments, limiter=self._writing)

    async def finish(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Run a function on a thread for what is complete."""
        self._finishing = self._finishing or CapacityLimiter(FINISHING_THREADS)
        return await to_thread.run_sync(function, *arguments, limiter=self._finishing)


async def receive(request: Request, upload: PartialUpload, announcement: Announcement, reception: Reception) -> None:
    """Stream the body of a request to the end of an upload without ever holding much of it.

    A piece is hashed and written while the next one is received.

    Raises:
        RefusedError: It is not what was announced.
    """
    await reception.write(upload.read_beginning)
    arrived, pending, held = upload.size, [], 0
    writing: asyncio.Task[None] | None = None
    with reception.receiving():
        try:
            async for chunk in request.stream():
                arrived += len(chunk)
                if arrived > announcement.size:
                    raise RefusedError(f"the body is longer than the {announcement.size} bytes announced",
                                       code="too_large")
                pending.append(chunk)
                held += len(chunk)
                if held >= reception.piece_bytes:
                    if writing is not None:
                        await writing
                    writing = asyncio.create_task(reception.write(upload.append, *pending))
                    pending, held = [], 0
        finally:  # also if the connection breaks: the rest can follow on another one
            if writing is not None:
                await writing
            await reception.write(upload.append, *pending)
    if upload.size != announcement.size:
        raise RefusedError(f"the body has {upload.size} bytes, {announcement.size} were announced",
                           code="damaged_in_transit")
    if upload.hexdigest() != announcement.digest:
        upload.discard()
        raise RefusedError("the document was damaged on its way: its SHA-256 differs", code="damaged_in_transit")


async def drain(request: Request) -> None:
    """Read a small body that nobody wants: a client that is still sending would miss the answer."""
    length = request.headers.get("content-length", "")  # without one, a body has no end
    if re.fullmatch("[0-9]{1,15}", length) and int(length) <= DRAINED_BYTES:
        async for _ in request.stream():
            pass
