"""Federations on a real network of NVIDIA FLARE: certificates, a process each for server and sites, loopback only."""

from __future__ import annotations

import json
import shutil
import sqlite3
import stat
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import requests
from fake_federation import in_threads, make_client, served
from masked_sites import MaskedSite, masked_settings
from patience import PATIENCE_S
from small_sites import CONFIGURATION, make_sites, plan_command, shrink_plans, train_command

from benchmarks.nvflare_network import ENDED, PYTHON, Network, hide_torch, listening_addresses, running_network
from nnunetv2.federated.commands.engine import main as engine_command
from nnunetv2.federated.commands.simulate import LocalSite, find_command, run_everywhere, running_coordinator
from nnunetv2.federated.site.credential import SiteCredential, load_credential

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON.exists(), reason=f"no NVFlare environment at {PYTHON}; create it with `make nvflare`"
    ),
]

SITES = ("north", "south", "west")
SHORT = ("--epochs", "2", "--iterations", "2", "--val-iterations", "1", "--validate-every", "1")
FORGERY = """
import sys, threading, time
from pathlib import Path
FLAG = Path({flag!r})

def forge():
    while "nvflare.fuel.f3.cellnet.cell" not in sys.modules:
        time.sleep(0.1)
    time.sleep(1)
    from nvflare.fuel.f3.cellnet.core_cell import CoreCell
    from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
    forged = set()

    def say_origin(message):
        if FLAG.exists():
            job = message.get_header(MessageHeaderKey.ORIGIN, "").rpartition(".")[2]
            message.set_header(MessageHeaderKey.ORIGIN, f"south.{{job}}")

    def say_name(message):
        if FLAG.exists() and FLAG.read_text() == "with name":
            message.set_header("client_name", "south")

    while True:  # filters act in the order of their coming; the engine's own, which adds the token, is there by then
        wanted = FLAG.read_text() if FLAG.exists() else ""
        for cell in list(CoreCell.ALL_CELLS.values()):
            for how, change in (("origin", say_origin), ("with name", say_name)):
                if how == wanted and (how, id(cell)) not in forged:
                    forged.add((how, id(cell)))
                    cell.add_outgoing_request_filter(channel="*", topic="*", cb=change)
        time.sleep(0.2)

if any("worker_process" in word for word in sys.orig_argv):
    threading.Thread(target=forge, daemon=True).start()
"""
"""What the people of a site could have its job do: say that its messages come from another site."""


class Setup:
    """A network whose sites have a small dataset each."""

    def __init__(self, folder: Path, network: Network) -> None:
        self.folder = folder
        self.network = network
        self.sites = make_sites(folder / "sites", num_sites=3, environment={"nnUNet_seed": "7"})
        self.federations = folder / "federations"
        self.forgery = folder / "forgery"
        engine_command(["server", "--kit", str(network.kit("server")), "--folder", str(self.federations)])

    def configure(self, *options: str, sites: Sequence[LocalSite] = ()) -> None:
        """Have every site write what it lets a job do; other sites than those of all tests if some are given."""
        for site in sites or self.sites:
            kit, folder = self.network.kit(site.name), self.folder / "nnunet" / site.name
            environment = {**site.environment, "nnUNet_fed_min_cases": "1"}
            commands = str(Path(find_command("nnUNetv2_train")).parent)
            engine_command(
                [
                    *("site", "--kit", str(kit), "--dataset", site.dataset, "--folder", str(folder)),
                    *("--device", "cpu", "--commands", commands, "--plan-options", "-np 1 -npfp 1", *options),
                    *("--env", *(f"{name}={value}" for name, value in environment.items())),
                ]
            )

    def job(self, federation: str, *options: str) -> str:
        """Submit a job."""
        folder = self.folder / "jobs" / f"{federation}{time.monotonic_ns()}"
        engine_command(["job", str(folder), "--federation", federation, "--sites", *SITES, *options])
        return self.network.submit(folder)

    def credential_file(self, federation: str, site: str) -> Path:
        return self.folder / "nnunet" / site / federation / "federated_site.json"

    def credentials(self, federation: str, job: str) -> dict[str, SiteCredential]:
        """Wait until all gateways of a job are open."""
        files = {site: self.credential_file(federation, site) for site in SITES}
        deadline = time.monotonic() + PATIENCE_S
        while not all(file.exists() for file in files.values()):
            status = self.network.status(job)
            assert time.monotonic() < deadline and not status.startswith(ENDED), (status, self.network.log("server"))
            time.sleep(1)
        return {site: load_credential(file) for site, file in files.items()}

    def finish(self, job: str) -> None:
        """Wait until a job has ended well."""
        status = self.network.wait_for_job(job, 3 * PATIENCE_S)
        logs = [*(self.folder / "nnunet").rglob("logs/*.log")]
        assert status == "FINISHED:COMPLETED", "\n".join(log.read_text()[-1500:] for log in logs)


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nvflare")
    with running_network(folder / "network", SITES) as network:
        setup = Setup(folder, network)
        (folder / "hook").mkdir()
        (folder / "hook" / "sitecustomize.py").write_text(FORGERY.format(flag=str(setup.forgery)))
        network.start("server", PYTHONPATH=str(hide_torch(folder)))  # a coordinator needs none
        for name in SITES:
            network.start(name, **({"PYTHONPATH": str(folder / "hook")} if name == "west" else {}))
        network.wait_for_sites(PATIENCE_S)
        yield setup


