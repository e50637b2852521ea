"""A site's part in masked runs: what it has to know, and what it leaves behind."""

from __future__ import annotations

import pytest
from fake_federation import RUN, in_threads, make_client, make_weights, served
from masked_sites import THREE, MaskedSite, masked_settings, masked_site

from nnunetv2.federated.coordinator.members import Member
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.exchanges.steps import step_of
from nnunetv2.federated.protocol import api
from nnunetv2.federated.protocol.keys import RoundKey, UploadKey
from nnunetv2.federated.protocol.rounds import Rounds
from nnunetv2.federated.site.credential import load_credential
from nnunetv2.federated.site.enrolment import join
from nnunetv2.federated.site.identity import identity_path


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_site_that_returns_within_a_round_of_several_epochs_takes_part_in_it(tmp_path, precision):
    settings = masked_settings(THREE, validate_every=0, num_epochs=6, exchange_every=3, precision=precision)
    with served(tmp_path / "federation", settings) as federation:
        sites = [masked_site(federation, name, seed=seed) for seed, name in enumerate(THREE)]
        weights = in_threads(*(site.join for site in sites))[0]
        results = in_threads(*(lambda site=site: site.round(0, weights) for site in sites))
        assert all(isinstance(one, tuple) for one in results), results
        again = masked_site(federation, "A", seed=0)
        again.register()
        position = again.participant.start(4, make_weights(0), rounds=Rounds(3))
        assert (position.epoch, position.is_within) == (4, True)
        start = results[0][0]
        results = in_threads(*(lambda site=site: site.round(1, start) for site in (again, *sites[1:])))
        assert all(isinstance(one, tuple) for one in results), results
        assert sorted(results[0][1].contributors) == list(THREE)


def key_files(federation, site: str) -> list:
    folder = federation.credential_file(site).with_name(f"credential.{site}.json.secure")
    return list(folder.rglob("*.pem"))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"num_epochs": 2}, {"num_epochs": 5, "exchange_every": 3}])
def test_the_keys_of_a_run_that_is_over_are_gone(tmp_path, settings):
    with served(tmp_path / "federation", masked_settings(THREE, validate_every=0, **settings)) as federation:
        sites = [masked_site(federation, name, seed=seed) for seed, name in enumerate(THREE)]
        ends = in_threads(*(lambda site=site: site.train(2) for site in sites))
        assert len(set(ends)) == 1, ends
        assert [key_files(federation, name) for name in THREE] == [[], [], []]


def test_a_site_that_was_ended_after_the_last_round_forgets_the_keys_when_it_returns(tmp_path):
    with served(tmp_path / "federation", masked_settings(THREE, validate_every=0, num_epochs=1)) as federation:
        sites = [masked_site(federation, name, seed=seed) for seed, name in enumerate(THREE)]
        weights = in_threads(*(site.join for site in sites))[0]
        in_threads(*(lambda site=site: site.round(0, weights) for site in sites))
        assert key_files(federation, "A")
        again = masked_site(federation, "A", seed=0)
        again.register()
        assert again.start().is_over
        assert not key_files(federation, "A")


def test_a_site_whose_run_key_was_lost_says_so_before_it_masks_anything(tmp_path):
    with served(tmp_path / "federation", masked_settings(THREE, validate_every=0)) as federation:
        sites = [masked_site(federation, name, seed=seed) for seed, name in enumerate(THREE)]
        in_threads(*(site.join for site in sites))
        for path in key_files(federation, "A"):
            path.unlink()
        again = masked_site(federation, "A", seed=0)
        with pytest.raises(RefusedError, match="no longer here, and the others know no other one") as info:
            again.register()
        assert info.value.code == "run_key_lost"
        assert not key_files(federation, "A")


def test_a_site_that_has_joined_anew_cannot_come_back_to_a_run_that_masks_for_its_old_identity(tmp_path):
    with served(tmp_path / "federation", masked_settings((*THREE, "D"), validate_every=0)) as federation:
        sites = [masked_site(federation, name, seed=seed) for seed, name in enumerate((*THREE, "D"))]
        in_threads(*(site.join for site in sites))
        file = federation.credential_file("A")
        identity_path(file).unlink()
        federation.coordinator.invite("A", "site", by="boss")
        join(federation.invitation("A"), path=file, replace=True)
        credential = load_credential(file)
        again = MaskedSite(make_client(credential), credential, file, seed=0)
        with pytest.raises(RefusedError, match="with another identity than it has registered with") as info:
            again.register()
        assert "Bring back" in str(info.value)


def test_a_stopped_run_whose_keys_are_gone_is_not_resumed(tmp_path):
    with served(tmp_path / "federation", masked_settings(THREE, validate_every=0)) as federation:
        sites = [masked_site(federation, name, seed=seed) for seed, name in enumerate(THREE)]
        weights = in_threads(*(site.join for site in sites))[0]
        in_threads(*(lambda site=site: site.round(0, weights) for site in sites))
        operator = Member("boss", "operator")
        for action in ("pause", "resume", "stop"):
            federation.coordinator.act(RUN, api.RunAction(action=action), operator)
        with pytest.raises(RefusedError, match="sites have deleted the keys"):
            federation.coordinator.act(RUN, api.RunAction(action="resume"), operator)
        assert federation.state.registry.run_state(RUN).state == "stopped"


def test_a_run_has_as_many_masked_rounds_as_rounds():
    settings = masked_settings(THREE, validate_every=0, num_epochs=6, exchange_every=3)
    for step_key in (UploadKey(RUN, 2), RoundKey(RUN, 2)):
        with pytest.raises(RefusedError, match="the run has 2 rounds"):
            step_of(step_key).check_may_begin(step_key, settings)
    step_of(UploadKey(RUN, 1)).check_may_begin(UploadKey(RUN, 1), settings)
