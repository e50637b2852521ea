"""Kill the coordinator at every record of its journal and at random moments, and every site: the result stays the same.

With updates in clear and with masked ones.

NNUNET_FED_MATRIX=full runs the whole matrix (`make federation-matrix`); without it, a part that takes seconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_federation import (
    RUN,
    SHAPES,
    in_threads,
    make_client,
    make_registration,
    make_settings,
    served,
    train,
    wait_until,
)
from masked_sites import MaskedSite, masked_settings
from nursery import Nursery
from patience import PATIENCE_S

import nnunetv2.federated.site.transports.http as client_module
from nnunetv2.federated.commands.api_client import OPERATOR_FILE, ask, operator_credential
from nnunetv2.federated.coordinator.storage import audit_log
from nnunetv2.federated.coordinator.storage.store import DATABASE_FILE, Store
from nnunetv2.federated.errors import CoordinatorUnreachable, FederationError
from nnunetv2.federated.protocol.api import RunAction, RunState
from nnunetv2.federated.protocol.document import file_digest
from nnunetv2.federated.protocol.invitation import decode_invitation
from nnunetv2.federated.protocol.keys import RegistrationKey, RoundKey, ValidationKey
from nnunetv2.federated.protocol.messages import Validation
from nnunetv2.federated.site.credential import load_credential
from nnunetv2.federated.site.enrolment import join

FULL = os.environ.get("NNUNET_FED_MATRIX") == "full"
pytestmark = pytest.mark.timeout(3600 if FULL else 300)
SITES = ("A", "B", "C")
NUM_ROUNDS = 3
RANDOM_KILLS = 40 if FULL else 10
KILLS_PER_SITE = 10 if FULL else 2
LARGE = {"encoder.weight": (1024, 1024), "encoder.bias": (1024,), "head.weight": (512, 1024)}
"""Six MiB: uploads and aggregations that take long enough to be hit."""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Sites that ask again soon, however often the coordinator has died while they asked."""
    monkeypatch.setattr(client_module, "LONGEST_PAUSE_S", 0.2)


@pytest.fixture(scope="module")
def nursery():
    nursery = Nursery()
    yield nursery
    nursery.close()


KINDS = ["clear", "masked"]
"""Whether updates travel in clear, or masked. A round of the latter takes three exchanges, as its validation does."""


def settings_of(kind: str, num_rounds: int):
    """Return the settings of a federation of this kind."""
    if kind == "masked":
        return masked_settings(SITES, num_epochs=num_rounds)
    return make_settings(sites=SITES, num_epochs=num_rounds)


def take_part(client, number: int, *, num_rounds: int = NUM_ROUNDS, shapes=SHAPES, file: Path | None = None) -> str:
    """Train as a fake site, validating every aggregate.

    Args:
        file: The credential, beside which a site keeps what it must not lose.
    """
    if client.credential.secure is not None:
        return MaskedSite(client, client.credential, file, seed=number, shapes=shapes).train(num_rounds)

    def validate(next_round: int) -> None:
        tp = float(10 * next_round + number)
        client.contribute(ValidationKey(RUN, next_round - 1), Validation(tp=(tp,), fp=(1.0,), fn=(2.0,)))

    return train(client, seed=number, num_rounds=num_rounds, num_cases=number + 1, shapes=shapes, on_round=validate)


@dataclass(frozen=True)
class Run:
    """A run in which nothing goes wrong."""

    kind: str
    num_rounds: int
    digest: str
    """What each site ends with,"""
    aggregate: str
    """and the SHA-256 of the last aggregate."""


def patience_for(num_rounds: int) -> float:
    """Return how long a run of so many rounds may take, however busy the machine is."""
    return PATIENCE_S * (1 + num_rounds / 10)


def run_undisturbed(folder: Path, num_rounds: int, shapes=SHAPES, kind: str = "clear") -> Run:
    with served(folder, settings_of(kind, num_rounds)) as federation:
        clients = [federation.client(site) for site in SITES]
        digests = in_threads(
            *(
                lambda c=client, n=number, f=folder / f"credential.{client.credential.site}.json": take_part(
                    c, n, num_rounds=num_rounds, shapes=shapes, file=f
                )
                for number, client in enumerate(clients)
            ),
            timeout_s=patience_for(num_rounds),
        )
        for client in clients:
            client.close()
        aggregate = federation.state.store.load_result_digest(RoundKey(RUN, num_rounds - 1))
    assert len(set(digests)) == 1, digests
    return Run(kind, num_rounds, digests[0], aggregate)


@pytest.fixture(scope="module", params=KINDS)
def undisturbed(request, tmp_path_factory) -> Run:
    """A run in which nothing goes wrong."""
    num_rounds = NUM_ROUNDS if FULL or request.param == "clear" else 2
    return run_undisturbed(tmp_path_factory.mktemp("undisturbed") / "federation", num_rounds, kind=request.param)


