"""The files under deploy/ are accepted by the programs that read them, and name existing things."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE_S

from nnunetv2.federated.commands import admin, coordinator

PROJECT = Path(__file__).resolve().parents[1]
UNIT = PROJECT / "deploy" / "nnunet-coordinator.service"
BACKUP = PROJECT / "deploy" / "nnunet-coordinator-backup.service"
TIMER = PROJECT / "deploy" / "nnunet-coordinator-backup.timer"
CONTAINER = PROJECT / "deploy" / "Containerfile"
MOST_EXPOSURE = 2.0
"""As `systemd-analyze security` counts it: 10 is a service that may do everything."""


def installed_unit(unit: Path, folder: Path) -> Path:
    """Write a unit as it would be on this machine, whose user and commands are others."""
    commands = Path(sys.executable).parent
    text = unit.read_text(encoding="utf-8").replace("/opt/nnunet-coordinator/bin", str(commands))
    path = folder / unit.name
    path.write_text(re.sub(r"^(User|Group)=.*", r"\1=root", text, flags=re.M), encoding="utf-8")
    return path


def systemd_analyze(*arguments: str) -> str:
    command = shutil.which("systemd-analyze")
    if command is None:
        pytest.skip("systemd-analyze is not installed")
    done = subprocess.run([command, *arguments], capture_output=True, text=True, timeout=PATIENCE_S)
    if "bus" in done.stderr and done.returncode:
        pytest.skip(f"systemd-analyze does not work here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("unit", [UNIT, BACKUP, TIMER], ids=lambda path: path.name)
def test_systemd_accepts_the_unit(tmp_path, unit):
    installed_unit(BACKUP, tmp_path)  # which the timer starts
    assert unit.name not in systemd_analyze("verify", "--man=no", str(installed_unit(unit, tmp_path)))


@pytest.mark.parametrize("unit", [UNIT, BACKUP], ids=lambda path: path.name)
def test_the_unit_leaves_little_exposed(tmp_path, unit):
    shown = systemd_analyze("security", "--offline=yes", "--no-pager", str(installed_unit(unit, tmp_path)))
    assert float(re.search(r"Overall exposure level for \S+: ([0-9.]+)", shown)[1]) <= MOST_EXPOSURE


def test_the_command_of_the_unit_is_one():
    line = re.search(r"^ExecStart=(.*)$", UNIT.read_text(encoding="utf-8"), flags=re.M)[1]
    program, *arguments = shlex.split(line.replace("$COORDINATOR_OPTIONS", "--host 192.0.2.10"))
    assert Path(program).name == "nnUNetv2_fed_coordinator"
    assert coordinator.build_parser().parse_args(arguments).folder == Path("/var/lib/nnunet-coordinator/federation")


def test_the_command_of_the_backup_saves_the_federation_of_the_unit(tmp_path):
    line = re.search(r"^ExecStart=(.*)$", BACKUP.read_text(encoding="utf-8"), flags=re.M)[1]
    shell, option, script = shlex.split(line.replace("%%", "%").replace("$$", "$"))
    assert (shell, option) == ("/bin/sh", "-c")
    (tmp_path / "federation").mkdir()
    script = script.replace("/opt/nnunet-coordinator/bin", str(Path(sys.executable).parent))
    done = subprocess.run([shell, option, script], capture_output=True, text=True, cwd=tmp_path, timeout=PATIENCE_S)
    assert "federation holds no federation" in done.stderr


# ------------------------------------------------------------------------------------------------------- container
def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the container file, with their arguments."""
    text = re.sub(r"^#.*\n", "", CONTAINER.read_text(encoding="utf-8"), flags=re.M).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def test_the_container_copies_what_there_is_and_its_context_lets_that_in():
    ignored = (CONTAINER.parent / "Containerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    for name, rest in instructions():
        if name == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (PROJECT / source).exists(), source
                assert f"!{source}" in ignored


def test_the_container_runs_as_nobody_in_particular_and_answers_for_its_health():
    given = dict(instructions())
    assert given["USER"].isdigit() and int(given["USER"]) > 1000
    program, *arguments = json.loads(given["ENTRYPOINT"])
    assert program == "nnUNetv2_fed_coordinator"
    coordinator.build_parser().parse_args([*arguments, "--url", "https://coordinator.example:8750"])
    program, *arguments = json.loads(given["HEALTHCHECK"].partition("CMD ")[2])
    assert program == "nnUNetv2_fed_admin"
    admin.build_parser().parse_args(arguments)


@pytest.mark.parametrize("name", ["coordinator-requirements.txt", "coordinator-secure-requirements.txt"])
def test_the_requirements_of_the_coordinator_are_those_of_the_package(name):
    lines = (CONTAINER.parent / name).read_text(encoding="utf-8").splitlines()
    wanted = {line.strip() for line in lines if line.strip() and not line.startswith(("#", "-r "))}
    assert wanted
    assert wanted <= set(re.findall(r'^ +"([^"]+)",$', (PROJECT / "setup.py").read_text(encoding="utf-8"), flags=re.M))
