"""Parts of a network of NVIDIA FLARE die in the middle of a run, whose job is submitted again: nothing is lost.

One death of each kind, with NNUNET_FED_MATRIX=full ten, at moments that follow from a seed. Sites are played, each in a
process. Takes minutes: only where NNUNET_FED_MATRIX is set.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from fake_federation import in_threads, make_settings, served, start_site_process, train
from patience import PATIENCE_S

from benchmarks.nvflare_network import ENDED, PYTHON, Network, processes_below, running_network
from nnunetv2.federated.commands.engine import main as engine_command
from nnunetv2.federated.engine.nvflare.job import describe_allowing

MATRIX = os.environ.get("NNUNET_FED_MATRIX")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON.exists(), reason=f"no NVFlare environment at {PYTHON}; create it with `make nvflare`"
    ),
    pytest.mark.skipif(MATRIX is None, reason="takes minutes: set NNUNET_FED_MATRIX to `few` or `full`"),
]
MOMENTS = range(10 if MATRIX == "full" else 1)
SITES = ("north", "south", "west")
ROUNDS = 8
PAUSE_S = 0.3
AWAY_S = 600 if MATRIX == "full" else 60
LONG_S = 4 * PATIENCE_S


class Setup:
    """A network whose sites only open gateways."""

    def __init__(self, folder: Path, network: Network) -> None:
        self.folder = folder
        self.network = network
        (folder / "raw" / "Dataset001_Played").mkdir(parents=True)
        network.allow("server", describe_allowing("server"))
        engine_command(["server", "--kit", str(network.kit("server")), "--folder", str(folder / "federations")])
        for name in SITES:
            network.allow(name, describe_allowing("site"))
            engine_command(
                [
                    *("site", "--kit", str(network.kit(name)), "--dataset", "1", "--folder", str(folder / name)),
                    *("--attach", "--env", f"nnUNet_raw={folder / 'raw'}"),
                ]
            )

    def submit(self, federation: str) -> tuple[str, dict[str, Path]]:
        """Submit a job, and wait until its gateways are open."""
        job = self.folder / "jobs" / f"{federation}.{time.monotonic_ns()}"
        engine_command(
            [
                *("job", str(job), "--federation", federation, "--steps", "train", "--epochs", str(ROUNDS)),
                *("--validate-every", "0", "--sites", *SITES),
            ]
        )
        files = {site: self.folder / site / federation / "federated_site.json" for site in SITES}
        for file in files.values():
            file.unlink(missing_ok=True)  # of a job that was killed
        number = self.network.submit(job)
        deadline = time.monotonic() + LONG_S
        while not all(file.exists() for file in files.values()):
            status = self.network.status(number)
            assert time.monotonic() < deadline and not status.startswith(ENDED), (status, self.network.log("server"))
            time.sleep(1)
        return number, files

    def end(self, job: str) -> None:
        """See a job to its end: it comes by itself, or is aborted, or nothing is left that could be."""
        deadline = time.monotonic() + LONG_S
        while not self.network.status(job).startswith(ENDED):
            assert time.monotonic() < deadline, self.network.log("server")[-3000:]
            self.network.ask("abort_job", job)
            if self.has_no_processes():  # a server that was started again takes the job for running for ever
                return
            time.sleep(3)
        while not self.has_no_processes():
            assert time.monotonic() < deadline, "the jobs of the sites do not end"
            time.sleep(1)

    def has_no_processes(self) -> bool:
        """Tell whether no job runs."""
        return not any(
            "worker_process" in (text := _command(pid)) or "runner_process" in text for pid in self.network.pids()
        )

    def kill(self, part: str, trainers: dict[str, subprocess.Popen]) -> None:
        """End a part as a power failure would, and bring up again what an operator would."""
        if part == "trainer":
            trainers["north"].kill()
        elif part == "server":
            self.network.kill("server")
            self.network.start("server")
            self.network.forget_admin()
            self.network.wait_for_sites(LONG_S)
        else:
            of = {"job of the server": "server", "job of a site": "north"}[part]
            word = {"server": "runner_process", "north": "worker_process"}[of]
            for pid in processes_below(self.network.processes[of].pid):
                if word in _command(pid):
                    os.kill(pid, signal.SIGKILL)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crashes")
    with running_network(folder / "network", SITES) as network:
        setup = Setup(folder, network)
        network.start_all()
        network.wait_for_sites(LONG_S)
        yield setup


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> object:
    """The digest of the same run over HTTP."""
    with served(tmp_path_factory.mktemp("http") / "federation", make_settings(sites=SITES, num_epochs=ROUNDS)) as one:
        clients = {site: one.client(site) for site in SITES}
        digests = in_threads(
            *(lambda s=site, n=seed: train(clients[s], seed=n, num_rounds=ROUNDS) for seed, site in enumerate(SITES))
        )
    assert len(set(digests)) == 1
    return digests[0]


def start_trainers(files: dict[str, Path]) -> dict[str, subprocess.Popen]:
    return {
        site: start_site_process(
            files[site], seed=seed, num_rounds=ROUNDS, pause_s=PAUSE_S, give_up_after_s=AWAY_S + LONG_S
        )
        for seed, site in enumerate(SITES)
    }


def test_commands_wait_for_an_engine_that_is_away(setup, undisturbed):
    job, files = setup.submit("away")
    trainers = start_trainers(files)
    try:
        for _ in range(2):
            assert "round" in trainers["north"].stdout.readline()
        server = processes_below(setup.network.processes["server"].pid)
        for pid in server:
            os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(AWAY_S)
            assert all(trainer.poll() is None for trainer in trainers.values())
        finally:
            for pid in server:
                os.kill(pid, signal.SIGCONT)
        digests = {trainer.communicate(timeout=LONG_S)[0].split()[-1] for trainer in trainers.values()}
        assert digests == {undisturbed}
    finally:
        for trainer in trainers.values():
            trainer.kill()
            trainer.wait()
        setup.end(job)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("part", ["job of the server", "server", "job of a site", "trainer"])
def test_a_run_ends_as_if_nothing_had_died(setup, undisturbed, part, moment):
    rng = random.Random(f"{part} {moment}")
    job, files = setup.submit(f"{part.replace(' ', '-')}-{moment}")
    trainers = start_trainers(files)
    try:
        before = rng.randrange(1, ROUNDS - 1)
        for _ in range(before):
            assert "round" in trainers["north"].stdout.readline()
        time.sleep(rng.uniform(0, 2 * PAUSE_S))
        setup.kill(part, trainers)
        if part == "trainer":  # the gateway is there, and people start the command again
            trainers["north"].wait()
            trainers["north"] = start_site_process(files["north"], seed=0, num_rounds=ROUNDS, pause_s=PAUSE_S)
        else:
            setup.end(job)
            for trainer in trainers.values():  # they end with their jobs; see test_commands.py
                trainer.kill()
                trainer.wait()
            job, files = setup.submit(f"{part.replace(' ', '-')}-{moment}")
            trainers = start_trainers(files)
        digests = {trainer.communicate(timeout=LONG_S)[0].split()[-1] for trainer in trainers.values()}
        assert digests == {undisturbed}, f"killed after round {before}"
    finally:
        for trainer in trainers.values():
            trainer.kill()
            trainer.wait()
        setup.end(job)