class MortalCoordinator:
    """A coordinator that is born again whenever it has died, and may be doomed anew each time."""

    def __init__(self, nursery: Nursery, folder: Path, num_rounds: int = NUM_ROUNDS, kind: str = "clear") -> None:
        self.folder = folder
        self.log = folder.parent / "coordinator.log"
        self.num_rounds = num_rounds
        self.options = ["--secure", "--validate-every", "1"] if kind == "masked" else []
        self.deaths = 0
        self._nursery = nursery
        self._port = 0
        self._pid = 0

    def live(self, **doom: object) -> None:
        """Come to life, and wait until sites can come, or until death strikes."""
        state = self.folder / "coordinator.json"
        state.unlink(missing_ok=True)
        self._pid = self._nursery.start(
            role="coordinator",
            log=str(self.log),
            **doom,
            arguments=[
                "--folder",
                str(self.folder),
                "--port",
                str(self._port),
                "--sites",
                *SITES,
                "--epochs",
                str(self.num_rounds),
                *self.options,
            ],
        )
        wait_until(lambda: state.exists() or not self.is_alive)
        if self.is_alive:
            self._port = int(json.loads(state.read_text())["url"].rpartition(":")[2])

    @property
    def is_alive(self) -> bool:
        return self._nursery.is_alive(self._pid)

    @property
    def is_over(self) -> bool:
        """Whether the models of the run have been written: the last thing that happens."""
        try:
            with closing(sqlite3.connect(f"file:{self.folder / DATABASE_FILE}?mode=ro", uri=True)) as database:
                return bool(database.execute("SELECT 1 FROM events WHERE kind = 'model'").fetchone())
        except sqlite3.OperationalError:  # there is no database yet
            return False

    def kill(self) -> None:
        self._nursery.kill(self._pid)
        wait_until(lambda: not self.is_alive)
        self.deaths += 1

    def stop(self) -> None:
        self._nursery.kill(self._pid, signal.SIGTERM)
        wait_until(lambda: not self.is_alive)

    def credentials(self, timeout_s: float = PATIENCE_S) -> list:
        """Let all sites join, however often that takes."""
        deadline = time.monotonic() + timeout_s
        while True:
            words = [line.split()[2] for line in self.log.read_text().splitlines() if "nnUNetv2_fed_join" in line]
            invitations = {(one := decode_invitation(word)).site: one for word in words}
            try:
                for site, invitation in invitations.items():
                    path = self.folder.parent / f"{site}.json"
                    if not path.exists():
                        join(invitation, path=path)
                return [load_credential(self.folder.parent / f"{site}.json") for site in SITES]
            except (FederationError, FileNotFoundError):
                assert time.monotonic() < deadline
                time.sleep(0.02)


class SitesInThreads:
    """Three sites that take part in a run from beginning to end, whatever the coordinator does."""

    def __init__(self, coordinator: MortalCoordinator, **options: object) -> None:
        self.digests: list[object] = []
        self._thread = threading.Thread(target=self._run, args=(coordinator, options), daemon=True)
        self._thread.start()

    def _run(self, coordinator: MortalCoordinator, options: dict) -> None:
        clients = [make_client(credential, give_up_after_s=PATIENCE_S) for credential in coordinator.credentials()]
        self.digests = in_threads(
            *(
                lambda c=client, n=number: take_part(
                    c,
                    n,
                    num_rounds=coordinator.num_rounds,
                    file=coordinator.folder.parent / f"{c.credential.site}.json",
                    **options,
                )
                for number, client in enumerate(clients)
            ),
            timeout_s=600.0,
        )
        for client in clients:
            client.close()

    @property
    def are_done(self) -> bool:
        return not self._thread.is_alive()

    def join(self, timeout_s: float = PATIENCE_S) -> None:
        self._thread.join(timeout_s)
        assert self.are_done, "the sites hang"


def check_journal(folder: Path, run: Run) -> None:
    """Nothing was lost, nothing counted twice, and the log of events is whole."""
    num_rounds, digest = run.num_rounds, run.aggregate
    with Store(folder) as store:
        assert store.load_result_digest(RoundKey(RUN, num_rounds - 1)) == digest
        closings = Counter(event.key for event in store.load_events("closing"))
        contributions = Counter((event.site, event.key) for event in store.load_events("contribution"))
        assert set(closings.values()) == {1} and set(contributions.values()) == {1}
        assert len([key for key in closings if "/rounds/" in key]) == num_rounds
        assert len(store.load_rounds(RUN)) == num_rounds
        assert audit_log.first_break(store.load_log()) is None
        assert not list((folder / "incoming").iterdir())
        assert file_digest(store.result_path(RoundKey(RUN, num_rounds - 1))) == digest


