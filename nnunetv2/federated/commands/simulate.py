"""Run a coordinator and its sites on one machine, over real HTTP.

With the commands that people type.

Useful to try a federation before hospitals are asked to join one, and to measure it: nothing is short-cut, every site
is a process of its own that knows the others only through the coordinator.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from urllib.parse import urlsplit

from nnunetv2.federated.commands.coordinator_options import add_method_options, method_options, split_words
from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.privacy.min_cases import VARIABLE as MIN_CASES_VARIABLE
from nnunetv2.utilities.command_line import find_command
from nnunetv2.utilities.plain_text import printable, show

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
INVITATION = "nnUNetv2_fed_join "
SERVED = "is served at"


class SimulationError(FederationError):
    """A process of the simulation ended with an error."""


@dataclass(frozen=True, kw_only=True)
class LocalSite:
    """One site of a federation that runs on this machine."""

    name: str
    dataset: str
    """Name or id of the site's dataset."""
    credential: Path
    """File that `nnUNetv2_fed_join` writes and the training reads (environment variable nnUNet_fed_site)."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that differ from those of this process, such as nnUNet_raw."""


@dataclass(frozen=True)
class SiteOptions:
    """Options of one site's commands that the others do not have."""

    planning: tuple[str, ...] = ()
    training: tuple[str, ...] = ()


NO_OPTIONS = SiteOptions()


