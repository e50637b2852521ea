"""Measure a federation on a network of NVIDIA FLARE beside the same one over HTTP: bytes, processor time, memory.

    python -m benchmarks.engine [--sites 3] [--rounds 4] [--stages 6] [--relay | --slow-mbit 1] [--only http engine]

Sites are played: the real transport of a site sends random weights, and nobody trains. All processes are real ones on
the loopback interface, both servers speak TLS, and every byte on the server's port is counted. Needs `make nvflare`.
Every site of the engine is two processes of about 100 MiB each. Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.byte_counter import ByteCounter
from benchmarks.federation import MIB, RUN, network_specs, registration_of
from benchmarks.federation_coordinator import Memory, address, make_federation, running
from benchmarks.federation_load import SlowLine
from benchmarks.nvflare_network import Network, hide_torch, processes_below, running_network
from nnunetv2.federated.commands.engine import main as engine_command
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.document import TensorSpec, file_digest
from nnunetv2.federated.protocol.keys import InitialKey, RegistrationKey, RoundKey
from nnunetv2.federated.site.credential import SiteCredential, load_credential
from nnunetv2.federated.site.transports.http import HttpTransport

PATIENCE_S = 1800.0
FEDERATION = "benchmark"


@dataclass
class Figures:
    """The measurements of one of the two ways."""

    cpu_before: float = 0.0
    cpu_after: float = 0.0
    """Of the server, all its processes, from before the first round to after the last."""
    sent: int = 0
    received: int = 0
    """Bytes on the server's port, as the sites see them."""
    digests: list[str] = field(default_factory=list)
    """Of each round's aggregate."""
    closed_at: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    """Resident memory of the process of the coordinator after each round, in MiB."""
    peak: float = 0.0

    def cpu_per_round(self) -> float:
        """Return seconds of processor time."""
        return (self.cpu_after - self.cpu_before) / len(self.digests)


# ------------------------------------------------------------------------------------------------------------- sites
class PlayedSite:
    """A site that takes part with the transport of a real one, and sends random weights."""

    def __init__(self, credential: SiteCredential, specs: dict[str, TensorSpec], seed: int) -> None:
        self.transport = HttpTransport(credential, report=lambda line: None, give_up_after_s=PATIENCE_S)
        self.site = credential.site
        self.specs = specs
        rng = np.random.default_rng(seed)
        self.weights = {name: rng.standard_normal(spec.shape, np.float32) for name, spec in specs.items()}

    def register(self) -> None:
        """Register, and agree on the initial weights."""
        match = self.transport.exchange(RegistrationKey(RUN), registration_of(self.specs)).message
        own = {name: self.weights[name] for name, owner in match.initial_owner.items() if owner == self.site}
        self.transport.exchange(InitialKey(RUN), messages.Update(), own)

    def round(self, number: int) -> str:
        """Take part in a round, and return the digest of its aggregate."""
        first = next(iter(self.weights.values()))
        first.flat[0] = number
        update = messages.Update(metrics={"train_losses": 0.5})
        return file_digest(self.transport.exchange(RoundKey(RUN, number), update, self.weights).path)


def play(credentials: Sequence[SiteCredential], specs: dict[str, TensorSpec], rounds: int, server: Server) -> Figures:
    """Let all sites take part in all rounds."""
    sites = [PlayedSite(credential, specs, seed) for seed, credential in enumerate(credentials)]
    figures = Figures()
    with ThreadPoolExecutor(len(sites)) as pool:
        list(pool.map(PlayedSite.register, sites))
        figures.cpu_before = server.cpu_seconds()
        before = server.counted()
        for number in range(rounds):
            digests = set(pool.map(lambda site, number=number: site.round(number), sites))
            assert len(digests) == 1, digests
            figures.digests.extend(digests)
            figures.closed_at.append(time.monotonic())
            figures.memory.append(Memory.of(server.coordinator_pid()).rss)
            print(f"  round {number}: {figures.memory[-1]:.0f} MiB", flush=True)
        figures.cpu_after = server.cpu_seconds()
    figures.sent, figures.received = (after - earlier for after, earlier in zip(server.counted(), before))
    status = Path(f"/proc/{server.coordinator_pid()}/status").read_text()
    figures.peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    for site in sites:
        site.transport.close()
    return figures