# ----------------------------------------------------------------------------------------- every record of the journal
@pytest.mark.parametrize("side", ["before", "after"])
def test_a_coordinator_that_dies_at_every_record_in_turn(nursery, tmp_path, undisturbed, side):
    """Every life writes one record more than the one before, and ends just before or after the commit of the next."""
    coordinator = MortalCoordinator(nursery, tmp_path / "federation", undisturbed.num_rounds, undisturbed.kind)
    lives_on = {"die_at": 2 if side == "before" else 1, "side": side, "skip_start": True}
    coordinator.live(**lives_on)
    sites = SitesInThreads(coordinator)
    deadline = time.monotonic() + PATIENCE_S
    while not (sites.are_done and coordinator.is_over):
        assert time.monotonic() < deadline, coordinator.log.read_text()[-2000:]
        if not coordinator.is_alive:
            coordinator.deaths += 1
            coordinator.live(**lives_on)
        time.sleep(0.002)
    sites.join()
    coordinator.stop()
    assert sites.digests == [undisturbed.digest] * len(SITES)
    check_journal(coordinator.folder, undisturbed)
    print(f"{coordinator.deaths} deaths {side} the commit of a record")
    # About 30, fewer where the machine is busy: then other threads commit their records before the signal arrives.
    assert coordinator.deaths > 2 * undisturbed.num_rounds


def die_once(nursery: Nursery, folder: Path, record: int, side: str, undisturbed: Run) -> bool:
    """Run from the creation of a federation to the end, with one death at a record; False if there are fewer."""
    folder.mkdir()
    coordinator = MortalCoordinator(nursery, folder / "federation", undisturbed.num_rounds, undisturbed.kind)
    coordinator.live(die_at=record, side=side, skip_start=False)
    if not coordinator.is_alive:
        coordinator.deaths += 1
        coordinator.live()
    sites = SitesInThreads(coordinator)
    deadline = time.monotonic() + PATIENCE_S
    while not (sites.are_done and coordinator.is_over):
        assert time.monotonic() < deadline, (record, side, coordinator.log.read_text()[-2000:])
        if not coordinator.is_alive:
            coordinator.deaths += 1
            coordinator.live()
        time.sleep(0.002)
    sites.join()
    coordinator.stop()
    assert sites.digests == [undisturbed.digest] * len(SITES), (record, side)
    check_journal(coordinator.folder, undisturbed)
    return coordinator.deaths > 0


def test_a_coordinator_that_dies_once_at_one_record(nursery, tmp_path, undisturbed):
    """The whole matrix takes every record, those of the start too, on both sides of its commit; else a few."""
    records = range(1, 400) if FULL else (1, 2, 4) if undisturbed.kind == "clear" else (25,)
    for side in ("before", "after"):
        for record in records:
            if not die_once(nursery, tmp_path / f"{record}{side}", record, side, undisturbed):
                print(f"{record - 1} records {side} the commit of which the coordinator died")
                assert record > 30
                break


@pytest.mark.parametrize("side", ["before", "after"])
def test_what_an_operator_has_said_outlasts_a_death_at_its_record(nursery, tmp_path, side):
    """Just after the commit, it is done though no answer was heard; just before, it has not been said."""
    coordinator = MortalCoordinator(nursery, tmp_path / "federation")
    coordinator.live()
    clients = [make_client(credential) for credential in coordinator.credentials()[:2]]
    for client in clients:
        client.contribute(RegistrationKey(RUN), make_registration())
    coordinator.stop()
    coordinator.live(die_at=1, side=side, skip_start=True)

    def proceed() -> None:
        wait_until((coordinator.folder / OPERATOR_FILE).exists)
        ask(
            operator_credential(coordinator.folder),
            "POST",
            f"runs/{RUN}/actions",
            RunState,
            RunAction(action="proceed"),
        )

    with pytest.raises(CoordinatorUnreachable):
        proceed()
    wait_until(lambda: not coordinator.is_alive)
    (coordinator.folder / OPERATOR_FILE).unlink()
    coordinator.live()
    if side == "before":
        assert clients[0].run_state(RUN).members == ()
        proceed()
    for client in clients:
        assert sorted(client.result(RegistrationKey(RUN)).message.coverage) == ["A", "B"]
        client.close()
    coordinator.stop()
    with Store(coordinator.folder) as store:
        assert [event.detail for event in store.load_events("control")] == [{"action": "proceed"}]
        assert audit_log.first_break(store.load_log()) is None


