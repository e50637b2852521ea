"""Measure a coordinator under load: real processes on the loopback interface, a network of 31.2 million parameters.

    python -m benchmarks.federation [--sites 64] [--few 4] [--idle 500] [--only round idle line slow start] [--folder F]

    round   all sites upload at once, the round is closed, all download: rates, beside those of disk and loopback
            at the same time, and the coordinator's memory; with few sites and with many
    idle    sites that wait for a result: the coordinator's share of a core
    line    the delay of an epoch of 30 s in a federation, on a line of 1 Gbit/s
    slow    the delay of three epochs of 60 s on a line of 4 Mbit/s, in eight bits; not among the default
    start   from the start of the process to the first answer: new, after kill -9, and with a thousand rounds behind it

Needs about 130 MB of disk per site in --folder (default: a temporary folder), which is removed again. Linux.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import re
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.federation_coordinator import Memory, Running, make_federation, running
from benchmarks.federation_load import PlayedSite, play_round, poll_for
from nnunetv2.federated.aggregation.weighted_mean import aggregate_documents
from nnunetv2.federated.coordinator.service import Coordinator
from nnunetv2.federated.coordinator.storage.store import Store
from nnunetv2.federated.exchanges.exchange import Closed, Contribution, with_contribution
from nnunetv2.federated.exchanges.steps import fresh_exchange, parse_key
from nnunetv2.federated.protocol import keys, messages
from nnunetv2.federated.protocol.document import TensorSpec, open_document, write_document
from nnunetv2.federated.protocol.keys import CensusKey, InitialKey, RegistrationKey, RoundKey

MIB, GIB = 2**20, 2**30
RUN = keys.run_name("3d_fullres", "0", "nnUNetTrainerFedAvg")
DISTINCT_UPDATES = 4
LOAD_PROCESSES = 2
HISTORY_ROUNDS = 1000
DISK_PROBES = 64
"""Files of which the disk's rate is told."""


