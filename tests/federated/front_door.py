"""Stand before a coordinator as a proxy, and answer with pages of one's own when told to."""

from __future__ import annotations

import http.client
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

HOP_BY_HOP = ("connection", "transfer-encoding", "content-length", "expect", "host")


@dataclass(frozen=True)
class Page:
    """What the proxy answers itself."""

    status: int
    content: bytes = b"<html>maintenance</html>"
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "text/html"})
    missing: int = 0
    """Bytes that are announced and never come."""


class FrontDoor:
    """A proxy whose first answers to every kind of request are pages of its own.

    Args:
        url: The coordinator's.
        page: What it answers; None: everything is passed on.
        times: How often, per method and path.
    """

    def __init__(self, url: str, page: Page | None, *, times: int = 2) -> None:
        self.page, self.times = page, times
        self.asked: Counter[tuple[str, str]] = Counter()
        upstream, door, lock = urlsplit(url), self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def go(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or None
                with lock:
                    door.asked[self.command, urlsplit(self.path).path] += 1
                    count = door.asked[self.command, urlsplit(self.path).path]
                if door.page is not None and count <= door.times:
                    self.answer(door.page.status, door.page.headers, door.page.content, door.page.missing)
                    return
                connection = http.client.HTTPConnection(upstream.hostname, upstream.port, timeout=60)
                connection.request(
                    self.command,
                    self.path,
                    body,
                    {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP},
                )
                answer = connection.getresponse()
                self.answer(
                    answer.status,
                    {name: value for name, value in answer.getheaders() if name.lower() not in HOP_BY_HOP},
                    answer.read(),
                )
                connection.close()

            def answer(self, status: int, headers: Mapping[str, str], content: bytes, missing: int = 0) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if status != 204:
                    self.send_header("Content-Length", str(len(content) + missing))
                self.end_headers()
                if status != 204:
                    self.wfile.write(content)
                self.close_connection = bool(missing)

            do_GET = do_PUT = do_POST = do_DELETE = do_PATCH = go  # noqa: N815 - what the library calls

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> FrontDoor:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