# ------------------------------------------------------------------------------------------------------ random moments
@pytest.mark.parametrize(
    "kind", ["clear", pytest.param("masked", marks=pytest.mark.skipif(not FULL, reason="of the whole matrix"))]
)
def test_a_coordinator_that_is_killed_at_random_moments_of_uploads_and_aggregation(nursery, tmp_path, kind):
    """Every second death is aimed at an upload that has begun, or at a round that is complete."""
    num_rounds = 6
    expected = run_undisturbed(tmp_path / "undisturbed", num_rounds, shapes=LARGE, kind=kind)
    rng, hits, deaths = random.Random(20), Counter(), 0
    for number in range(100):
        (tmp_path / str(number)).mkdir()
        coordinator = MortalCoordinator(nursery, tmp_path / str(number) / "federation", num_rounds, kind)
        coordinator.live()
        sites = SitesInThreads(coordinator, shapes=LARGE)
        while not (sites.are_done or is_enough(deaths, hits)):
            hits[wait_for_moment(coordinator.folder, rng, sites)] += 1
            coordinator.kill()
            deaths += 1
            coordinator.live()
        sites.join(PATIENCE_S)
        wait_until(lambda: coordinator.is_over)  # noqa: B023 - called at once
        coordinator.stop()
        assert sites.digests == [expected.digest] * len(SITES)
        check_journal(coordinator.folder, expected)
        if is_enough(deaths, hits):
            break
    print(f"{deaths} deaths at random moments, aimed at {dict(hits)}, {number + 1} runs")
    assert is_enough(deaths, hits)


def is_enough(deaths: int, hits: Counter) -> bool:
    return deaths >= RANDOM_KILLS and bool(hits["upload"] and hits["aggregation"])


def wait_for_moment(folder: Path, rng: random.Random, sites: SitesInThreads) -> str:
    """Wait for a moment to strike at, and a random while longer."""
    aim = rng.choice(["upload", "aggregation", "anything"])
    deadline = time.monotonic() + 10.0
    while aim != "anything" and not is_moment(folder, aim) and not sites.are_done:
        if time.monotonic() > deadline:
            aim = "anything"
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, 0.3) if aim == "anything" else rng.choice((0.0, 0.003, 0.01)))
    return aim


def is_moment(folder: Path, aim: str) -> bool:
    """Tell whether an upload has begun, or a round is complete and has no result yet."""
    if aim == "upload":
        return any((folder / "incoming").iterdir())
    for round_folder in (folder / "gatherings" / "runs" / RUN / "rounds").glob("*"):
        names = {path.name.split(".")[0] for path in round_folder.glob("*.safetensors")}
        if names == set(SITES):
            return True
    return False


# --------------------------------------------------------------------------------------------------------------- sites
@pytest.mark.parametrize("kind", KINDS)
def test_sites_that_are_killed_come_back(nursery, tmp_path, kind):
    num_rounds = 10 * KILLS_PER_SITE + 4  # enough that the run does not end before the last kill
    expected = run_undisturbed(tmp_path / "undisturbed", num_rounds, kind=kind)
    coordinator = MortalCoordinator(nursery, tmp_path / "federation", num_rounds, kind)
    coordinator.live()
    coordinator.credentials()
    digests = {site: tmp_path / f"{site}.digest" for site in SITES}

    def start(site: str) -> int:
        number = SITES.index(site)
        return nursery.start(
            role="site",
            log=str(tmp_path / f"{site}.log"),
            digest=str(digests[site]),
            seed=number,
            credential=str(tmp_path / f"{site}.json"),
            num_rounds=num_rounds,
            pause_s=0.02,
            num_cases=number + 1,
        )

    pids = {site: start(site) for site in SITES}
    kills, rng = Counter(), random.Random(10)
    deadline = time.monotonic() + patience_for(num_rounds)
    while not all(path.exists() for path in digests.values()):
        assert time.monotonic() < deadline, (tmp_path / "A.log").read_text()[-1000:]
        alive = [site for site in SITES if kills[site] < KILLS_PER_SITE and not digests[site].exists()]
        time.sleep(rng.uniform(0.02, 0.25))
        if alive:
            site = min(alive, key=lambda one: (kills[one], rng.random()))
            if nursery.is_alive(pids[site]) and not digests[site].exists():
                nursery.kill(pids[site])
                wait_until(lambda: not nursery.is_alive(pids[site]))  # noqa: B023 - called at once
                kills[site] += 1
                pids[site] = start(site)
    coordinator.stop()
    print(f"sites killed {dict(kills)}")
    assert [path.read_text() for path in digests.values()] == [expected.digest] * len(SITES)
    assert min(kills[site] for site in SITES) >= (KILLS_PER_SITE if FULL else 1), kills
    check_journal(coordinator.folder, expected)
