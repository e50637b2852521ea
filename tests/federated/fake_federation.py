"""Coordinators in threads and processes, and sites that train a few numbers instead of a network."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from fake_engine import Gateways
from patience import MUCH_LONGER_S, PATIENCE_S
from starlette.applications import Starlette

from nnunetv2.federated.coordinator.app import build_app
from nnunetv2.federated.coordinator.http.connections import GuardedServer, guarded_config
from nnunetv2.federated.coordinator.http.endpoint import Endpoint
from nnunetv2.federated.coordinator.http.listen_address import open_socket
from nnunetv2.federated.coordinator.http.rate_limits import Limits
from nnunetv2.federated.coordinator.members import create_federation
from nnunetv2.federated.coordinator.service import Coordinator
from nnunetv2.federated.coordinator.state import FederationState
from nnunetv2.federated.coordinator.storage.store import Store
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.document import file_digest
from nnunetv2.federated.protocol.invitation import Invitation, decode_invitation
from nnunetv2.federated.protocol.keys import InitialKey, RegistrationKey, RoundKey
from nnunetv2.federated.site.credential import SiteCredential, load_credential
from nnunetv2.federated.site.enrolment import join
from nnunetv2.federated.site.transports.http import HttpTransport

PROJECT = Path(__file__).resolve().parents[2]
TEST_PATHS = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
"""What processes of tests need in front of `sys.path`."""
LABELS = {"background": 0, "liver": 1}
RUN = "3d_fullres.fold_0.nnUNetTrainerFake"
SHAPES = {"encoder.weight": (4, 3), "encoder.bias": (4,), "head.weight": (2, 4)}
ALIASES = {"decoder.encoder.weight": "encoder.weight"}
THROUGH_GATEWAYS = False
"""Whether `served` puts the gateways of a fake engine in front of its coordinators."""


# --------------------------------------------------------------------------------------------------------- messages
def make_settings(*, sites=("A", "B"), num_epochs=3, **others) -> FederationSettings:
    return FederationSettings(federation="test", sites=sites, num_epochs=num_epochs, **others)


def make_census(num_cases=3, labels=LABELS) -> messages.Census:
    return messages.Census(num_cases=num_cases, channel_names={"0": "CT"}, labels=labels)


def make_plans(**others) -> dict:
    return {
        "dataset_name": "Dataset001_Fake",
        "plans_name": "nnUNetPlans",
        "configurations": {"3d_fullres": {"patch_size": [16, 16, 16]}},
        **others,
    }


def make_registration(
    num_cases=3, shapes=SHAPES, aliases=ALIASES, labels=LABELS, plans=None, equal=False, **others
) -> messages.Registration:
    return messages.Registration(
        configuration="3d_fullres",
        fold="0",
        trainer="nnUNetTrainerFake",
        num_training_cases=num_cases,
        plans=plans or make_plans(),
        mirroring_axes=(0, 1, 2),
        requires_equal_plans=equal,
        aliases=aliases,
        dataset_json=messages.TrainingData(channel_names={"0": "CT"}, labels=labels, file_ending=".nii.gz"),
        tensors=tuple(messages.TensorEntry(name=name, dtype="F32", shape=shape) for name, shape in shapes.items()),
        **others,
    )


def incoming_path(store: Store) -> Path:
    """Return a fresh path for a document that comes without HTTP."""
    return store.folder / "incoming" / uuid.uuid4().hex


def make_weights(seed: int, shapes=SHAPES) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


# ------------------------------------------------------------------------------------------------------------ sites
def train(
    client: HttpTransport,
    *,
    seed: int,
    num_rounds: int,
    run: str = RUN,
    num_cases: int = 3,
    pause_s: float = 0.0,
    on_round: Callable[[int], None] = lambda number: None,
    shapes=SHAPES,
    plans=None,
) -> str:
    """Take part in a run from wherever it is; return the digest of its last aggregate."""
    site = client.credential.site
    match = client.exchange(RegistrationKey(run), make_registration(num_cases, shapes, plans=plans)).message
    local_names = {name: sites[site] for name, sites in match.shared.items() if site in sites}
    own = {name for name, owner in match.initial_owner.items() if owner == site}
    initial = make_weights(seed, shapes)
    client.exchange(InitialKey(run), messages.Update(), {name: initial[local_names[name]] for name in own})
    state = client.run_state(run)
    number = num_rounds if state.closed else state.open_round or 0
    document = client.result(RoundKey(run, number - 1) if number else InitialKey(run))
    while number < num_rounds:
        time.sleep(pause_s)
        shift = np.float32(seed + number)
        update = {name: document.read(name) * np.float32(0.5) + shift for name in local_names}
        document = client.exchange(RoundKey(run, number), messages.Update(metrics={"loss": float(shift)}), update)
        number = document.message.round + 1
        on_round(number)
    return file_digest(document.path)


def in_threads(*functions: Callable[[], object], timeout_s: float = PATIENCE_S) -> list[object]:
    """Run functions at the same time; return what they return, or raise the first error of them, in their order."""
    outcomes = outcomes_in_threads(*functions, timeout_s=timeout_s)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes


def outcomes_in_threads(*functions: Callable[[], object], timeout_s: float = PATIENCE_S) -> list[object]:
    """Run functions at the same time; return what each of them returned or raised."""
    outcomes: list[object] = [None] * len(functions)

    def run(index: int) -> None:
        try:
            outcomes[index] = functions[index]()
        except BaseException as error:  # noqa: BLE001  looked at by the caller
            outcomes[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
        assert not thread.is_alive(), f"a fake site hangs; the others: {outcomes}"
    return outcomes


def make_client(credential: SiteCredential, lines: list[str] | None = None, **options) -> HttpTransport:
    """Return a client that is quick to ask again."""
    options = {"give_up_after_s": PATIENCE_S, "pause_s": 0.05, **options}
    return HttpTransport(credential, report=(lambda line: None) if lines is None else lines.append, **options)


# ----------------------------------------------------------------------------------------- coordinator in a thread
class LocalFederation:
    """A coordinator that is served by a thread of this process."""

    def __init__(self, coordinator: Coordinator, app: Starlette, url: str, lines: list[str]) -> None:
        self.coordinator = coordinator
        self.app = app
        self.url = url
        self.lines = lines
        self._credentials: dict[str, SiteCredential] = {}

    @property
    def state(self) -> FederationState:
        return self.coordinator.state

    def invitations(self) -> dict[str, str]:
        """Return the secrets of the invitations that nobody has used."""
        return {one.member: one.secret for one in self.coordinator.members.open_invitations(time.time())}

    def credential(self, site: str) -> SiteCredential:
        """Let a site join, the first time, and return its credential."""
        if site not in self._credentials:
            join(self.invitation(site), path=self.credential_file(site))
            self._credentials[site] = load_credential(self.credential_file(site))
        return self._credentials[site]

    def credential_file(self, site: str) -> Path:
        return self.coordinator.state.store.folder / f"credential.{site}.json"

    def invitation(self, site: str) -> Invitation:
        """Return the invitation that a site has not used."""
        secret, federation = self.invitations()[site], self.coordinator.settings.federation
        is_secure = self.coordinator.members.needs_identity(site)
        return Invitation(self.url, federation, site, secret, secure=is_secure)

    def client(self, site: str, lines: list[str] | None = None, **options) -> HttpTransport:
        return make_client(self.credential(site), lines, **options)


@contextmanager
def served(folder: Path, settings: FederationSettings, limits: Limits = Limits()) -> Iterator[LocalFederation]:  # noqa: B008
    """Serve a federation, made if there is none in the folder, on a free port."""
    lines: list[str] = []
    with Store(folder) as store:
        if store.load_settings() is None:
            create_federation(store, settings, now=time.time())
        coordinator = Coordinator(store, log=lines.append)
        listener = open_socket("127.0.0.1", 0)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        app = build_app(coordinator, Endpoint(url), limits=limits)
        gateways = Gateways(app, coordinator, folder.with_name(f"{folder.name}.gateways")) if THROUGH_GATEWAYS else None
        server = GuardedServer(guarded_config(gateways or app, timeout_graceful_shutdown=2), limits)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield LocalFederation(coordinator, app, url, lines)
        finally:
            coordinator.notifier.stop()
            server.should_exit = True
            thread.join(PATIENCE_S)
            listener.close()
            if gateways is not None:
                gateways.close()
            assert not thread.is_alive()


def wait_until(condition: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    """Wait until a condition holds; fail if it never does."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def validations_of(store: Store, run: str) -> list[dict[str, Any]]:
    """Return the validations of a run; wait for that of its last round, for which no site does."""
    last = store.load_rounds(run)[-1]["round"]
    wait_until(lambda: last in [one["round"] for one in store.load_validations(run)])
    return store.load_validations(run)


