"""Call the coordinator's application without a socket: thousands of requests a second."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import unquote

from starlette.types import ASGIApp


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


@asynccontextmanager
async def running(app: ASGIApp) -> AsyncIterator[None]:
    """Start an application, and stop it."""
    to_app: asyncio.Queue = asyncio.Queue()
    from_app: asyncio.Queue = asyncio.Queue()
    lifespan = asyncio.ensure_future(app({"type": "lifespan", "state": {}}, to_app.get, from_app.put))
    await to_app.put({"type": "lifespan.startup"})
    assert (await from_app.get())["type"] == "lifespan.startup.complete"
    try:
        yield
    finally:
        await to_app.put({"type": "lifespan.shutdown"})
        assert (await from_app.get())["type"] == "lifespan.shutdown.complete"
        await lifespan


async def call(
    app: ASGIApp,
    method: str,
    path: str,
    *,
    token: str = "",
    body: bytes = b"",
    query: bytes = b"",
    headers: Mapping[bytes, bytes] | None = None,
    client: str = "192.0.2.1",
    pieces: int = 1,
    breaks_off: bool = False,
) -> Answer:
    """Send one request and return the answer.

    Args:
        path: As it stands in the request line, quoted.
        headers: Replace those that go with the body; one with the value b"" is left out.
        pieces: In how many pieces the body comes.
        breaks_off: Whether the connection ends before the last of them.
    """
    wanted = {
        b"host": b"coordinator",
        b"content-length": str(len(body)).encode(),
        b"x-content-sha256": hashlib.sha256(body).hexdigest().encode(),
    }
    if token:
        wanted[b"authorization"] = b"Bearer " + token.encode("latin-1", "replace")
    wanted.update(headers or {})
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode("latin-1", "replace"),
        "query_string": query,
        "root_path": "",
        "headers": [(name.lower(), value) for name, value in wanted.items() if value],
        "client": (client, 1),
        "server": ("coordinator", 80),
        "state": {},
    }
    step = max(1, -(-len(body) // pieces))
    chunks = [body[begin : begin + step] for begin in range(0, len(body), step)] or [b""]
    incoming = [
        {"type": "http.request", "body": chunk, "more_body": number + 1 < len(chunks)}
        for number, chunk in enumerate(chunks)
    ]
    if breaks_off:
        incoming[-1] = {"type": "http.disconnect"}
    sent: list[dict] = []
    gone = asyncio.Event()

    async def receive() -> dict:
        if incoming:
            return incoming.pop(0)
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)

    await app(scope, receive, send)
    answer = b"".join(message.get("body", b"") for message in sent[1:])
    names = {name.decode("latin-1"): value.decode("latin-1") for name, value in sent[0]["headers"]}
    return Answer(sent[0]["status"], names, answer)
