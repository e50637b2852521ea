"""Run the commands of a site for a job."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nnunetv2.federated.engine import warden
from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.site.credential import CREDENTIAL_VARIABLE

LOCK_FILE = "training.lock"
LOCK_PATIENCE_S = 60.0
"""How long the commands of an earlier job, which is over, may take to end."""
POLL_S = 0.2


class AbortedError(Exception):
    """The job was aborted while a command was running."""


def environment_of(given: Mapping[str, str], credential: Path) -> dict[str, str]:
    """Return the environment of a site's commands."""
    environment = {**os.environ, **given, CREDENTIAL_VARIABLE: str(credential)}
    if "PYTHONPATH" not in given:
        environment.pop("PYTHONPATH", None)  # the engine's own
    return environment


def run_command(
    command: Sequence[str], *, environment: Mapping[str, str], lock: Path, log: Path, is_aborted: Callable[[], bool]
) -> None:
    """Run one command to its end, with its output in a log of the site.

    Raises:
        AbortedError: The job was aborted; the command and its children are gone.
        FederationError: It has failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        status = _run_once(command, environment=environment, lock=lock, log=log, is_aborted=is_aborted)
        if status != warden.IS_LOCKED or time.monotonic() > deadline:
            break
        time.sleep(1.0)
    if status == warden.IS_LOCKED:
        raise FederationError(f"commands of an earlier job still hold {lock}: end them at the site, then submit again")
    if status:
        raise FederationError(f"{Path(command[0]).name} has ended with status {status}; {log} of the site says more")


def _run_once(
    command: Sequence[str], *, environment: Mapping[str, str], lock: Path, log: Path, is_aborted: Callable[[], bool]
) -> int:
    with log.open("ab") as output:
        output.write(f"$ {shlex.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            [sys.executable, str(Path(warden.__file__)), str(lock), *command],
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert process.stdin is not None
        try:
            while process.poll() is None:
                if is_aborted():
                    raise AbortedError
                try:
                    return process.wait(POLL_S)
                except subprocess.TimeoutExpired:
                    continue
            return int(process.returncode)
        finally:
            process.stdin.close()
            process.wait()