@dataclass(frozen=True)
class Server:
    """The server of one of the two ways."""

    pid: int
    coordinator_pid: Callable[[], int]
    counted: Callable[[], tuple[int, int]]

    def cpu_seconds(self) -> float:
        """Return the processor time of all its processes."""
        total = 0.0
        for pid in processes_below(self.pid):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return total


# --------------------------------------------------------------------------------------------------------- both ways
def measure_http(folder: Path, num_sites: int, rounds: int, specs: dict[str, TensorSpec]) -> Figures:
    """Play a federation over HTTP with TLS."""
    tokens = make_federation(folder / "federation", num_sites, num_epochs=rounds + 1)
    with ExitStack() as stack:
        coordinator = stack.enter_context(running(folder / "federation", "--tls"))
        operator = json.loads((folder / "federation" / "operator.json").read_text())
        counter = stack.enter_context(ByteCounter(address(operator["url"])))
        credentials = [
            SiteCredential(
                f"https://127.0.0.1:{counter.port}", FEDERATION, site, token, authority=operator["authority"]
            )
            for site, token in tokens.items()
        ]
        server = Server(coordinator.process.pid, lambda: coordinator.process.pid, counter.traffic.snapshot)
        return play(credentials, specs, rounds, server)


def measure_engine(
    folder: Path,
    num_sites: int,
    rounds: int,
    specs: dict[str, TensorSpec],
    *,
    relay: bool,
    without_torch: bool,
    slow_mbit: float | None,
) -> Figures:
    """Play a federation on a network of NVFlare.

    Args:
        slow_mbit: Mbit/s of the line of the first site, each way. None: it is as fast as the others'.
    """
    names = [f"site{index:03d}" for index in range(num_sites)]
    with ExitStack() as stack:
        network = stack.enter_context(running_network(folder / "network", names, relay=relay))
        counter = stack.enter_context(ByteCounter(("127.0.0.1", network.port)))
        for name in ["relay"] if relay else names:
            path = network.kit(name) / "startup" / f"fed_{'relay' if relay else 'client'}.json"
            _redirect(network, path, counter.port)
        if slow_mbit is not None:
            line = stack.enter_context(SlowLine(("127.0.0.1", counter.port), slow_mbit * 1e6 / 8))
            path = network.kit(names[0]) / "startup" / "fed_client.json"
            path.write_text(path.read_text().replace(f"localhost:{counter.port}", f"localhost:{line.port}"))
        _prepare(network, folder, names)
        hidden = {"PYTHONPATH": str(hide_torch(folder))} if without_torch else {}
        network.start("server", **hidden)
        for name in [*(["relay"] if relay else []), *names]:
            network.start(name)
        begin = time.monotonic()
        network.wait_for_sites(PATIENCE_S)
        print(f"  {num_sites} sites are connected after {time.monotonic() - begin:.0f} s", flush=True)
        job = folder / "job"
        engine_command(
            [
                *("job", str(job), "--federation", FEDERATION, "--steps", "train", "--epochs", str(rounds + 1)),
                *("--validate-every", "0", "--sites", *names, "-tr", "nnUNetTrainerFedAvg"),
            ]
        )
        number = network.submit(job)
        files = [folder / "sites" / name / FEDERATION / "federated_site.json" for name in names]
        deadline = time.monotonic() + PATIENCE_S
        while not all(file.exists() for file in files):
            if time.monotonic() > deadline:
                raise TimeoutError(f"gateways do not open: {network.status(number)}, {network.log('server')[-3000:]}")
            time.sleep(1)
        print(f"  all gateways are open after {time.monotonic() - begin:.0f} s", flush=True)
        pid = network.processes["server"].pid
        server = Server(pid, lambda: _job_pid(pid), counter.traffic.snapshot)
        figures = play([load_credential(file) for file in files], specs, rounds, server)
        network.ask("abort_job", number)
        network.wait_for_job(number, PATIENCE_S)
        return figures


