"""Let a site rehearse a round with bytes of which none are kept.

    PUT /v1/rehearsal         a body with the headers of a document -> {digest, size}
    GET /v1/rehearsal?size=   so many bytes, with the headers of a result

Bodies are as large as weights, and take their way through proxies, connections and limits. Sites only, one at a time
each, within a budget of bytes; nothing reaches the disk.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from functools import lru_cache

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from nnunetv2.federated.coordinator.http.authentication import site_of
from nnunetv2.federated.coordinator.http.error_responses import json_response
from nnunetv2.federated.coordinator.http.request_bodies import drain, read_upload_headers, receive
from nnunetv2.federated.coordinator.http.services import services_of
from nnunetv2.federated.errors import FederationError, RefusedError
from nnunetv2.federated.protocol import api

PIECE_BYTES = 256 << 10


class Sink:
    """Takes a body as a document is taken, and keeps its size and digest alone."""

    def __init__(self) -> None:
        self.size = 0
        self._digest = hashlib.sha256()

    def read_beginning(self) -> None:
        """Do nothing: every rehearsal begins anew."""

    def append(self, *pieces: bytes) -> None:
        """Take the next pieces."""
        for piece in pieces:
            self._digest.update(piece)
            self.size += len(piece)

    def hexdigest(self) -> str:
        """Return the SHA-256 of everything up to here."""
        return self._digest.hexdigest()

    def discard(self) -> None:
        """Do nothing: nothing is kept."""


async def put_rehearsal(request: Request) -> Response:
    """Receive a body of which nothing is kept."""
    site, services = site_of(request), services_of(request)
    with ExitStack() as admission:
        try:
            headers = read_upload_headers(request)
            if headers.offset:
                raise RefusedError("a rehearsal is sent in one piece", code="incomplete_request")
            admission.enter_context(services.rehearsals.admitted(site, headers.size))
        except FederationError:
            await drain(request)
            raise
        sink = Sink()
        await receive(request, sink, headers, services.reception)
    await run_in_threadpool(services.site.note_rehearsal, site, sink.size)
    return json_response(api.Rehearsed(digest=sink.hexdigest(), size=sink.size))


async def get_rehearsal(request: Request) -> Response:
    """Send as many bytes as are asked for, which mean nothing."""
    site, services = site_of(request), services_of(request)
    text = request.query_params.get("size", "")
    if not re.fullmatch("[0-9]{1,15}", text):
        raise RefusedError(f"size must be a number of bytes, not {text[:40]!r}", code="incomplete_request")
    with ExitStack() as admission:
        admission.enter_context(services.rehearsals.admitted(site, int(text)))
        digest = await run_in_threadpool(digest_of_content, int(text))
        return RehearsedResult(int(text), digest, admission.pop_all())


class RehearsedResult(StreamingResponse):
    """Send bytes with the headers of a result, then end the rehearsal."""

    def __init__(self, size: int, digest: str, admission: ExitStack) -> None:
        headers = {
            "Content-Length": str(size),
            "X-Content-SHA256": digest,
            "ETag": f'"{digest}"',
            "Cache-Control": "no-store",
        }
        super().__init__(_asynchronous(content(size)), headers=headers, media_type="application/octet-stream")
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._admission:
            await super().__call__(scope, receive, send)


REHEARSAL_ROUTES = [
    Route("/v1/rehearsal", put_rehearsal, methods=["PUT"]),
    Route("/v1/rehearsal", get_rehearsal, methods=["GET"]),
]


async def _asynchronous(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def content(size: int) -> Iterator[bytes]:
    """Yield so many bytes in pieces, which no proxy can compress."""
    piece = _piece()
    for begin in range(0, size, PIECE_BYTES):
        yield piece[: min(PIECE_BYTES, size - begin)]


@lru_cache(maxsize=16)
def digest_of_content(size: int) -> str:
    """Return the SHA-256 of so many bytes of content."""
    digest = hashlib.sha256()
    for piece in content(size):
        digest.update(piece)
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _piece() -> bytes:
    return random.Random(0).randbytes(PIECE_BYTES)
