"""Read the bodies of requests: small ones into messages, large ones into files, none beyond its limit."""
from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.strict_json import decode_json

Model = TypeVar("Model", bound=BaseModel)

SMALL_BODY = 64 << 10
"""Bytes that a plain JSON body may have."""
DRAINED_BYTES = 4 << 20
"""A body up to this size is read to its end before it is refused, so that the refusal can be read."""
PIECE_BYTES = 2 << 20


async def read_json(request: Request, model: type[Model]) -> Model:
    """Read a small JSON body."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > SMALL_BODY:
            raise RefusedError(f"the body has more than {SMALL_BODY} bytes", code="too_large")
    return decode_json(model, bytes(body))


def announced_size(request: Request) -> int:
    """Return the Content-Length of a request."""
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


async def receive_file(request: Request, path: Path, *, size: int) -> str:
    """Stream a body into a file without ever holding much of it, and return its SHA-256."""
    digest = hashlib.sha256()
    received = 0
    pending = bytearray()
    with path.open("wb", buffering=0) as file:
        def keep(piece: bytearray) -> None:
            digest.update(piece)
            file.write(piece)

        async for chunk in request.stream():
            received += len(chunk)
            if received > size:
                raise RefusedError(f"the body is longer than the {size} bytes announced", code="too_large")
            pending += chunk
            if len(pending) >= PIECE_BYTES:
                await run_in_threadpool(keep, pending)
                pending = bytearray()
        await run_in_threadpool(keep, pending)
    if received != size:
        raise RefusedError(f"the body has {received} bytes, {size} were announced", code="damaged_in_transit")
    return digest.hexdigest()


async def drain(request: Request) -> None:
    """Read a small body that nobody wants: a client that is still sending would miss the answer."""
    if int(request.headers.get("content-length") or 0) <= DRAINED_BYTES:
        async for _ in request.stream():
            pass