def _redirect(network: Network, path: Path, port: int) -> None:
    """Let a participant reach the server by way of the counter."""
    text = path.read_text()
    assert f"localhost:{network.port}" in text, text
    path.write_text(text.replace(f"localhost:{network.port}", f"localhost:{port}"))


def _prepare(network: Network, folder: Path, names: Sequence[str]) -> None:
    """Have the server and all sites allow our jobs."""
    from nnunetv2.federated.engine.nvflare.job import describe_allowing

    network.allow("server", describe_allowing("server"))
    engine_command(["server", "--kit", str(network.kit("server")), "--folder", str(folder / "federations")])
    (folder / "raw" / "Dataset001_Played").mkdir(parents=True)
    for name in names:
        network.allow(name, describe_allowing("site"))
        engine_command(
            [
                *("site", "--kit", str(network.kit(name)), "--dataset", "1", "--folder", str(folder / "sites" / name)),
                *("--attach", "--trainers", "nnUNetTrainerFedAvg", "--env", f"nnUNet_raw={folder / 'raw'}"),
            ]
        )


def _job_pid(server: int) -> int:
    """Return the process of the server's job."""
    for pid in processes_below(server) - {server}:
        if "runner_process" in Path(f"/proc/{pid}/cmdline").read_text():
            return pid
    raise RuntimeError("the server's job has gone away")


def report(found: dict[str, Figures], size: float, num_sites: int) -> None:
    """Print the measurements, side by side."""
    print(f"\n{num_sites} sites, {size:.1f} MiB; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for way, figures in found.items():
        seconds = np.diff(figures.closed_at)
        print(
            f"  {way}: server {figures.cpu_per_round():.2f} s of processor time per round; "
            f"{figures.received / MIB:.1f} MiB to the sites, {figures.sent / MIB:.1f} MiB from them; "
            f"peak {figures.peak:.0f} MiB; a round takes {statistics.median(seconds) if len(seconds) else 0:.1f} s"
        )
        half = len(figures.memory) // 2
        print(
            f"    memory after rounds: {', '.join(f'{one:.0f}' for one in figures.memory[:8])}"
            f"{' ...' if len(figures.memory) > 8 else ''} {figures.memory[-1]:.0f} MiB; the second half of the rounds "
            f"adds {figures.memory[-1] - figures.memory[half]:+.0f} MiB"
        )
    if len(found) == 2:
        http, engine = found["http"], found["engine"]
        print(f"  digests of all {len(http.digests)} rounds are equal: {http.digests == engine.digests}")
        volume = (engine.sent + engine.received) / (http.sent + http.received)
        print(f"  bytes: {volume:.4f} times HTTP (wanted: at most 1.01)")
        print(f"  processor time: {engine.cpu_per_round() / http.cpu_per_round():.2f} times HTTP (wanted: at most 3)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--stages", type=int, default=6, help="of the network: 6 are 119 MiB, 2 are 1 MiB")
    parser.add_argument("--relay", action="store_true", help="put a relay of NVFlare between server and sites")
    parser.add_argument("--slow-mbit", type=float, help="Mbit/s of the first site's line, each way, without --relay")
    parser.add_argument("--with-torch", action="store_true", help="let the server have torch")
    parser.add_argument("--only", nargs="+", choices=("http", "engine"), default=("http", "engine"))
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args(argv)
    threading.stack_size(1 << 20)
    specs = network_specs(arguments.stages)
    found = {}
    for way in arguments.only:
        print(f"{way}:", flush=True)
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            given = Path(name), arguments.sites, arguments.rounds, specs
            found[way] = (
                measure_http(*given)
                if way == "http"
                else measure_engine(
                    *given, relay=arguments.relay, without_torch=not arguments.with_torch, slow_mbit=arguments.slow_mbit
                )
            )
    report(found, sum(spec.nbytes for spec in specs.values()) / MIB, arguments.sites)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
