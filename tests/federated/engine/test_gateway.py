"""The gateway at a site: its credential, and who may ask."""

from __future__ import annotations

import json
import stat
import time

import pytest
import requests
from fake_engine import FakeChannel
from fake_federation import in_threads, make_census, make_client, make_settings, served, train
from masked_sites import MaskedSite, masked_settings
from patience import PATIENCE_S

from nnunetv2.federated.commands.join import main as join_command
from nnunetv2.federated.coordinator.members import create_federation
from nnunetv2.federated.coordinator.service import Coordinator
from nnunetv2.federated.coordinator.storage.store import Store
from nnunetv2.federated.engine.gateway import Gateway
from nnunetv2.federated.engine.responder import Responder
from nnunetv2.federated.errors import FederationError, NotAllowedError
from nnunetv2.federated.protocol.invitation import Invitation, encode_invitation
from nnunetv2.federated.protocol.keys import CensusKey
from nnunetv2.federated.site.credential import load_credential, save_credential


@pytest.fixture
def engine(tmp_path):
    """Return a function that opens the gateway of a site."""
    with Store(tmp_path / "federation") as store:
        create_federation(store, make_settings(), now=time.time(), membership="engine")
        yield from _gateways(tmp_path, store)


@pytest.fixture
def secure_engine(tmp_path):
    with Store(tmp_path / "federation") as store:
        create_federation(store, masked_settings(), now=time.time(), membership="engine")
        yield from _gateways(tmp_path, store)


def _gateways(folder, store):
    coordinator = Coordinator(store, log=lambda line: None)
    coordinator.start()
    responder = Responder(coordinator)
    gateways = []

    def open_gateway(site: str) -> tuple[Gateway, FakeChannel]:
        channel = FakeChannel(responder, site)
        gateway = Gateway(
            channel,
            site=site,
            through="nvflare:network/test",
            credential=folder / site / "federated_site.json",
            folder=folder / site / "under_way",
        )
        gateways.append(gateway)
        coordinator.notifier.subscribe(gateway.notify)
        return gateway, channel

    open_gateway.coordinator = coordinator
    yield open_gateway
    for gateway in gateways:
        gateway.stop()
    responder.close()
    coordinator.stop()


def test_sites_train_through_their_gateways(engine):
    gateways = {site: engine(site)[0] for site in ("A", "B")}
    credentials = {site: gateway.start() for site, gateway in gateways.items()}
    clients = {site: make_client(credential) for site, credential in credentials.items()}
    digests = in_threads(
        *(lambda s=site, n=seed: train(clients[s], seed=n, num_rounds=3) for seed, site in enumerate("AB"))
    )
    assert digests[0] == digests[1] and isinstance(digests[0], str)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_weights_travel_through_gateways_as_they_do_over_http(engine, tmp_path, precision):
    settings = make_settings(precision=precision)
    engine.coordinator.state._use_settings(settings)
    credentials = {site: engine(site)[0].start() for site in "AB"}
    assert {one.precision for one in credentials.values()} == {precision}

    def play(credentials, files):
        sites = [
            MaskedSite(make_client(credentials[site]), credentials[site], files[site], seed=seed)
            for seed, site in enumerate("AB")
        ]
        return in_threads(*(lambda site=site: site.train(3) for site in sites))

    through = play(credentials, {site: tmp_path / site / "federated_site.json" for site in "AB"})
    with served(tmp_path / "http" / "federation", settings) as federation:
        credentials = {site: federation.credential(site) for site in "AB"}
        over_http = play(credentials, {site: federation.credential_file(site) for site in "AB"})
    assert through == over_http and len(set(through)) == 1 and isinstance(through[0], str)


@pytest.mark.slow
@pytest.mark.parametrize(("coordinator", "may"), [("nvflare:network/test", True), ("nvflare:network/other", False)])
def test_an_allow_list_is_bound_to_the_federation_and_not_to_a_port(engine, tmp_path, monkeypatch, coordinator, may):
    documents = {"census": {"fields": ["*"]}}
    path = tmp_path / "allow.json"
    path.write_text(json.dumps({"version": 1, "coordinator": coordinator, "documents": documents}))
    monkeypatch.setenv("nnUNet_fed_allow", str(path))
    for _ in range(2):  # a port for each job
        client = make_client(engine("A")[0].start())
        if may:
            client.contribute(CensusKey(), make_census())
        else:
            with pytest.raises(NotAllowedError, match=f"sending anything to nvflare:network/test.*for {coordinator}"):
                client.contribute(CensusKey(), make_census())


def test_a_credential_is_private_good_for_one_job_and_gone_after_it(engine, tmp_path):
    gateway, _ = engine("A")
    credential = gateway.start()
    file = tmp_path / "A" / "federated_site.json"
    assert load_credential(file) == credential and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert credential.url.startswith("http://127.0.0.1:") and credential.coordinator == "nvflare:network/test"
    other = engine("B")[0].start()
    for token, status in ((credential.token, 200), (other.token, 401), ("A.wrong", 401)):
        answer = requests.get(
            f"{credential.url}/v1/settings", headers={"Authorization": f"Bearer {token}"}, timeout=PATIENCE_S
        )
        assert answer.status_code == status
    again, _ = engine("A")
    newer = again.start()
    assert newer.token != credential.token
    gateway.stop()
    assert load_credential(file) == newer, "the credential of a newer job stays"
    again.stop()
    assert not file.exists()


def test_a_gateway_whose_engine_is_away_says_so(engine, monkeypatch):
    from nnunetv2.federated.engine import remote

    gateway, channel = engine("A")
    credential = gateway.start()
    gateway.remote._away_s = 0.2
    channel.is_away = True
    answer = requests.get(
        f"{credential.url}/v1/settings", headers={"Authorization": f"Bearer {credential.token}"}, timeout=PATIENCE_S
    )
    assert (answer.status_code, answer.json()["code"]) == (503, "coordinator_trouble")
    assert "the engine does not reach the coordinator" in answer.json()["message"]
    assert remote.AWAY_S == 10.0


def test_a_site_that_is_connected_through_an_engine_has_nothing_to_join(engine, tmp_path, monkeypatch):
    credential = engine("A")[0].start()
    monkeypatch.setenv("nnUNet_fed_site", str(tmp_path / "A" / "federated_site.json"))
    word = encode_invitation(Invitation("http://127.0.0.1:1", "test", "A", "secret"))
    for options in ([], ["--replace"]):
        with pytest.raises(
            FederationError, match=r"connected through NVFlare \(nvflare:network/test\): nothing to join"
        ):
            join_command([word, *options])
    assert load_credential(tmp_path / "A" / "federated_site.json") == credential


def test_the_credential_of_another_federation_is_not_overwritten(engine, tmp_path):
    from nnunetv2.federated.site.credential import SiteCredential

    file = tmp_path / "A" / "federated_site.json"
    save_credential(SiteCredential("https://c.example", "other", "A", "A.token"), file)
    with pytest.raises(FederationError, match="holds the credential of another federation"):
        engine("A")[0].start()
    assert load_credential(file).federation == "other"


def test_a_site_that_requires_secure_sums_opens_no_gateway_to_others(engine, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_fed_require_secure", "3")
    with pytest.raises(NotAllowedError):
        engine("A")[0].start()
    assert not (tmp_path / "A" / "federated_site.json").exists()


def test_an_identity_is_told_once_and_stays_for_the_next_job(secure_engine, tmp_path):
    credential = secure_engine("A")[0].start()
    assert credential.secure == 3
    told = secure_engine.coordinator.roster().sites
    assert told.keys() == {"A"}
    secure_engine("A")[0].start()
    assert secure_engine.coordinator.roster().sites == told
    assert (tmp_path / "A" / "federated_site.json.identity.pem").exists()
