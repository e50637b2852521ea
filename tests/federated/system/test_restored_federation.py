"""The operator's guide on backups, step by step: what sites meet when the coordinator is as it was some rounds ago."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from fake_federation import RUN, in_threads, make_client, make_registration, make_settings, make_weights, served, train

from nnunetv2.federated.coordinator.storage import backup
from nnunetv2.federated.errors import FederationError, RefusedError
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.keys import RoundKey
from nnunetv2.federated.site.participant import Participant

NUM_ROUNDS = 6
SITES = ("A", "B")


@pytest.fixture
def credentials():
    """Return the credentials of all sites, known once they have joined."""
    return {}


def train_until(folder, credentials, num_rounds: int) -> str:
    """Serve a folder while all sites train up to a round; return the digest of the last aggregate."""
    with served(folder, make_settings(num_epochs=NUM_ROUNDS)) as federation:
        for site in SITES:
            known = credentials.get(site) or federation.credential(site)
            credentials[site] = replace(known, url=federation.url)
        clients = [make_client(credentials[site]) for site in SITES]
        digests = in_threads(
            *[
                lambda client=client, seed=seed: train(client, seed=seed, num_rounds=num_rounds)
                for seed, client in enumerate(clients)
            ]
        )
        for client in clients:
            client.close()
    assert len(set(digests)) == 1, digests
    return digests[0]


def copy_cold(folder, tmp_path):
    """Copy the folder of a coordinator that has stopped, as `tar` or `cp` do."""
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def save_and_restore(folder, tmp_path):
    """Use the commands."""
    backup.backup(folder, tmp_path / "federation.tar")
    backup.restore(tmp_path / "federation.tar", tmp_path / "restored")
    return tmp_path / "restored"


@pytest.mark.parametrize("procedure", [copy_cold, save_and_restore])
def test_a_restored_federation_ends_as_the_undisturbed_one(tmp_path, credentials, procedure):
    folder = tmp_path / "federation"
    train_until(folder, credentials, 2)
    kept = procedure(folder, tmp_path)
    undisturbed = train_until(folder, credentials, NUM_ROUNDS)
    shutil.rmtree(folder)
    kept.rename(folder)
    assert train_until(folder, credentials, NUM_ROUNDS) == undisturbed


def test_sites_that_are_ahead_of_a_restored_federation_are_told_so_and_can_begin_anew(tmp_path, credentials):
    folder = tmp_path / "federation"
    train_until(folder, credentials, 2)
    kept = copy_cold(folder, tmp_path)
    train_until(folder, credentials, 5)
    shutil.rmtree(folder)
    kept.rename(folder)
    with (
        served(folder, make_settings()) as federation,
        make_client(replace(credentials["A"], url=federation.url)) as client,
    ):
        with pytest.raises(RefusedError, match="cannot begin before"):
            client.exchange(RoundKey(RUN, 5), messages.Update(), make_weights(0))
        session = Participant(client, site="A", run=RUN)
        session.register(make_registration())
        weights = {name: np.array(values) for name, values in make_weights(0).items()}
        with pytest.raises(FederationError, match="comes from another federation, or .* Start without --c"):
            session.start(5, weights)
        assert session.start(3, weights).epoch == 2  # one round ahead: --c
        assert session.start(0, weights).epoch == 2  # without --c
