"""Commands that a job runs at a site end with the job, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from fake_federation import wait_until

from nnunetv2.federated.engine import commands as engine_commands
from nnunetv2.federated.engine import warden
from nnunetv2.federated.engine.commands import AbortedError, environment_of, run_command
from nnunetv2.federated.errors import FederationError

TWO_PROCESSES = "import os, sys, time\nos.fork()\nopen(sys.argv[1] + str(os.getpid()), 'w').close()\ntime.sleep(10000)"


def run(tmp_path, code: str, *words: str, is_aborted=lambda: False) -> None:
    run_command(
        [sys.executable, "-c", code, *words],
        environment=os.environ,
        lock=tmp_path / "lock",
        log=tmp_path / "logs" / "train.log",
        is_aborted=is_aborted,
    )


def is_alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def pids(tmp_path) -> list[int]:
    return [int(path.name.removeprefix("pid")) for path in tmp_path.glob("pid*")]


def test_output_stays_in_a_log_and_a_failure_is_one(tmp_path):
    run(tmp_path, "print('all is well')")
    with pytest.raises(FederationError, match=r"has ended with status 3; .*train.log of the site says more"):
        run(tmp_path, "print('out of memory'); raise SystemExit(3)")
    with pytest.raises(FederationError, match="status 1;"):
        run(tmp_path, f"raise SystemExit({warden.IS_LOCKED})")
    text = (tmp_path / "logs" / "train.log").read_text()
    assert "all is well" in text and "out of memory" in text and "$ " in text


def test_a_command_that_is_killed_has_failed(tmp_path):
    with pytest.raises(FederationError, match="status 137"):
        run(tmp_path, "import os; os.kill(os.getpid(), 9)")


def test_an_aborted_job_ends_its_command_and_all_its_children(tmp_path):
    with pytest.raises(AbortedError):
        run(tmp_path, TWO_PROCESSES, str(tmp_path / "pid"), is_aborted=lambda: len(pids(tmp_path)) == 2)
    wait_until(lambda: not any(map(is_alive, pids(tmp_path))))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_command_of_a_job_that_is_killed_ends_too(tmp_path, number):
    code = (
        "import os, sys; from pathlib import Path; from nnunetv2.federated.engine.commands import run_command\n"
        f"run_command([sys.executable, '-c', {TWO_PROCESSES!r}, {str(tmp_path / 'pid')!r}], environment=os.environ,\n"
        f"    lock=Path({str(tmp_path / 'lock')!r}), log=Path({str(tmp_path / 'log')!r}), is_aborted=lambda: False)"
    )
    job = subprocess.Popen([sys.executable, "-c", code])
    wait_until(lambda: len(pids(tmp_path)) == 2 or job.poll() is not None)
    job.send_signal(number)
    job.wait()
    wait_until(lambda: not any(map(is_alive, pids(tmp_path))))


def test_no_two_commands_train_at_a_site(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_commands, "LOCK_PATIENCE_S", 0.0)
    reading, writing = os.pipe()
    first = subprocess.Popen(
        [
            sys.executable,
            warden.__file__,
            str(tmp_path / "lock"),
            sys.executable,
            "-c",
            TWO_PROCESSES,
            str(tmp_path / "pid"),
        ],
        stdin=reading,
    )
    os.close(reading)
    wait_until(lambda: len(pids(tmp_path)) == 2)
    with pytest.raises(FederationError, match=r"commands of an earlier job still hold .*lock: end them"):
        run(tmp_path, "print('never')")
    first.kill()  # the warden alone: what it has watched goes on, and holds the lock
    first.wait()
    with pytest.raises(FederationError, match="still hold"):
        run(tmp_path, "print('never')")
    for pid in pids(tmp_path):
        os.kill(pid, signal.SIGKILL)
    os.close(writing)
    wait_until(lambda: not any(map(is_alive, pids(tmp_path))))
    run(tmp_path, "print('at last')")


def test_commands_get_the_environment_of_the_site_and_not_the_engines_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/local/custom")
    environment = environment_of({"nnUNet_raw": "/raw"}, tmp_path / "site.json")
    assert "PYTHONPATH" not in environment and environment["nnUNet_raw"] == "/raw"
    assert environment["nnUNet_fed_site"] == str(tmp_path / "site.json")