# ---------------------------------------------------------------------------------------- coordinator in a process
class CoordinatorProcess:
    """The command nnUNetv2_fed_coordinator in a process of its own, which can be killed."""

    def __init__(self, folder: Path, *options: str, port: int = 0, grace_s: float | None = None) -> None:
        self.folder = folder
        self.grace_s = grace_s
        """How long downloads may go on after a signal to stop; None: as it is."""
        self.options = options
        self.port = port
        self.output = ""
        self.start()

    def start(self) -> None:
        (self.folder / "coordinator.json").unlink(missing_ok=True)
        grace = "" if self.grace_s is None else f"coordinator.STOP_TIMEOUT_S = {self.grace_s}; "
        code = (
            f"import sys; from nnunetv2.federated.commands import coordinator; {grace}"
            "sys.exit(coordinator.main(sys.argv[1:]))"
        )
        self.log = self.folder.parent / f"{self.folder.name}.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, "--folder", str(self.folder), "--port", str(self.port), *self.options],
                cwd=PROJECT,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        wait_until(lambda: (self.folder / "coordinator.json").exists() or self.process.poll() is not None)
        assert self.process.poll() is None, self.text()
        self.url = json.loads((self.folder / "coordinator.json").read_text())["url"]
        self.port = int(self.url.rpartition(":")[2])

    def text(self) -> str:
        return self.log.read_text()

    def credentials(self) -> dict[str, SiteCredential]:
        """Let all sites join."""
        wait_until(lambda: "is served at" in self.text())
        words = [line.split()[2] for line in self.text().splitlines() if "nnUNetv2_fed_join" in line]
        result = {}
        for word in words:
            invitation = decode_invitation(word)
            path = self.folder.parent / f"{invitation.site}.json"
            if not path.exists():
                join(invitation, path=path)
            result[invitation.site] = load_credential(path)
        return result

    def kill(self) -> None:
        """End the process as a power failure would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask the process to stop and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


@contextmanager
def coordinator_process(folder: Path, *options: str, grace_s: float | None = None) -> Iterator[CoordinatorProcess]:
    process = CoordinatorProcess(folder, *options, grace_s=grace_s)
    try:
        yield process
    finally:
        process.stop()


def start_site_process(
    credential: Path,
    *,
    seed: int,
    num_rounds: int,
    pause_s: float,
    hold_at: int | None = None,
    give_up_after_s: float = PATIENCE_S,
) -> subprocess.Popen:
    """Start a fake site in a process of its own; it prints every round it finishes, and the last digest.

    Args:
        hold_at: The round after which it waits until it is killed.
        give_up_after_s: How long it asks a coordinator that does not answer.
    """
    code = (
        f"import sys; sys.path[:0] = {TEST_PATHS}; import fake_federation as f\n"
        "from pathlib import Path\n"
        "def tell(number):\n"
        "    print('round', number, flush=True)\n"
        f"    number == {hold_at} and f.time.sleep({MUCH_LONGER_S})\n"
        f"credential = f.load_credential(Path({str(credential)!r}))\n"
        f"with f.make_client(credential, give_up_after_s={give_up_after_s}) as client:\n"
        f"    print(f.train(client, seed={seed}, num_rounds={num_rounds}, pause_s={pause_s},\n"
        "                  on_round=tell), flush=True)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )
