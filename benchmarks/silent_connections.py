"""Measure the costs of a stranger's silent connections to the members of a federation.

    python -m benchmarks.silent_connections [--files 1024] [--held 10000] [--burst 15000] [--seconds 20]

    held    a stranger keeps so many connections open that say nothing, and opens each again that is closed
    burst   it opens so many at the same time, and waits

Both with plain HTTP and with TLS, all from one address of the loopback interface (127.0.0.9), against a coordinator
that may open `--files` files. Meanwhile two members ask for the settings on new connections, one of them from the
stranger's own address, whose older connection is to last. Wanted: answers within a second at the median, at most 64 MiB
of memory over idle. Linux; this side needs some more open files than connections (ulimit -Hn).
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import resource
import select
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

STRANGER, OTHER_MEMBER = "127.0.0.9", "127.0.0.1"
WANTED_SECONDS, WANTED_MIB = 1.0, 64.0
REOPENED_EVERY_S = 0.3
TIMEOUT_S = 10.0


# -------------------------------------------------------------------------------------------------------- the stranger
class Stranger:
    """Many silent connections from one address, held by a process of their own.

    Args:
        number: How many.
        seconds: After which the process ends by itself.
        reopens: Whether a connection that is closed is opened again.
    """

    def __init__(self, address: tuple[str, int], number: int, *, seconds: float, reopens: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._begun, self._over = context.Event(), context.Event()
        self._opened = context.Value("q", 0)
        self._process = context.Process(
            target=_stay_silent,
            daemon=True,
            args=(address, number, seconds, reopens, self._begun, self._over, self._opened),
        )

    def __enter__(self) -> Stranger:
        self._process.start()
        if not self._begun.wait(60):
            raise TimeoutError("no connection was opened within a minute")
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._process.join()

    @property
    def opened(self) -> int:
        """Connections that were opened so far."""
        return self._opened.value


def _stay_silent(address, number, seconds, reopens, begun, over, opened) -> None:
    hard = allow_files(number + 100)
    assert hard >= number + 100, f"{number} connections need more open files than the {hard} allowed (ulimit -Hn)"
    held: dict[int, socket.socket] = {}
    watch, deadline = select.epoll(), time.monotonic() + seconds
    missing = number
    while time.monotonic() < deadline and not over.is_set():
        for _ in range(missing):
            with suppress(BlockingIOError):
                connection = socket.socket()
                connection.setblocking(False)
                connection.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
                connection.bind((STRANGER, 0))
                held[connection.fileno()] = connection
                watch.register(connection, select.EPOLLIN | select.EPOLLRDHUP)
                connection.connect(address)
        opened.value += missing
        begun.set()
        time.sleep(REOPENED_EVERY_S)
        closed = watch.poll(0, number + 1)
        for descriptor, _ in closed:
            held.pop(descriptor).close()
        missing = len(closed) if reopens else 0
    for connection in held.values():
        connection.close()


IP_BIND_ADDRESS_NO_PORT = 24
"""Linux: choose the port when the connection is made; a number that `socket` knows from Python 3.12 on."""


def allow_files(number: int) -> int:
    """Let this process open so many files if the system grants it; return how many it may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    granted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (granted, hard))
    return granted