def network_specs(num_stages: int = 6) -> dict[str, TensorSpec]:
    """Return the distinct tensors of the network that nnU-Net plans by default for large isotropic images."""
    features = [min(320, 32 * 2**stage) for stage in range(num_stages)]
    shapes: dict[str, tuple[int, ...]] = {}

    def block(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.conv.weight"] = (outputs, inputs, 3, 3, 3)
        shapes.update({f"{name}.{one}": (outputs,) for one in ("conv.bias", "norm.weight", "norm.bias")})

    for stage, (inputs, outputs) in enumerate(zip([1, *features], features)):
        block(f"encoder.stages.{stage}.0", inputs, outputs)
        block(f"encoder.stages.{stage}.1", outputs, outputs)
    for stage, (below, here) in enumerate(zip(features[:0:-1], features[-2::-1])):
        shapes[f"decoder.transpconvs.{stage}.weight"] = (below, here, 2, 2, 2)
        shapes[f"decoder.transpconvs.{stage}.bias"] = (here,)
        block(f"decoder.stages.{stage}.0", 2 * here, here)
        block(f"decoder.stages.{stage}.1", here, here)
        shapes[f"decoder.seg_layers.{stage}.weight"] = (3, here, 1, 1, 1)
        shapes[f"decoder.seg_layers.{stage}.bias"] = (3,)
    return {name: TensorSpec("F32", shape) for name, shape in shapes.items()}


# --------------------------------------------------------------------------------------------------- the coordinator
@contextmanager
def sampled_memory(pid: int) -> Iterator[list[Memory]]:
    """Sample a process's memory while the block lasts; the last entry of the list is the largest so far."""
    samples, over = [Memory.of(pid)], threading.Event()

    def sample() -> None:
        while not over.wait(0.05):
            samples.append(samples[-1].upper(Memory.of(pid)))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


# ------------------------------------------------------------------------------------------------------ preparations
def registration_of(specs: dict[str, TensorSpec]) -> messages.Registration:
    """Return the registration of a site whose network has these tensors."""
    entries = tuple(messages.TensorEntry(name=name, dtype=spec.dtype, shape=spec.shape) for name, spec in specs.items())
    data = messages.TrainingData(
        channel_names={"0": "CT"}, labels={"background": 0, "a": 1, "b": 2}, file_ending=".nii.gz"
    )
    return messages.Registration(
        configuration="3d_fullres",
        fold="0",
        trainer="nnUNetTrainerFedAvg",
        num_training_cases=10,
        aliases={},
        plans={"plans_name": "nnUNetPlans"},
        dataset_json=data,
        requires_equal_plans=False,
        tensors=entries,
    )


def begin_run(folder: Path, specs: dict[str, TensorSpec]) -> None:
    """Let all sites of a federation register and agree on the initial weights."""
    with Store(folder) as store:
        coordinator = Coordinator(store, log=lambda line: None)
        coordinator.worker.start()

        def send(key: str, site: str, message: messages.Message, own: dict[str, TensorSpec]) -> None:
            path = folder / "incoming" / site
            digest = write_document(path, message, own, (np.zeros(spec.shape, np.float32) for spec in own.values()))
            coordinator.contribute(key, site, path, digest, path.stat().st_size)

        for site in coordinator.settings.sites:
            send(RegistrationKey(RUN), site, registration_of(specs), {})
        wait_until(lambda: coordinator.state.registry.is_closed(RegistrationKey(RUN)))
        owners = coordinator.state.documents.agreement(RUN).match.initial_owner
        for site in coordinator.settings.sites:
            send(
                InitialKey(RUN),
                site,
                messages.Update(),
                {name: specs[name] for name, owner in owners.items() if owner == site},
            )
        wait_until(lambda: coordinator.state.registry.is_closed(InitialKey(RUN)))
        coordinator.stop()


def wait_until(condition) -> None:
    """Wait for a condition of this process, two minutes at most."""
    deadline = time.monotonic() + 120
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("waited in vain")
        time.sleep(0.01)


def make_updates(folder: Path, specs: dict[str, TensorSpec], number: int) -> list[tuple[Path, str]]:
    """Write a few different updates; return (file, digest) of each."""
    updates = []
    for seed in range(number):
        rng = np.random.default_rng(seed)
        path = folder / f"update{seed}.safetensors"
        values = (rng.standard_normal(spec.shape, np.float32) for spec in specs.values())
        updates.append((path, write_document(path, messages.Update(metrics={"loss": 0.5}), specs, values)))
    return updates


# ------------------------------------------------------------------------------------------------------------ limits
def disk_rate(folder: Path, size: int, number: int) -> float:
    """Return the MiB/s at which so many files of `size` bytes reach the disk, each synced.

    As many as the sites send: the first rate of a disk or its host does not last.
    """
    content = memoryview(np.random.default_rng(0).bytes(size))
    begin = time.monotonic()
    for index in range(number):
        with (folder / f"disk{index}").open("wb", buffering=0) as file:
            for offset in range(0, size, MIB):
                file.write(content[offset : offset + MIB])
            os.fsync(file.fileno())
    seconds = time.monotonic() - begin
    for index in range(number):
        (folder / f"disk{index}").unlink()
    return number * size / MIB / seconds


def loopback_rate(path: Path, number: int = 16) -> float:
    """Return the MiB/s at which a file goes from one process to another over the loopback interface."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = multiprocessing.get_context("spawn").Process(
            target=_send_file, args=(listener.getsockname()[1], path, number)
        )
        sender.start()
        connection, _ = listener.accept()
        buffer, count, begin = bytearray(MIB), 0, time.monotonic()
        with connection:
            while received := connection.recv_into(buffer):
                count += received
        seconds = time.monotonic() - begin
        sender.join()
    return count / MIB / seconds


def _send_file(port: int, path: Path, number: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection, path.open("rb") as file:
        for _ in range(number):
            connection.sendfile(file)
            file.seek(0)


# ------------------------------------------------------------------------------------------------------ measurements
@dataclass(frozen=True)
class RoundCosts:
    """The coordinator's costs of a round of so many sites, beside the rates of disk and loopback."""

    num_sites: int
    size: float
    """Of one site's update, in MiB, as are all sizes."""
    idle: Memory
    peak: Memory
    cpu: float
    """Seconds of processor time."""
    upload: float
    download: float
    """MiB/s of all sites together."""
    closing: float
    """Seconds for the sum."""
    alone: float
    """GiB that are summed per second of processor time."""
    disk: list[float]
    loopback: list[float]

    @property
    def total(self) -> float:
        """Return the MiB of all updates."""
        return self.num_sites * self.size

    @property
    def over_idle(self) -> float:
        """Return the peak of memory over idle."""
        return self.peak.rss - self.idle.rss


def play_measured_round(folder: Path, num_sites: int) -> RoundCosts:
    """Let all sites take part in one round, and measure its costs."""
    specs = network_specs()
    size = sum(spec.nbytes for spec in specs.values())
    updates = make_updates(folder, specs, min(num_sites, DISTINCT_UPDATES))
    tokens = make_federation(folder / "federation", num_sites)
    begin_run(folder / "federation", specs)
    probes = min(num_sites, DISK_PROBES)
    with running(folder / "federation") as coordinator:
        time.sleep(1)
        idle = Memory.of(coordinator.process.pid)
        disk = [disk_rate(folder, size, probes)]
        loopback = [loopback_rate(updates[0][0])]
        before = coordinator.cpu_seconds()
        with sampled_memory(coordinator.process.pid) as samples:
            times = play(coordinator.url, tokens, updates)
        cpu = coordinator.cpu_seconds() - before
        disk.append(disk_rate(folder, size, probes))
        loopback.append(loopback_rate(updates[0][0]))
        alone = aggregation_per_core(folder / "federation", folder / "again")
        closing = float(re.search(r"round 0 is closed.*, ([0-9.]+) s to compute", coordinator.log.read_text())[1])
    total = num_sites * size / MIB
    receipts, results = max(one.last_receipt for one in times), max(one.last_result for one in times)
    return RoundCosts(
        num_sites=num_sites,
        size=size / MIB,
        idle=idle,
        peak=samples[-1],
        cpu=cpu,
        upload=total / (receipts - times[0].begin),
        download=total / (results - receipts - closing),
        closing=closing,
        alone=alone,
        disk=disk,
        loopback=loopback,
    )


def measure_round(folder: Path, num_sites: int) -> float:
    """Let all sites take part in one round, print the rates, and return the coordinator's peak of memory over idle."""
    found = play_measured_round(folder, num_sites)
    limit = min(statistics.mean(found.disk), statistics.mean(found.loopback))
    print(f"\n{num_sites} sites, {found.size:.1f} MiB each; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"  limits: disk with fsync {_range(found.disk)}, loopback {_range(found.loopback)} MiB/s")
    print(f"  upload {found.upload:.0f} MiB/s: {found.upload / limit:.0%} of the lower limit (wanted: 80 %)")
    print(
        f"  aggregation {found.total / 1024 / found.closing:.2f} GiB/s in {found.closing:.2f} s; {found.alone:.2f} GiB "
        "per second of processor time (wanted: 1.5 GiB/s)"
    )
    print(f"  download about {found.download:.0f} MiB/s; processor time of the coordinator {found.cpu:.1f} s")
    print(f"  memory idle: {found.idle}; peak: {found.peak}")
    print(
        f"  peak over idle: RSS {found.over_idle:.0f}, anonymous {found.peak.anonymous - found.idle.anonymous:.0f} MiB "
        f"(wanted: at most {1.5 * found.size + 64:.0f})",
        flush=True,
    )
    return found.over_idle


def aggregation_per_core(federation: Path, out_path: Path) -> float:
    """Sum up the round's updates once more; return GiB of input per second of processor time, whatever the load."""
    folder = federation / "gatherings" / RoundKey(RUN, 0)
    with ExitStack() as stack:
        documents = {
            path.name: stack.enter_context(open_document(path))
            for path in folder.glob("*.safetensors")
            if not path.name.startswith("result")
        }
        before = federation / "gatherings" / InitialKey(RUN) / "result.safetensors"
        previous = stack.enter_context(open_document(before))
        begin = time.process_time()
        aggregate_documents(
            documents,
            dict.fromkeys(documents, 10.0),
            out_path=out_path,
            previous=previous,
            message=messages.Aggregate(round=0, contributors={"site000": 1.0}),
        )
        seconds = time.process_time() - begin
    out_path.unlink()
    return sum(path.stat().st_size for path in folder.glob("site*.safetensors")) / GIB / seconds


def play(url: str, tokens: dict[str, str], updates: Sequence[tuple[Path, str]]) -> list:
    """Let all sites play round 0, in a few processes."""
    sites = [PlayedSite(token, *updates[index % len(updates)]) for index, token in enumerate(tokens.values())]
    parts = [sites[index::LOAD_PROCESSES] for index in range(LOAD_PROCESSES)]
    with ProcessPoolExecutor(LOAD_PROCESSES, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(abs, range(LOAD_PROCESSES)))  # the processes are there
        begin = time.monotonic() + 3.0
        return list(pool.map(play_round, *zip(*[(url, RoundKey(RUN, 0), part, begin) for part in parts if part])))


def _range(values: Sequence[float]) -> str:
    return " and ".join(f"{value:.0f}" for value in values)


def measure_idle(folder: Path, num_sites: int, seconds: float = 60.0) -> tuple[float, Memory]:
    """Let sites wait for an exchange that does not close; print and return the share of a core, and the memory."""
    tokens = make_federation(folder / "federation", num_sites)
    with (
        running(folder / "federation") as coordinator,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
    ):
        answers = pool.submit(poll_for, coordinator.url, CensusKey(), list(tokens.values()), seconds)
        time.sleep(27)  # all have connected and asked once
        cpu, begin = coordinator.cpu_seconds(), time.monotonic()
        while not answers.done() and time.monotonic() - begin < seconds - 30:
            time.sleep(0.2)
        share = (coordinator.cpu_seconds() - cpu) / (time.monotonic() - begin)
        print(
            f"\n{num_sites} idle sites: {share:.1%} of a core (wanted: below 10 %), {answers.result()} answers in "
            f"{seconds:.0f} s; {Memory.of(coordinator.process.pid)}",
            flush=True,
        )
        return share, Memory.of(coordinator.process.pid)


def measure_line(folder: Path) -> None:
    """Print the time that a federation costs a training on a line of 1 Gbit/s."""
    from benchmarks.federation_line import measure

    measure(folder)


def measure_slow_line(folder: Path) -> None:
    """Print the time that a federation in eight bits costs a training on a line of 4 Mbit/s."""
    from benchmarks.federation_line import measure_slow

    measure_slow(folder)


def measure_start(folder: Path, num_sites: int) -> None:
    """Start a coordinator, kill it with a round open, start it again; and one with a thousand rounds behind it."""
    specs = network_specs()
    updates = make_updates(folder, specs, 2)
    tokens = make_federation(folder / "federation", 4)
    begin_run(folder / "federation", specs)
    coordinator = Running(folder / "federation")
    times = []
    try:
        coordinator.start()
        times.append(coordinator.start_time())
        from benchmarks.federation_load import contribute

        for token in list(tokens.values())[:3]:
            contribute(coordinator.url, RoundKey(RUN, 0), PlayedSite(token, *updates[0]))
        coordinator.end(signal.SIGKILL)
        coordinator.start()
        times.append(coordinator.start_time())
    finally:
        coordinator.end()
    make_federation(folder / "old", num_sites, num_epochs=2000)
    write_history(folder / "old", HISTORY_ROUNDS)
    with running(folder / "old") as old:
        times.append(old.start_time())
    print(
        f"\nstart to first answer: {times[0]}; after kill -9 with three updates of an open round {times[1]}; with "
        f"{HISTORY_ROUNDS} rounds of {num_sites} sites behind it {times[2]} (wanted: below 2 s); load "
        f"{os.getloadavg()[0]:.1f}",
        flush=True,
    )


def write_history(folder: Path, num_rounds: int) -> None:
    """Write the rows and folders that a long run leaves behind."""
    with Store(folder) as store:
        settings = store.load_settings()
        for number in range(num_rounds):
            exchange = fresh_exchange(parse_key(RoundKey(RUN, number)), settings)
            for site in settings.sites:
                digest = hashlib.sha256(f"{number}{site}".encode()).hexdigest()
                exchange = with_contribution(exchange, site, Contribution(digest, 1, time.time()))
            with store._database.transaction() as connection:
                connection.executemany(
                    "INSERT INTO contributions VALUES (?, ?, ?, ?, ?)",
                    [
                        (str(exchange.key), site, one.digest, one.size, one.received)
                        for site, one in exchange.contributions.items()
                    ],
                )
            store.result_folder(exchange.key)
            store.save_closing(
                replace(exchange, outcome=Closed(time.time(), settings.sites)), "0" * 64, record={"round": number}
            )
            if number < num_rounds - 2:
                store.delete_results(exchange.key)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=64)
    parser.add_argument("--few", type=int, default=4)
    parser.add_argument("--idle", type=int, default=500)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=("round", "idle", "line", "slow", "start"),
        default=("round", "idle", "line", "start"),
    )
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args(argv)
    numbers = {
        "round": (arguments.few, arguments.sites),
        "idle": (arguments.idle,),
        "line": (0,),
        "slow": (0,),
        "start": (arguments.sites,),
    }
    measurements = {
        "round": measure_round,
        "idle": measure_idle,
        "start": measure_start,
        "line": lambda folder, _: measure_line(folder),
        "slow": lambda folder, _: measure_slow_line(folder),
    }
    for name in arguments.only:
        for number in numbers[name]:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                measurements[name](Path(folder), number)
    return 0


if __name__ == "__main__":
    sys.exit(main())
