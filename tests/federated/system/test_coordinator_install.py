"""A coordinator needs no torch: a dozen packages, few megabytes, a start in no time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bare_environment import PROJECT, download_wheels, list_packages, make_environment, megabytes
from fake_federation import in_threads, make_client, train, wait_until
from patience import PATIENCE_S

from nnunetv2.federated.protocol.invitation import decode_invitation
from nnunetv2.federated.site.credential import load_credential
from nnunetv2.federated.site.enrolment import join

REQUIREMENTS = PROJECT / "deploy" / "coordinator-requirements.txt"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Path:
    """Return a folder with the wheels of what a coordinator needs."""
    folder = tmp_path_factory.mktemp("wheels")
    download_wheels(REQUIREMENTS, folder)
    return folder


@pytest.fixture(scope="module")
def installed(wheels, tmp_path_factory) -> Path:
    """Return the folder of a virtual environment with a coordinator and nothing else."""
    folder = tmp_path_factory.mktemp("coordinator")
    make_environment(folder, REQUIREMENTS, wheels, tmp_path_factory.mktemp("scratch"))
    return folder


@pytest.mark.slow
def test_a_coordinator_needs_thirteen_packages_and_forty_megabytes(wheels, installed):
    names, to_download = list_packages(installed), megabytes(wheels)
    print(
        f"\n{len(names)} packages, this one included: {', '.join(sorted(names))}; {to_download:.1f} MB to download, "
        f"{megabytes(installed / 'lib'):.1f} MB installed"
    )
    assert "nnunetv2" in names and "torch" not in names
    assert len(names - {"nnunetv2"}) <= (13 if sys.version_info >= (3, 11) else 14)
    assert to_download < 40


@pytest.mark.slow
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
