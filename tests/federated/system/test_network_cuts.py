"""Cut the network between sites and coordinator, in every way a network has: the result stays the same to the bit.

With updates in clear and with masked ones.

NNUNET_FED_MATRIX=full cuts it 10 times for 60 s; without it, the cuts take a second or two.
"""

from __future__ import annotations

import os
import random
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from bad_network import TROUBLES, BadNetwork
from fake_federation import RUN, in_threads, make_client, make_settings, served, train, wait_until
from masked_sites import MaskedSite, masked_settings
from patience import PATIENCE_S

import nnunetv2.federated.site.transports.http as client_module
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.keys import RegistrationKey, RoundKey

FULL = os.environ.get("NNUNET_FED_MATRIX") == "full"
SITES = ("A", "B", "C")
NUM_ROUNDS = 150 if FULL else 18
CUT_S = 60.0 if FULL else 1.0
CUTS = TROUBLES * 2
PAUSE_S = 1.0 if FULL else 0.1
GOOD_S = (5.0, 20.0) if FULL else (0.05, 0.4)
"""How long the network is good between two cuts."""
SHAPES = {"encoder.weight": (512, 1024), "encoder.bias": (512,), "head.weight": (64, 512)}
"""Two MiB: uploads that can break, and that go on where they broke."""


@dataclass(frozen=True)
class Ends:
    """What a run in which nothing goes wrong ends with."""

    kind: str
    digest: str
    """Of each site,"""
    aggregate: str
    """and the SHA-256 of the last aggregate."""


def settings_of(kind: str) -> FederationSettings:
    """Return the settings of a federation of this kind."""
    if kind == "masked":
        return masked_settings(SITES, num_epochs=NUM_ROUNDS, validate_every=0)
    return make_settings(sites=SITES, num_epochs=NUM_ROUNDS)


def take_part(client, number: int, file: Path, pause_s: float) -> str:
    if client.credential.secure is None:
        return train(client, seed=number, num_rounds=NUM_ROUNDS, num_cases=number + 1, pause_s=pause_s, shapes=SHAPES)
    site = MaskedSite(client, client.credential, file, seed=number, shapes=SHAPES)
    site.pause_s = pause_s
    return site.train(NUM_ROUNDS)


def run_all(federation, clients, pause_s: float = 0.0) -> list[object]:
    files = [federation.credential_file(client.credential.site) for client in clients]
    try:
        return in_threads(
            *(
                lambda c=client, n=number, f=file: take_part(c, n, f, pause_s)
                for number, (client, file) in enumerate(zip(clients, files, strict=True))
            ),
            timeout_s=CUT_S * 2 * len(CUTS) + PATIENCE_S,
        )
    finally:
        for client in clients:
            client.close()


@pytest.fixture(scope="module", params=["clear", "masked"])
def undisturbed(request, tmp_path_factory) -> Ends:
    with served(tmp_path_factory.mktemp("undisturbed") / "federation", settings_of(request.param)) as federation:
        first, *others = run_all(federation, [federation.client(site) for site in SITES])
        aggregate = federation.state.store.load_result_digest(RoundKey(RUN, NUM_ROUNDS - 1))
    assert others == [first, first]
    return Ends(request.param, first, aggregate)


@pytest.mark.timeout(CUT_S * 30 + 600)
def test_a_run_survives_ten_cuts_of_every_kind(tmp_path, undisturbed, monkeypatch):
    if not FULL:
        monkeypatch.setattr(client_module, "POLL_S", 0.5)
    monkeypatch.setattr(client_module, "LONGEST_PAUSE_S", CUT_S / 10)  # be there when the network is good
    with served(tmp_path / "federation", settings_of(undisturbed.kind)) as federation:
        network = BadNetwork(int(federation.url.rpartition(":")[2]), seed=3)
        clients = [
            make_client(
                replace(federation.credential(site), url=f"http://127.0.0.1:{network.port}"),
                give_up_after_s=600.0,
                timeout_s=30.0 if FULL else 1.5,
            )
            for site in SITES
        ]
        digests: list[object] = []
        sites = threading.Thread(
            target=lambda: digests.extend(run_all(federation, clients, pause_s=PAUSE_S)), daemon=True
        )
        sites.start()
        cuts, rng = 0, random.Random(5)
        for trouble in CUTS:
            time.sleep(rng.uniform(*GOOD_S))
            cuts += sites.is_alive()
            hits = network.hits[trouble]
            network.set_trouble(trouble)
            time.sleep(CUT_S)
            wait_until(lambda: network.hits[trouble] > hits or not sites.is_alive())  # noqa: B023 - called at once
            network.set_trouble(None)
        sites.join(CUT_S * 15 + PATIENCE_S)
        assert not sites.is_alive(), "the sites hang"
        network.close()
        print(f"{undisturbed.kind}: {cuts} cuts of {CUT_S:g} s: {dict(network.hits)}")
        assert digests == [undisturbed.digest] * len(SITES)
        store = federation.state.store
        assert store.load_result_digest(RoundKey(RUN, NUM_ROUNDS - 1)) == undisturbed.aggregate
        contributions = [(event.site, event.key) for event in store.load_events("contribution")]
        per_round = 3 if undisturbed.kind == "masked" else 1
        assert len(contributions) == len(set(contributions)) == len(SITES) * (per_round * NUM_ROUNDS + 2)
        assert (SITES[0], RegistrationKey(RUN)) in contributions
        assert set(network.hits) == set(TROUBLES) and cuts >= (10 if FULL else 6)