def site_environment(site: LocalSite, *, num_sites: int) -> dict[str, str]:
    """Build the environment of a site's process: credential and share of cores.

    Sites may have any number of cases: there is nobody here whose cases are to be kept from the others.
    """
    cores = os.cpu_count() or 1
    share = max(1, cores // num_sites)
    environment = {"OMP_NUM_THREADS": str(share), "nnUNet_n_proc_DA": str(share - 1), "nnUNet_def_n_proc": str(share)}
    environment.update(os.environ)
    environment.update(site.environment)
    environment["nnUNet_fed_site"] = str(site.credential)
    environment.setdefault(MIN_CASES_VARIABLE, "1")
    environment["PYTHONUNBUFFERED"] = "1"
    environment["TQDM_DISABLE"] = "1"  # the bars of several sites on one terminal are noise
    return environment


class RunningProcess:
    """A command whose output is shown under a label and logged."""

    def __init__(
        self,
        label: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log_file: Path,
        show: Callable[[str], None],
    ) -> None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        self.label = label
        self.command = list(command)
        self.log_file = log_file
        self.last_lines: deque[str] = deque(maxlen=15)
        self._show = show
        self._process = subprocess.Popen(
            self.command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self.log_file.open("a", encoding="utf-8") as log:
            for line in self._process.stdout:
                log.write(line)
                log.flush()
                self.last_lines.append(line.rstrip())
                if line.strip():
                    self._show(f"[{self.label}] {line.rstrip()}")

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit status, or None while the process runs."""
        return self._process.poll()

    def finish_reading(self) -> None:
        """Wait until everything that the ended process has printed was shown."""
        self._reader.join(timeout=STOP_TIMEOUT_S)

    def stop(self) -> None:
        """Ask the process to end, and kill it if it does not."""
        if self.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self.finish_reading()

    def describe_failure(self) -> str:
        """Say which command ended how, with the last lines that it printed."""
        lines = "\n".join(f"    {line}" for line in self.last_lines)
        return (
            f"{self.label}: `{shlex.join(self.command)}` ended with status {self.poll()}; "
            f"whole output in {self.log_file}; last lines:\n{lines}"
        )


def run_everywhere(
    sites: Sequence[LocalSite],
    command_of: Callable[[LocalSite], Sequence[str]],
    *,
    step: str,
    log_folder: Path,
    show: Callable[[str], None] = show,
    coordinator: RunningProcess | None = None,
) -> None:
    """Run one command per site at the same time; wait for all.

    Args:
        command_of: Gives the command line of a site; the first word is a console script of this package.
        step: Names the log files: `<site>.<step>.log`.
        coordinator: Whom the sites need. Without it they would ask for a day.

    Raises:
        SimulationError: A command failed, or the coordinator has ended; the others were stopped.
    """
    running: list[RunningProcess] = []
    try:
        for site in sites:
            program, *arguments = command_of(site)
            show(f"[{site.name}] $ {shlex.join([program, *arguments])}")
            running.append(
                RunningProcess(
                    site.name,
                    [find_command(program), *arguments],
                    environment=site_environment(site, num_sites=len(sites)),
                    log_file=log_folder / f"{site.name}.{step}.log",
                    show=show,
                )
            )
        wait_for_all(running, coordinator)
    finally:
        for process in running:
            process.stop()


def wait_for_all(running: Sequence[RunningProcess], coordinator: RunningProcess | None = None) -> None:
    """Wait for all sites' processes.

    Raises:
        SimulationError: One has failed, or the coordinator has ended before them.
    """
    while True:
        failed = [process for process in running if process.poll() not in (None, 0)]
        if coordinator is not None and coordinator.poll() is not None:
            failed.append(coordinator)
        if failed:
            failed[0].finish_reading()
            raise SimulationError(failed[0].describe_failure())
        if all(process.poll() == 0 for process in running):
            return
        time.sleep(0.1)


@contextmanager
def running_coordinator(
    folder: Path, sites: Sequence[LocalSite], options: Sequence[str] = (), *, show: Callable[[str], None] = show
) -> Iterator[RunningProcess]:
    """Run a coordinator for the block, and let sites join that have not yet.

    Args:
        folder: The federation's folder, made on the first start; a later start goes on from there.
        options: Further options of `nnUNetv2_fed_coordinator`.

    Yields:
        Its process, when it serves.
    """
    port = known_port(sites) or free_port()
    arguments = ["--folder", str(folder), "--port", str(port), "--sites", *[site.name for site in sites], *options]
    show(f"[coordinator] $ {shlex.join(['nnUNetv2_fed_coordinator', *arguments])}")
    lines: list[str] = []

    def remember(line: str) -> None:
        lines.append(line)
        show(line)

    if MIN_CASES_VARIABLE not in os.environ:
        show(f"[coordinator] sites of this machine take part with any number of cases: {MIN_CASES_VARIABLE}=1")
    process = RunningProcess(
        "coordinator",
        [find_command("nnUNetv2_fed_coordinator"), *arguments],
        show=remember,
        environment={**os.environ, "PYTHONUNBUFFERED": "1"},
        log_file=folder.parent / "logs" / "coordinator.log",
    )
    try:
        wait_until_served(process, folder / "coordinator.json", lines)
        join_sites(sites, invitations=find_invitations(lines, sites), show=show)
        yield process
    finally:
        process.stop()


def known_port(sites: Sequence[LocalSite]) -> int | None:
    """Return the port in an earlier credential, which must stay the same."""
    for site in sites:
        if site.credential.exists():
            content = json.loads(site.credential.read_text(encoding="utf-8"))
            return urlsplit(str(content["url"])).port
    return None


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_served(process: RunningProcess, state_file: Path, lines: Sequence[str]) -> None:
    """Wait until the coordinator serves."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            process.finish_reading()
            raise SimulationError(process.describe_failure())
        if state_file.exists() and any(SERVED in line for line in lines):
            state = json.loads(state_file.read_text(encoding="utf-8"))
            if state["pid"] == process.pid:  # not that of a coordinator that was killed
                return
        time.sleep(0.05)
    raise SimulationError(f"the coordinator did not start within {START_TIMEOUT_S:.0f} s; see {process.log_file}")


def find_invitations(lines: Sequence[str], sites: Sequence[LocalSite]) -> dict[str, str]:
    """Find the invitations in the coordinator's output: site name -> invitation."""
    from nnunetv2.federated.protocol.invitation import decode_invitation

    words = [line.split(INVITATION, 1)[1].split()[0] for line in lines if INVITATION in line]
    invitations = {decode_invitation(word).site: word for word in words}
    missing = [site.name for site in sites if site.name not in invitations and not site.credential.exists()]
    if missing:
        raise SimulationError(f"no invitation left for {', '.join(missing)}, and no credential of an earlier run")
    return invitations


def join_sites(sites: Sequence[LocalSite], *, invitations: Mapping[str, str], show: Callable[[str], None]) -> None:
    """Let every site that has no credential yet accept its invitation."""
    for site in sites:
        if not site.credential.exists():
            site.credential.parent.mkdir(parents=True, exist_ok=True)
            show(f"[{site.name}] $ nnUNetv2_fed_join {invitations[site.name][:40]}...")
            done = subprocess.run(
                [find_command("nnUNetv2_fed_join"), invitations[site.name]],
                text=True,
                env={**os.environ, "nnUNet_fed_site": str(site.credential)},
                capture_output=True,
            )
            if done.returncode:
                raise SimulationError(f"{site.name}: nnUNetv2_fed_join failed: {printable(done.stderr.strip())}")


def simulate(
    sites: Sequence[LocalSite],
    *,
    folder: Path,
    configuration: str,
    fold: str,
    trainer: str,
    plans_name: str,
    device: str,
    federated_planning: str | None,
    planning_options: Sequence[str] = (),
    training_options: Sequence[str] = (),
    coordinator_options: Sequence[str] = (),
    options_of: Mapping[str, SiteOptions] = MappingProxyType({}),
    continue_training: bool = False,
    show: Callable[[str], None] = show,
) -> None:
    """Plan, preprocess and train at all sites at the same time, with one coordinator.

    Args:
        folder: Where the federation, the sites' credentials and all logs are kept.
        federated_planning: "ffe", "asym", or None if every site is planned and preprocessed already.
        options_of: Dataset -> further options of that site alone; they come last, and so overrule the others.
    """

    def own(site: LocalSite) -> SiteOptions:
        return options_of.get(site.dataset, NO_OPTIONS)

    with running_coordinator(folder / "coordinator", sites, coordinator_options, show=show) as coordinator:
        run = partial(run_everywhere, sites, log_folder=folder / "logs", show=show, coordinator=coordinator)
        if federated_planning is not None:
            planning = ["--federated", federated_planning, "-c", configuration, "-np", "1", "-npfp", "1"]
            planning += planning_options
            run(
                lambda site: ["nnUNetv2_plan_and_preprocess", "-d", site.dataset, *planning, *own(site).planning],
                step="plan",
            )
        training = [configuration, fold, "-tr", trainer, "-p", plans_name, "-device", device]
        training += [*(["--c"] if continue_training else []), *training_options]
        run(lambda site: ["nnUNetv2_train", site.dataset, *training, *own(site).training], step="train")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_fed_simulate`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_options(parser)
    add_planning_options(parser)
    add_passed_on_options(parser)
    add_federation_options(parser)
    add_method_options(parser)
    parser.add_argument("--c", dest="continue_training", action="store_true", help="go on where an earlier run stopped")
    return parser


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add the datasets and the training of their sites."""
    parser.add_argument(
        "-d",
        dest="datasets",
        nargs="+",
        required=True,
        metavar="ID",
        help="ids of the datasets; each one becomes a site",
    )
    parser.add_argument("-c", dest="configuration", default="3d_fullres", help="configuration (default: %(default)s)")
    parser.add_argument("-f", dest="fold", default="0", help="fold, or all (default: %(default)s)")
    parser.add_argument("-tr", dest="trainer", default="nnUNetTrainerAsymFedAvg", help="trainer (default: %(default)s)")
    parser.add_argument("-p", dest="plans_name", default="nnUNetPlans", help="plans (default: %(default)s)")
    parser.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="default: %(default)s")


def add_planning_options(parser: argparse.ArgumentParser) -> None:
    """Add whether and how the sites plan."""
    parser.add_argument(
        "--federated",
        default="ffe",
        choices=("ffe", "asym"),
        help="plan from the pooled fingerprint (ffe), or each site on its own (asym)",
    )
    parser.add_argument("--skip_planning", action="store_true", help="every site is planned and preprocessed already")


def add_passed_on_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that hold those of other commands."""
    parser.add_argument(
        "--planning_options",
        default="",
        metavar="TEXT",
        help="more options of nnUNetv2_plan_and_preprocess, in one text",
    )
    parser.add_argument(
        "--training_options", default="", metavar="TEXT", help="more options of nnUNetv2_train, in one text"
    )
    for step, command in (("planning", "nnUNetv2_plan_and_preprocess"), ("training", "nnUNetv2_train")):
        parser.add_argument(
            f"--{step}_options_of",
            action="append",
            default=[],
            metavar="ID=TEXT",
            help=f"more options of {command} at one site, such as "
            + ('502="-gpu_memory_target 2"' if step == "planning" else '502="-p nnUNetPlans_2GB"')
            + "; may be given once per site",
        )
    parser.add_argument(
        "--coordinator_options",
        default="",
        metavar="TEXT",
        help='more options of nnUNetv2_fed_coordinator, in one text: "--epochs 50 --iterations 100"',
    )


def add_federation_options(parser: argparse.ArgumentParser) -> None:
    """Add the folder of the federation, and masks."""
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("nnUNet_simulation"),
        help="folder of the federation, the credentials and the logs (default: %(default)s)",
    )
    parser.add_argument(
        "--secure",
        type=int,
        nargs="?",
        const=3,
        metavar="K",
        help="mask updates and statistics, so that the coordinator learns sums of K sites or more only (K: 3)",
    )
    parser.add_argument(
        "--geometry",
        choices=("list", "quantiles"),
        help="with --secure, what is told of spacings and shapes: those of all cases, or order statistics (list)",
    )


def read_site_options(
    datasets: Sequence[str], *, planning: Sequence[str], training: Sequence[str]
) -> dict[str, SiteOptions]:
    """Return the options of single sites, from words such as `502=-gpu_memory_target 2`.

    Raises:
        SimulationError: A word has another form, or names a dataset that is none of the simulation's, or one twice.
    """
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for step, words in (("planning", planning), ("training", training)):
        for word in words:
            dataset, _, text = word.partition("=")
            if dataset not in datasets or not text:
                raise SimulationError(
                    f"--{step}_options_of {word}: expected ID=TEXT with one of the datasets {' '.join(datasets)}"
                )
            if step in found.setdefault(dataset, {}):
                raise SimulationError(f"--{step}_options_of is given twice for {dataset}: give one text")
            found[dataset][step] = split_words(text, f"--{step}_options_of")
    return {dataset: SiteOptions(**given) for dataset, given in found.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `nnUNetv2_fed_simulate`."""
    arguments = build_parser().parse_args(argv)
    options_of = read_site_options(
        arguments.datasets, planning=arguments.planning_options_of, training=arguments.training_options_of
    )
    folder = arguments.folder.resolve()
    sites = [
        LocalSite(name=f"site{dataset}", dataset=dataset, credential=folder / "sites" / f"site{dataset}.json")
        for dataset in arguments.datasets
    ]
    simulate(
        sites,
        folder=folder,
        configuration=arguments.configuration,
        fold=arguments.fold,
        trainer=arguments.trainer,
        plans_name=arguments.plans_name,
        device=arguments.device,
        federated_planning=None if arguments.skip_planning else arguments.federated,
        planning_options=split_words(arguments.planning_options, "--planning_options"),
        training_options=split_words(arguments.training_options, "--training_options"),
        coordinator_options=[
            *method_options(arguments),
            *split_words(arguments.coordinator_options, "--coordinator_options"),
            *([] if arguments.secure is None else ["--secure", str(arguments.secure)]),
            *([] if arguments.geometry is None else ["--geometry", arguments.geometry]),
        ],
        options_of=options_of,
        continue_training=arguments.continue_training,
    )
    show(f"All sites are done. Aggregates and models: {folder / 'coordinator'}. Logs: {folder / 'logs'}.")
    return 0


def simulate_entry() -> None:
    """Entry point of the console script."""
    from nnunetv2.utilities.command_line import run_command

    run_command(main)
