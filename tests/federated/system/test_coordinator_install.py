"""A coordinator needs no torch: a dozen packages, few megabytes, a start in no time."""

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from fake_federation import PROJECT, in_threads, make_client, train, wait_until
from patience import PATIENCE_S

from nnunetv2.federated.protocol.invitation import decode_invitation
from nnunetv2.federated.site.credential import load_credential
from nnunetv2.federated.site.enrolment import join

DEPLOY = PROJECT / "deploy"
MOST_PACKAGES = {"coordinator-requirements.txt": 13, "coordinator-secure-requirements.txt": 16}
"""On Python 3.11 and later; there is one more on 3.10."""
MOST_MEGABYTES = 26
OF_THE_INSTALLER = {"pip", "setuptools", "wheel"}


def run(*command: object, **options) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300, **options)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Path:
    """Return a folder with the wheels of what a coordinator needs, that of secure federations too."""
    folder = tmp_path_factory.mktemp("wheels")
    options = ("--disable-pip-version-check", "--only-binary", ":all:", "--dest", folder)
    try:
        run(sys.executable, "-m", "pip", "download", *options, "-r", DEPLOY / "coordinator-secure-requirements.txt")
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"no package index can be reached: {str(error)[-300:]}")
    return folder


@pytest.fixture(scope="module", params=MOST_PACKAGES)
def requirements(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def installed(requirements, wheels, tmp_path_factory) -> Path:
    """Return the folder of a virtual environment with a coordinator and nothing else."""
    folder, source = tmp_path_factory.mktemp("coordinator"), tmp_path_factory.mktemp("source")
    venv.create(folder, with_pip=False, symlinks=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, source)
    shutil.copytree(PROJECT / "nnunetv2", source / "nnunetv2", ignore=shutil.ignore_patterns("__pycache__"))
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "--disable-pip-version-check", "install")
    run(*pip, "--no-index", "--find-links", wheels, "-r", DEPLOY / requirements)
    own = tmp_path_factory.mktemp("own")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", own, source)
    run(*pip, "--no-deps", "--no-index", *own.glob("*.whl"))
    return folder


def packages_of(environment: Path) -> set[str]:
    """Return the names of what is installed, but for installers and this package."""
    python = environment / "bin" / "python"
    listed = run(
        sys.executable, "-m", "pip", "--python", python, "list", "--format", "json", "--disable-pip-version-check"
    )
    names = {entry["name"] for entry in json.loads(listed)} - OF_THE_INSTALLER
    assert "nnunetv2" in names
    return names - {"nnunetv2"}


def test_a_coordinator_needs_few_packages_and_megabytes(requirements, wheels, installed):
    names = packages_of(installed)
    megabytes = sum(path.stat().st_size for path in wheels.iterdir()) / 1e6
    size = sum(path.stat().st_size for path in (installed / "lib").rglob("*") if path.is_file()) / 1e6
    print(
        f"\n{len(names)} packages beside this one: {', '.join(sorted(names))}; {megabytes:.1f} MB to download for a "
        f"secure federation, {size:.1f} MB installed"
    )
    assert "torch" not in names and ("cryptography" in names) == ("secure" in requirements)
    assert len(names) <= MOST_PACKAGES[requirements] + (sys.version_info < (3, 11))
    assert megabytes <= MOST_MEGABYTES


def test_it_starts_again_and_two_sites_run_a_round(installed, tmp_path):
    folder = tmp_path / "federation"
    command = [installed / "bin" / "nnUNetv2_fed_coordinator", "--folder", folder, "--port", "0"]
    log = tmp_path / "log"
    for attempt in range(3):  # the first start makes the federation
        options = ["--sites", "A", "B", "--epochs", "1", "--validate-every", "0"] if attempt == 0 else []
        with log.open("w") as output:
            process = subprocess.Popen(
                [str(word) for word in command + options], stdout=output, stderr=output, stdin=subprocess.DEVNULL
            )
        try:
            wait_until(lambda: (folder / "coordinator.json").exists() or process.poll() is not None)  # noqa: B023
            assert process.poll() is None, log.read_text()
            if attempt == 2:
                digests = play_a_round(log, tmp_path, json.loads((folder / "coordinator.json").read_text())["url"])
        finally:
            process.terminate()
            process.wait(PATIENCE_S)
    assert len(digests) == 1 and all(isinstance(one, str) for one in digests)


def play_a_round(log: Path, folder: Path, url: str) -> set:
    """Let two sites join and train; return the digests of the aggregate that they have."""
    paths = []
    for line in log.read_text().splitlines():
        if "nnUNetv2_fed_join" in line:
            invitation = decode_invitation(line.split()[2])
            paths.append(folder / f"{invitation.site}.json")
            join(invitation, path=paths[-1])

    def site(path, seed):
        with make_client(load_credential(path)) as client:
            return train(client, seed=seed, num_rounds=1)

    return set(in_threads(*[lambda path=path, seed=seed: site(path, seed) for seed, path in enumerate(paths)]))
