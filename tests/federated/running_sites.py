"""Trainings of sites and coordinators as processes that can be killed and started again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

from patience import PATIENCE_S
from small_sites import train_command

from nnunetv2.federated.commands.simulate import LocalSite, RunningProcess, find_command, site_environment, wait_for_all


class Coordinator:
    """A coordinator process that can be killed and started again on the same folder and port."""

    def __init__(self, folder: Path, sites: list[LocalSite], options: list[str], logs: Path) -> None:
        port = (
            json.loads((folder / "coordinator.json").read_text())["url"].rsplit(":", 1)[1].rstrip("/")
            if (folder / "coordinator.json").exists()
            else json.loads(sites[0].credential.read_text())["url"].rsplit(":", 1)[1].rstrip("/")
        )
        self.command = [
            find_command("nnUNetv2_fed_coordinator"),
            "--folder",
            str(folder),
            "--port",
            port,
            "--sites",
            *[site.name for site in sites],
            *options,
        ]
        self.log = logs / "coordinator.log"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def start_training(site: LocalSite, logs: Path, lines: list[str], *options: str) -> RunningProcess:
    program, *arguments = train_command(site, *options)
    return RunningProcess(
        site.name,
        [find_command(program), *arguments],
        log_file=logs / f"{site.name}.train.log",
        environment=site_environment(site, num_sites=2),
        show=lines.append,
    )


def wait_for_line(
    lines: list[str], pattern: str, processes: list[RunningProcess], timeout_s: float = PATIENCE_S
) -> None:
    deadline = time.monotonic() + timeout_s
    while not any(re.search(pattern, line) for line in list(lines)):
        failed = [process.describe_failure() for process in processes if process.poll() not in (None, 0)]
        assert not failed, failed[0]
        assert time.monotonic() < deadline, "\n".join(["no line " + pattern, *lines[-20:]])
        threading.Event().wait(0.02)


def train_to_the_end(
    coordinator: Coordinator, sites: list[LocalSite], logs: Path, *, is_killed: bool, kills: int
) -> None:
    """Train at all sites; kill the coordinator in round 0 and a site in round 1, if wanted, and start them again.

    Args:
        kills: Number of the site that is killed.
    """
    coordinator.start()
    lines: list[str] = []
    training = [start_training(site, logs, lines) for site in sites]
    try:
        if is_killed:
            wait_for_line(lines, rf"\[{sites[0].name}\] .*Round 0:", training)
            coordinator.kill()
            time.sleep(1)
            coordinator.start()
            wait_for_line(lines, rf"\[{sites[1].name}\] .*Round 1:", training)
            os.kill(training[kills].pid, signal.SIGKILL)
            training[kills].finish_reading()
            training[kills] = start_training(sites[kills], logs, lines, "--c")
        wait_for_all(training)
    finally:
        for process in training:
            process.stop()
        coordinator.kill()
