"""Run a coordinator in a process of its own, with a federation that all sites have joined."""

from __future__ import annotations

import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunetv2.federated.coordinator.members import create_federation
from nnunetv2.federated.coordinator.service import Coordinator
from nnunetv2.federated.coordinator.storage.store import Store
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.site.credential import new_token


def make_federation(
    folder: Path, num_sites: int, num_epochs: int = 3, validate_every: int = 0, **settings: Any
) -> dict[str, str]:
    """Create a federation whose sites have all joined; return site -> token."""
    sites = tuple(f"site{index:03d}" for index in range(num_sites))
    with Store(folder) as store:
        create_federation(
            store,
            FederationSettings(
                federation="benchmark", sites=sites, num_epochs=num_epochs, validate_every=validate_every, **settings
            ),
            now=time.time(),
        )
        coordinator = Coordinator(store, log=lambda line: None)
        tokens = {}
        for record in coordinator.members.open_invitations(time.time()):
            tokens[record.member] = new_token(record.member)
            coordinator.members.join(record.secret, tokens[record.member])
    return tokens


@dataclass
class Memory:
    """The memory of a process, in MiB."""

    rss: float = 0.0
    pss: float = 0.0
    anonymous: float = 0.0

    @classmethod
    def of(cls, pid: int) -> Memory:
        """Read the memory that a process holds now."""
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
        return cls(
            *(int(re.search(rf"^{name}: +([0-9]+)", text, re.M)[1]) / 1024 for name in ("Rss", "Pss", "Anonymous"))
        )

    def upper(self, other: Memory) -> Memory:
        """Return the larger of both, figure by figure."""
        return Memory(max(self.rss, other.rss), max(self.pss, other.pss), max(self.anonymous, other.anonymous))

    def __str__(self) -> str:
        return f"RSS {self.rss:.0f}, PSS {self.pss:.0f}, anonymous {self.anonymous:.0f} MiB"


@dataclass
class Running:
    """A coordinator's process."""

    folder: Path
    options: tuple[str, ...] = ()
    process: subprocess.Popen = field(init=False)
    seconds_to_start: float = field(init=False)
    cpu_to_start: float = field(init=False)
    url: str = field(init=False)

    def start(self) -> None:
        """Start it and wait until it answers a request."""
        state, operator_file = self.folder / "coordinator.json", self.folder / "operator.json"
        begin = time.monotonic()
        for file in (state, operator_file):
            file.unlink(missing_ok=True)
        code = "import sys; from nnunetv2.federated.commands.coordinator import main; sys.exit(main(sys.argv[1:]))"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, "--folder", str(self.folder), "--port", "0", *self.options],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        while not (state.exists() and operator_file.exists()):
            if self.process.poll() is not None:
                raise RuntimeError(self.log.read_text())
            time.sleep(0.01)
        self.url = json.loads(state.read_text())["url"]
        operator = json.loads(operator_file.read_text())
        request = urllib.request.Request(
            f"{self.url}/v1/settings", headers={"Authorization": f"Bearer {operator['token']}"}
        )
        trust = ssl.create_default_context(cafile=operator.get("authority"))
        with suppress_http_error(), urllib.request.urlopen(request, timeout=10, context=trust):
            pass
        self.seconds_to_start = time.monotonic() - begin
        self.cpu_to_start = self.cpu_seconds()

    def start_time(self) -> str:
        """Say how long the start took; a busy machine shows in the first figure, not in the second."""
        return f"{self.seconds_to_start:.2f} s ({self.cpu_to_start:.2f} s of processor time)"

    @property
    def log(self) -> Path:
        """The file that holds its output."""
        return self.folder.with_suffix(".log")

    def cpu_seconds(self) -> float:
        """Return the processor time that it has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self, number: int = signal.SIGTERM) -> None:
        """End it."""
        self.process.send_signal(number)
        self.process.wait(60)


@contextmanager
def suppress_http_error() -> Iterator[None]:
    """Take any answer for one."""
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()


@contextmanager
def running(folder: Path, *options: str) -> Iterator[Running]:
    """Run a coordinator for a folder."""
    coordinator = Running(folder, options)
    coordinator.start()
    try:
        yield coordinator
    finally:
        coordinator.end()


def address(url: str) -> tuple[str, int]:
    """Return host and port of an address."""
    host, port = url.rpartition("/")[2].split(":")
    return host, int(port)