# ----------------------------------------------------------------------------------------------------- the coordinator
@dataclass
class Coordinator:
    """A coordinator in a process of its own, and the operator's credential."""

    process: subprocess.Popen
    url: str
    token: str
    authority: str | None
    log: Path

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        parts = urlsplit(self.url)
        return parts.hostname, parts.port

    def memory_mib(self, peak: bool = False) -> float:
        """Return the memory that it holds, or has held at most."""
        name = "VmHWM" if peak else "VmRSS"
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024

    def open_files(self) -> int:
        """Return how many files and sockets it has open."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


@contextmanager
def coordinator(folder: Path, *options: str, files: int) -> Iterator[Coordinator]:
    """Run a coordinator that may open so many files."""
    log = folder.with_suffix(".log")
    code = "import sys; from nnunetv2.federated.commands.coordinator import main; sys.exit(main(sys.argv[1:]))"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "--folder", str(folder), "--port", "0", "--sites", "A", "B", *options],
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)),
        )
    try:
        deadline = time.monotonic() + 60
        while not (folder / "operator.json").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the coordinator does not start: {log.read_text()}")
            time.sleep(0.05)
        credential = json.loads((folder / "operator.json").read_text())
        yield Coordinator(process, credential["url"], credential["token"], credential.get("authority"), log)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


# --------------------------------------------------------------------------------------------------------- the members
class Member:
    """Somebody with a credential who asks for the settings, from a given address."""

    def __init__(self, server: Coordinator, host: str, timeout_s: float = TIMEOUT_S) -> None:
        self._server = server
        self._host = host
        self._timeout_s = timeout_s
        self._context = ssl.create_default_context(cafile=server.authority) if server.authority else None

    def connect(self) -> http.client.HTTPConnection:
        """Return a connection that is opened with the first request."""
        options = {"timeout": self._timeout_s, "source_address": (self._host, 0)}
        if self._context is None:
            return http.client.HTTPConnection(*self._server.address, **options)
        return http.client.HTTPSConnection(*self._server.address, context=self._context, **options)

    def ask(self, connection: http.client.HTTPConnection) -> float | None:
        """Return the seconds that an answer takes, or None if none comes."""
        begin = time.monotonic()
        try:
            connection.request("GET", "/v1/settings", headers={"Authorization": f"Bearer {self._server.token}"})
            answer = connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException):
            return None
        return time.monotonic() - begin if answer.status == 200 else None

    def ask_anew(self) -> float | None:
        """Ask on a connection of its own."""
        with closing(self.connect()) as connection:
            return self.ask(connection)


@dataclass
class Figures:
    """The figures while the stranger was there."""

    seconds: list[float] = field(default_factory=list)
    failures: int = 0
    most_files: int = 0

    def add(self, seconds: float | None) -> None:
        """Take note of one request."""
        self.failures += seconds is None
        if seconds is not None:
            self.seconds.append(seconds)


def watch(server: Coordinator, seconds: float) -> Figures:
    """Let members ask for a while: on new connections, and on one that was there before and is kept."""
    figures, deadline = Figures(), time.monotonic() + seconds
    members = [Member(server, STRANGER), Member(server, OTHER_MEMBER)]
    while time.monotonic() < deadline:
        for member in members:
            figures.add(member.ask_anew())
        figures.most_files = max(figures.most_files, server.open_files())
        time.sleep(0.1)
    return figures


def measure(folder: Path, *, is_encrypted: bool, reopens: bool, number: int, files: int, seconds: float) -> bool:
    """Measure one way of being silent, print the figures, and tell whether they are good."""
    with coordinator(folder, *(["--tls"] if is_encrypted else []), files=files) as server:
        kept_by = Member(server, STRANGER)
        with closing(kept_by.connect()) as kept:
            for _ in range(20):
                kept_by.ask(kept)
            idle = server.memory_mib()
            with Stranger(server.address, number, seconds=seconds + 60, reopens=reopens) as stranger:
                figures = watch(server, seconds)
                opened = stranger.opened
            is_kept = kept_by.ask(kept) is not None
        over_idle = server.memory_mib(peak=True) - idle
    median = statistics.median(figures.seconds) if figures.seconds else float("inf")
    worst = max(figures.seconds, default=float("inf"))
    print(
        f"{'TLS' if is_encrypted else 'plain'}, {number} {'held' if reopens else 'in a burst'}, {opened} opened: "
        f"{len(figures.seconds)} answers, median {median * 1000:.0f} ms, longest {worst * 1000:.0f} ms, none "
        f"{figures.failures} times; a member's kept connection {'lasts' if is_kept else 'IS LOST'}; at most "
        f"{figures.most_files} of {files} files; memory {idle:.0f} MiB and {over_idle:.0f} more",
        flush=True,
    )
    return median <= WANTED_SECONDS and over_idle <= WANTED_MIB


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all, and return 1 if something is not as wanted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=1024)
    parser.add_argument("--held", type=int, default=10_000)
    parser.add_argument("--burst", type=int, default=15_000)
    parser.add_argument("--seconds", type=float, default=20.0)
    arguments = parser.parse_args(argv)
    is_well = True
    with tempfile.TemporaryDirectory() as folder:
        for is_encrypted in (False, True):
            for reopens in (True, False):
                is_well &= measure(
                    Path(folder, f"{is_encrypted}{reopens}"),
                    is_encrypted=is_encrypted,
                    reopens=reopens,
                    number=arguments.held if reopens else arguments.burst,
                    files=arguments.files,
                    seconds=arguments.seconds,
                )
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
