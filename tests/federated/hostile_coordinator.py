"""A coordinator that answers as it likes: text that commands terminals, bodies without end, files that are none."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from nnunetv2.federated.site.credential import SiteCredential

ESCAPES = "\x1b]0;owned\x07\x1b[2K\rrun x: complete\x9b8m\u202eenif lla\u2028forged line\nforged too\u200b\x7f"
"""Sets a terminal's title, rings, deletes a line, hides and turns what follows."""
Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def hostile(answer: Answer) -> Iterator[SiteCredential]:
    """Answer every request with a function, and yield a credential for it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def handle_any(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            try:
                answer(self)
            except OSError:  # the client has heard enough
                self.close_connection = True

    for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
        setattr(Handler, f"do_{method}", Handler.handle_any)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield SiteCredential(
            f"http://127.0.0.1:{server.server_address[1]}", f"federation{ESCAPES}", "A", "A." + "x" * 43
        )
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def send(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200) -> None:
    """Send a whole body."""
    handler.send_response(status)
    handler.send_header("X-Content-SHA256", hashlib.sha256(body).hexdigest())
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


class Endless:
    """Send a body that ends after `most` bytes only, and count what was sent.

    Args:
        announced: Its size by Content-Length; None: in chunks, of which nobody knows how many follow.
    """

    def __init__(self, announced: int | None, most: int = 64 << 20) -> None:
        self.announced, self.most, self.sent = announced, most, 0

    def __call__(self, handler: BaseHTTPRequestHandler) -> None:
        piece = bytes(256 << 10)
        handler.send_response(200)
        handler.send_header("X-Content-SHA256", "0" * 64)
        if self.announced is None:
            handler.send_header("Transfer-Encoding", "chunked")
            piece = f"{len(piece):x}\r\n".encode() + piece + b"\r\n"
        else:
            handler.send_header("Content-Length", str(self.announced))
        handler.end_headers()
        while self.sent < self.most:
            handler.wfile.write(piece)
            self.sent += len(piece)
        handler.close_connection = True