Digests = dict[tuple[str, str], str]
"""The SHA-256 of every result and every contribution of a federation, by key and by site or subset."""


def digests(folder: Path) -> Digests:
    """Read the digests of a federation that has ended."""
    with sqlite3.connect(folder / "coordinator.sqlite") as database:
        return {
            **{
                (key, site): digest
                for key, site, digest in database.execute("SELECT key, site, digest FROM contributions")
            },
            **{
                (key, subset): digest
                for key, subset, digest in database.execute("SELECT key, subset, digest FROM results")
            },
        }


def test_a_participant_that_does_not_list_our_class_refuses_the_job(setup, capsys):
    setup.configure("--attach")
    assert "Jobs are refused until" in capsys.readouterr().out
    status = setup.network.wait_for_job(setup.job("refused"), PATIENCE_S)
    assert status != "FINISHED:COMPLETED"
    assert "controller.FederationController' at config path" in setup.network.log("server")
    assert "is not in allow_list" in setup.network.log("server")
    assert not setup.federations.joinpath("refused").exists()
    for kind, names in (("server", ("server",)), ("site", SITES)):
        capsys.readouterr()
        engine_command(["allow", kind])
        line = capsys.readouterr().out
        for name in names:
            setup.network.allow(name, line)
    setup.configure("--attach")
    assert "Jobs are refused until" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config_fed_server.json", lambda c: c["workflows"][0]["args"]["task"].update(folder="/tmp/elsewhere")),
        ("config_fed_client.json", lambda c: c["executors"][0]["executor"]["args"]["task"].update(command=["id"])),
    ],
)
def test_a_job_that_asks_for_more_than_jobs_may_is_refused_before_anything_starts(setup, file, change):
    folder = setup.folder / "jobs" / f"changed.{file}"
    engine_command(["job", str(folder), "--federation", "changed", "--sites", *SITES])
    setup.network.edit(folder / "app" / "config" / file, change)
    status = setup.network.wait_for_job(setup.network.submit(folder), PATIENCE_S)
    assert status != "FINISHED:COMPLETED"
    assert not any(setup.credential_file("changed", site).exists() for site in SITES)
    assert "the job is none that nnUNetv2_fed_engine job has written" in "".join(
        setup.network.log(name) for name in ("server", *SITES)
    )


