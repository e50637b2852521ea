"""Stand before a coordinator as the proxies, filters and wrong servers that a hospital's first day may meet."""

from __future__ import annotations

import asyncio
import http.client
import json
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.utils import formatdate, parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from patience import PATIENCE_S

HOP_BY_HOP = ("connection", "transfer-encoding", "content-length", "host")
Answer = tuple[int, Mapping[str, str], bytes]


@contextmanager
def server(
    answer: Callable[[BaseHTTPRequestHandler], Answer], certificate: tuple[Path, Path] | None = None
) -> Iterator[str]:
    """Serve every request with what a function returns, over TLS if there is a certificate (with its key)."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def go(self) -> None:
            status, headers, content = answer(self)
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

        do_GET = do_PUT = do_POST = do_CONNECT = go  # noqa: N815 - what the library calls

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    listening.handle_error = lambda *_: None  # clients that do not trust it
    scheme = "http"
    if certificate is not None:
        scheme, context = "https", ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        listening.socket = context.wrap_socket(listening.socket, server_side=True)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    try:
        yield f"{scheme}://127.0.0.1:{listening.server_port}"
    finally:
        listening.shutdown()
        listening.server_close()


def forward(url: str, request: BaseHTTPRequestHandler) -> Answer:
    """Ask the coordinator in the name of a client."""
    upstream = urlsplit(url)
    body = request.rfile.read(int(request.headers.get("Content-Length") or 0)) or None
    connection = http.client.HTTPConnection(upstream.hostname, upstream.port, timeout=PATIENCE_S)
    headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP}
    connection.request(request.command, request.path, body, headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, {n: v for n, v in answer.getheaders() if n.lower() not in HOP_BY_HOP}, content


def bounding(url: str, most_bytes: int) -> Callable[[BaseHTTPRequestHandler], Answer]:
    """Let no body through that is larger, as nginx does with client_max_body_size."""

    def answer(request: BaseHTTPRequestHandler) -> Answer:
        if int(request.headers.get("Content-Length") or 0) > most_bytes:
            request.close_connection = True
            return 413, {"Content-Type": "text/html", "Connection": "close"}, b"<html>413</html>"
        return forward(url, request)

    return answer


def with_clock(url: str, *, off_s: float) -> Callable[[BaseHTTPRequestHandler], Answer]:
    """Let the coordinator's clock be off."""

    def answer(request: BaseHTTPRequestHandler) -> Answer:
        status, headers, content = forward(url, request)
        (date,) = (name for name in headers if name.lower() == "date")
        moment = parsedate_to_datetime(headers[date]).timestamp() + off_s
        return status, {**headers, date: formatdate(moment, usegmt=True)}, content

    return answer


def of_another_version(url: str) -> Callable[[BaseHTTPRequestHandler], Answer]:
    """Let the settings have a field that this version does not know."""

    def answer(request: BaseHTTPRequestHandler) -> Answer:
        status, headers, content = forward(url, request)
        if request.path == "/v1/settings":
            content = json.dumps({**json.loads(content), "invented_later": 1}).encode()
        return status, headers, content

    return answer


def of_an_older_version(url: str) -> Callable[[BaseHTTPRequestHandler], Answer]:
    """Let there be no rehearsals."""

    def answer(request: BaseHTTPRequestHandler) -> Answer:
        if request.path.startswith("/v1/rehearsal"):
            request.path = "/v1/nothing"
        return forward(url, request)

    return answer


class SlowLine:
    """A relay that lets only so many bytes through in a second, each way."""

    def __init__(self, url: str, bytes_per_s: int) -> None:
        self._upstream = urlsplit(url)
        self._bytes_per_s = bytes_per_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        started = asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 14)
        self._server = asyncio.run_coroutine_threadsafe(started, self._loop).result(PATIENCE_S)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def __enter__(self) -> SlowLine:
        return self

    def __exit__(self, *_: object) -> None:
        async def end() -> None:
            self._server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(PATIENCE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self._upstream.hostname, self._upstream.port)
        await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer), return_exceptions=True)
        writer.close()
        far_writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(1 << 14):
            await asyncio.sleep(len(piece) / self._bytes_per_s)
            writer.write(piece)
            await writer.drain()
        writer.write_eof()
