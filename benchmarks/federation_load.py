"""Play many sites of a federation in one process: the load of the coordinator's benchmark.

A site here costs next to nothing, so that the machine's cores are the coordinator's: documents are made beforehand, go
out by sendfile, and the answers are counted and thrown away.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

RECEIVE_BYTES = 1 << 20


@dataclass(frozen=True)
class PlayedSite:
    """A site, and its documents."""

    token: str
    document: Path
    digest: str


@dataclass(frozen=True)
class Seconds:
    """When the sites of a process were done, on the clock `time.monotonic` of this machine."""

    begin: float
    last_receipt: float
    last_result: float


def play_round(url: str, key: str, sites: Sequence[PlayedSite], begin: float) -> Seconds:
    """Let all sites contribute at the same time, beginning at `begin`, wait for the result and download it."""
    receipts, results = [0.0] * len(sites), [0.0] * len(sites)
    errors: list[Exception] = []

    def play(index: int, site: PlayedSite) -> None:
        try:
            time.sleep(max(0.0, begin - time.monotonic()))
            contribute(url, key, site)
            receipts[index] = time.monotonic()
            download(url, key, site.token)
            results[index] = time.monotonic()
        except Exception as error:  # noqa: BLE001  shown by the main thread
            errors.append(error)

    threads = [threading.Thread(target=play, args=entry, daemon=True) for entry in enumerate(sites)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return Seconds(begin, max(receipts), max(results))


def contribute(url: str, key: str, site: PlayedSite) -> None:
    """Send a site's document as `HttpTransport` does: an offer, then the bytes."""
    size = site.document.stat().st_size
    connection = _connect(url)
    headers = {"Authorization": f"Bearer {site.token}"}
    connection.request("POST", f"/v1/offers/{key}", json.dumps({"digest": site.digest, "size": size}), headers)
    _expect(connection, 202)
    connection.putrequest("PUT", f"/v1/gatherings/{key}")
    for name, value in {**headers, "Content-Length": str(size), "X-Content-SHA256": site.digest}.items():
        connection.putheader(name, value)
    connection.endheaders()
    with site.document.open("rb") as file:
        connection.sock.sendfile(file)
    _expect(connection, 200)
    connection.close()


def download(url: str, key: str, token: str) -> int:
    """Wait for a result, download it, and return its bytes."""
    connection = _connect(url)
    buffer = bytearray(RECEIVE_BYTES)
    while True:
        connection.request("GET", f"/v1/gatherings/{key}?wait=25", headers={"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        count = 0
        while piece := answer.readinto(buffer):
            count += piece
        if answer.status == 200:
            connection.close()
            return count
        if answer.status != 202:
            raise RuntimeError(f"the coordinator answers {answer.status} {bytes(buffer[:500])!r}")


def _connect(url: str) -> http.client.HTTPConnection:
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=300)
    connection.connect()
    return connection


def _expect(connection: http.client.HTTPConnection, status: int) -> None:
    answer = connection.getresponse()
    content = answer.read()
    if answer.status != status:
        raise RuntimeError(f"the coordinator answers {answer.status} {content[:500]!r}, not {status}")


# ------------------------------------------------------------------------------------------------------- idle sites
def poll_for(url: str, key: str, tokens: Sequence[str], seconds: float, wait_s: float = 25.0) -> int:
    """Let sites wait for an exchange, each on its own connection, and ask again when told to; count the answers."""
    return asyncio.run(_poll_all(url, key, tokens, seconds, wait_s))


async def _poll_all(url: str, key: str, tokens: Sequence[str], seconds: float, wait_s: float) -> int:
    address = urlsplit(url)
    answers = 0

    async def poll(index: int, token: str) -> None:
        nonlocal answers
        await asyncio.sleep(wait_s * index / len(tokens))  # sites do not ask all at once
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        request = (
            f"GET /v1/gatherings/{key}?wait={wait_s:g} HTTP/1.1\r\nHost: {address.netloc}\r\n"
            f"Authorization: Bearer {token}\r\n\r\n"
        ).encode()
        try:
            while True:
                writer.write(request)
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                if " 202 " not in head.splitlines()[0]:
                    raise RuntimeError(head)
                await reader.readexactly(int(head.split("content-length:")[1].split()[0]))
                answers += 1
        finally:
            writer.close()

    polls = [asyncio.create_task(poll(index, token)) for index, token in enumerate(tokens)]
    done, pending = await asyncio.wait(polls, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    for task in done:
        task.result()
    return answers


# ---------------------------------------------------------------------------------------------------------- shaping
class SlowLine:
    """A relay on the loopback interface that passes on at most so many bytes per second in each direction.

    Use as a context manager; `port` is where the site has to connect.
    """

    def __init__(self, target: tuple[str, int], bytes_per_s: float) -> None:
        self._target = target
        self._rate = bytes_per_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]

    def __enter__(self) -> SlowLine:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        up, down = _Budget(self._rate), _Budget(self._rate)
        while True:
            try:
                site, _ = self._listener.accept()
                coordinator = socket.create_connection(self._target)
            except OSError:  # closed
                return
            for end in (site, coordinator):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else small answers wait for 40 ms
            for source, sink, budget in ((site, coordinator, up), (coordinator, site, down)):
                threading.Thread(target=_relay, args=(source, sink, budget.spend), daemon=True).start()


class _Budget:
    """Bytes that a direction of a line may carry by now."""

    def __init__(self, bytes_per_s: float) -> None:
        self._rate = bytes_per_s
        self._free_at = 0.0
        self._lock = threading.Lock()

    def spend(self, count: int) -> None:
        """Wait until the line has carried so many bytes more."""
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + count / self._rate
            pause = self._free_at - time.monotonic()
        if pause > 0.002:
            time.sleep(pause)


def _relay(source: socket.socket, sink: socket.socket, spend: Callable[[int], None]) -> None:
    buffer = memoryview(bytearray(1 << 18))
    with suppress(OSError):
        while count := source.recv_into(buffer):
            spend(count)
            sink.sendall(buffer[:count])
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()