def test_masked_updates_have_the_same_sum_as_over_http(setup, tmp_path):
    """Besides: who may speak to a gateway, and what listens where."""
    job = setup.job("masked", "--secure", "3", "--epochs", "3", "--validate-every", "1")
    found = setup.credentials("masked", job)
    addresses = listening_addresses(setup.network.pids())
    assert addresses and addresses <= {"127.0.0.1", "[::1]"}
    for site, credential in found.items():
        file = setup.credential_file("masked", site)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert credential.through == "nvflare:loopback/masked" and credential.secure == 3
    for token in (found["south"].token, "north.wrong", ""):
        answer = requests.get(
            f"{found['north'].url}/v1/settings", headers={"Authorization": f"Bearer {token}"}, timeout=PATIENCE_S
        )
        assert answer.status_code == 401 and answer.json()["code"] == "unauthorized"
    _check_that_forgeries_are_refused(setup, found)
    sites = [
        MaskedSite(make_client(found[site]), found[site], setup.credential_file("masked", site), seed=seed)
        for seed, site in enumerate(SITES)
    ]
    through_engine = in_threads(*(lambda site=site: site.train(3) for site in sites))
    setup.network.ask("abort_job", job)
    setup.network.wait_for_job(job, PATIENCE_S)
    settings = masked_settings(SITES, num_epochs=3)
    with served(tmp_path / "federation", settings) as federation:
        others = [
            MaskedSite(
                federation.client(site), federation.credential(site), federation.credential_file(site), seed=seed
            )
            for seed, site in enumerate(SITES)
        ]
        over_http = in_threads(*(lambda site=site: site.train(3) for site in others))
    assert through_engine == over_http and len(set(over_http)) == 1
    deadline = time.monotonic() + PATIENCE_S
    while any(setup.credential_file("masked", site).exists() for site in SITES):
        assert time.monotonic() < deadline, "credentials are left behind"
        time.sleep(0.2)
    assert all(
        setup.credential_file("masked", site).with_name("federated_site.json.identity.pem").exists() for site in SITES
    )


def _check_that_forgeries_are_refused(setup: Setup, found: dict[str, SiteCredential]) -> None:
    """Let west's job say that it is south's."""
    headers = {"Authorization": f"Bearer {found['west'].token}"}
    for how, line in (("origin", "bound to origin west"), ("with name", "invalid auth token signature")):
        setup.forgery.write_text(how)
        deadline = time.monotonic() + PATIENCE_S
        while line not in setup.network.log("server"):
            assert time.monotonic() < deadline, how
            requests.get(f"{found['west'].url}/v1/settings", headers=headers, timeout=PATIENCE_S)
        answer = requests.get(f"{found['west'].url}/v1/settings", headers=headers, timeout=PATIENCE_S)
        assert (answer.status_code, answer.json()["code"]) == (503, "coordinator_trouble"), answer.text
    setup.forgery.unlink()
    answer = requests.get(f"{found['west'].url}/v1/settings", headers=headers, timeout=PATIENCE_S)
    assert answer.status_code == 200


def test_commands_end_with_the_bits_of_the_same_commands_over_http(setup, tmp_path):
    """The federations over HTTP run beside that of the engine, whose processes mostly wait."""
    setup.configure()
    others = make_sites(tmp_path / "sites", num_sites=3, environment={"nnUNet_seed": "7"})

    def through_engine() -> Digests:
        for step in ("plan", "train"):
            setup.finish(setup.job("liver", *SHORT, "--steps", step))
            if step == "plan":
                for site in setup.sites:
                    shrink_plans(site)
        return digests(setup.federations / "liver")

    def over_http() -> Digests:
        with running_coordinator(tmp_path / "coordinator", others, SHORT):
            run_everywhere(others, plan_command, step="plan", log_folder=tmp_path / "logs")
            for site in others:
                shrink_plans(site)
            run_everywhere(others, train_command, step="train", log_folder=tmp_path / "logs")
        found = digests(tmp_path / "coordinator")
        _check_that_another_seed_ends_elsewhere(others, found, tmp_path)
        return found

    found, expected = in_threads(through_engine, over_http, timeout_s=8 * PATIENCE_S)
    assert found == expected
    assert len({key for key, _ in expected}) >= 10
    _check_that_the_model_predicts(setup, tmp_path)


def _check_that_another_seed_ends_elsewhere(sites: Sequence[LocalSite], found: Digests, folder: Path) -> None:
    """Train once more from the same plans: equal digests are those of the trainings, not of what all runs share."""
    anew = [
        replace(
            site,
            credential=site.credential.with_name("another_seed.json"),
            environment={**site.environment, "nnUNet_seed": "8"},
        )
        for site in sites
    ]
    with running_coordinator(folder / "another_seed", anew, SHORT):
        run_everywhere(anew, train_command, step="train", log_folder=folder / "logs")
    others = digests(folder / "another_seed")
    rounds = {one for one in found if "/rounds/" in one[0]}
    assert rounds and not any(found[one] == others[one] for one in rounds)


def _check_that_the_model_predicts(setup: Setup, folder: Path) -> None:
    """Predict with the model that a server without torch has written."""
    site = setup.sites[0]
    model = setup.federations / "liver" / "models" / f"nnUNetTrainerAsymFedAvg__nnUNetPlans__{CONFIGURATION}"
    images = Path(site.environment["nnUNet_raw"]) / f"Dataset{site.dataset}_Phantom" / "imagesTs"
    run_everywhere(
        [site],
        lambda _: [
            *("nnUNetv2_predict_from_modelfolder", "-m", str(model), "-f", "0", "-i", str(images)),
            *("-o", str(folder / "out"), "-device", "cpu", "-npp", "1", "-nps", "1"),
        ],
        step="predict",
        log_folder=folder / "logs",
    )
    assert list((folder / "out").glob("*.nii.gz"))


def test_own_plans_half_precision_and_an_allow_list_change_no_bit_either(setup, tmp_path):
    """Every site plans alone, west has a wider network, north lets out only what its allow-list names."""
    sites = make_sites(tmp_path / "engine", num_sites=3, environment={"nnUNet_seed": "7"})
    others = make_sites(tmp_path / "http", num_sites=3, environment={"nnUNet_seed": "7"})

    def through_engine() -> Digests:
        setup.configure("--planning", "asym", sites=sites)
        job = setup.job("different", *SHORT, "--precision", "float16", "--steps", "plan")
        setup.credentials("different", job)
        joined = tmp_path / "site.json"
        shutil.copyfile(setup.credential_file("different", "north"), joined)
        setup.finish(job)
        let_plans_differ(sites)
        allowed = allow_list(replace(sites[0], credential=joined))
        careful = replace(sites[0], environment={**sites[0].environment, "nnUNet_fed_allow": str(allowed)})
        setup.configure("--planning", "asym", sites=[careful, *sites[1:]])
        setup.finish(setup.job("different", *SHORT, "--precision", "float16", "--steps", "train"))
        return digests(setup.federations / "different")

    def allow_list(site: LocalSite) -> Path:
        file = tmp_path / "allow.json"
        manifest = ["nnUNetv2_fed_manifest", site.dataset, CONFIGURATION, "--write-allow-list", str(file)]
        run_everywhere([site], lambda _: manifest, step="manifest", log_folder=tmp_path / "logs")
        assert json.loads(file.read_text())["coordinator"] == "nvflare:loopback/different"
        return file

    def over_http() -> Digests:
        with running_coordinator(tmp_path / "coordinator", others, [*SHORT, "--precision", "float16"]):
            plan = partial(plan_command, mode="asym")
            run_everywhere(others, plan, step="plan", log_folder=tmp_path / "logs")
            let_plans_differ(others)
            run_everywhere(others, train_command, step="train", log_folder=tmp_path / "logs")
        return digests(tmp_path / "coordinator")

    found, expected = in_threads(through_engine, over_http, timeout_s=8 * PATIENCE_S)
    assert found == expected


def let_plans_differ(sites: Sequence[LocalSite]) -> None:
    """Make all networks small, and that of west wider where it is deepest."""
    for site in sites:
        shrink_plans(site)
    west = sites[-1]
    file = Path(west.environment["nnUNet_preprocessed"]) / f"Dataset{west.dataset}_Phantom" / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"]["features_per_stage"][-1] += 4
    file.write_text(json.dumps(plans))
