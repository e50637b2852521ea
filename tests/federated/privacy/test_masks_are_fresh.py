"""No mask is ever made twice: not in two runs or folds, nor when a run is registered again, reset or restored."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections import Counter
from dataclasses import replace

import pytest
from fake_federation import RUN, in_threads, make_client, outcomes_in_threads, served, wait_until
from masked_sites import THREE, MaskedSite, masked_settings

from nnunetv2.federated.coordinator.members import Member
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.privacy.secure_aggregation import protocol
from nnunetv2.federated.protocol import api, messages
from nnunetv2.federated.protocol.keys import UploadKey
from nnunetv2.federated.site.masked_run import START_ANEW_VARIABLE

OPERATOR = Member("boss", "operator")
OTHER_FOLD = RUN.replace("fold_0", "fold_1")


class Log:
    """The digests of all seeds that sites have made, and of the contexts that they are for."""

    def __init__(self, monkeypatch) -> None:
        self.seeds: list[tuple[str, str]] = []
        """(site, digest), one entry each time a site has made a seed."""
        self._lock = threading.Lock()
        share_keys = protocol.share_keys

        def logged(cohort, site, private_key, lanes, common):
            shared = share_keys(cohort, site, private_key, lanes, common)
            with self._lock:
                self.seeds += [(site, hashlib.sha256(seed).hexdigest()) for seed in shared.seeds.values()]
            return shared

        monkeypatch.setattr(protocol, "share_keys", logged)

    def check(self, at_least: int) -> None:
        """Fail if a site has made one seed twice, or two sites have made one that is not of their pair."""
        assert len(self.seeds) >= at_least, len(self.seeds)
        made = Counter(self.seeds)
        assert max(made.values()) == 1, "a site has made the same mask twice"
        assert max(Counter(digest for _, digest in made).values()) == 2, "a mask belongs to more than two sites"


@pytest.fixture
def log(monkeypatch) -> Log:
    return Log(monkeypatch)


class World:
    """A federation in a folder, whose sites come and go; their files stay."""

    def __init__(self, folder, names=THREE, **settings) -> None:
        self.folder, self.names = folder / "federation", names
        self.settings = masked_settings(names, validate_every=0, **settings)
        self._credentials: dict[str, object] = {}

    def serve(self, folder=None):
        return served(folder or self.folder, self.settings)

    def site(self, federation, name: str, *, run: str = RUN) -> MaskedSite:
        """Return a new process of a site."""
        if name not in self._credentials:
            self._credentials[name] = federation.credential(name)
        client = make_client(replace(self._credentials[name], url=federation.url))
        file = self.folder / f"credential.{name}.json"
        site = MaskedSite(client, client.credential, file, seed=self.names.index(name))
        site.participant.run = run
        site.registration = site.registration.model_copy(update={"fold": run.split("fold_")[1][0]})
        return site

    def play(self, federation, *, rounds: int, run: str = RUN, names=None, anew: bool = False) -> None:
        """Let sites, each a new process, go on to a round."""

        def go(site: MaskedSite) -> None:
            site.register()
            position = site.start()
            weights, number = position.weights, position.epoch
            while number < rounds:
                weights, aggregate = site.round(number, weights)
                number = aggregate.round + 1

        sites = [self.site(federation, name, run=run) for name in names or self.names]
        with pytest.MonkeyPatch.context() as environment:
            if anew:
                environment.setenv(START_ANEW_VARIABLE, run)
            ends = in_threads(*(lambda site=site: go(site) for site in sites))
        assert ends == [None] * len(ends), ends


@pytest.mark.slow
def test_two_folds_and_sites_that_come_back_make_other_masks(tmp_path, log):
    world = World(tmp_path, num_epochs=4)
    with world.serve() as federation:
        world.play(federation, rounds=2)
        world.play(federation, rounds=2, run=OTHER_FOLD)
        world.play(federation, rounds=4)  # all sites have ended, and go on with --c
        world.play(federation, rounds=4, run=OTHER_FOLD, anew=True)  # a person who starts without --c
    log.check(at_least=8 * 3 * 3)


@pytest.mark.slow
def test_a_run_that_was_reset_makes_other_masks(tmp_path, log):
    world = World(tmp_path)
    with world.serve() as federation:
        sites = [world.site(federation, name) for name in THREE]
        in_threads(*(lambda site=site: (site.register(), site.start()) for site in sites))

        def reset() -> None:
            wait_until(lambda: len(held(federation)) == 2)
            federation.coordinator.act(RUN, api.RunAction(action="reset"), OPERATOR)
            for site in sites:
                site.participant.transport.close()

        *ends, _ = outcomes_in_threads(
            *(lambda site=site: site.round(0, site.position.weights) for site in sites[:2]), reset
        )
        assert not any(isinstance(one, tuple) for one in ends), ends
        before = len(log.seeds)
        again = world.site(federation, "A")
        with pytest.raises(RefusedError) as refused:  # a person is to say that the run begins anew
            again.register()
        assert refused.value.code == "run_began_anew"
        world.play(federation, rounds=2, anew=True)
    log.check(at_least=before + 2 * 3 * 3)


def held(federation) -> dict:
    exchange = federation.state.registry.get(UploadKey(RUN, 0))
    return {} if exchange is None else dict(exchange.contributions)


@pytest.mark.slow
def test_a_restored_coordinator_whose_run_is_reset_gets_other_masks(tmp_path, log):
    world = World(tmp_path)
    with world.serve() as federation:
        sites = [world.site(federation, name) for name in THREE]
        in_threads(*(lambda site=site: (site.register(), site.start()) for site in sites))
    shutil.copytree(world.folder, tmp_path / "restored")
    with world.serve() as federation:
        world.play(federation, rounds=3)
    before = len(log.seeds)
    with world.serve(tmp_path / "restored") as federation:
        federation.coordinator.act(RUN, api.RunAction(action="reset"), OPERATOR)
        world.play(federation, rounds=3, anew=True)
    assert len(log.seeds) >= before + 3 * 3 * 3
    log.check(at_least=before)


@pytest.mark.slow
def test_a_site_that_was_admitted_late_makes_other_masks_when_it_comes_back(tmp_path, log):
    world = World(tmp_path, names=("A", "B", "C", "D"), num_epochs=6)
    with world.serve() as federation:
        federation.coordinator.revoke("D", by="boss")
        world.play(federation, rounds=1, names=THREE)
        federation.coordinator.invite("D", "site", by="boss")
        world.play(federation, rounds=3)
        world.play(federation, rounds=5)
        aggregate = last(federation)
    assert set(aggregate.contributors) == set("ABCD")
    log.check(at_least=3 * 3 * 3 + 2 * 4 * 4)


def last(federation) -> messages.Aggregate:
    exchange = federation.state.registry.latest_round(RUN)
    with federation.state.documents.result(exchange.key) as document:
        return document.message


@pytest.mark.slow
def test_a_site_that_was_revoked_and_invited_again_goes_on_with_other_masks(tmp_path, log):
    world = World(tmp_path, names=("A", "B", "C", "D"), num_epochs=6)
    with world.serve() as federation:
        world.play(federation, rounds=1)
        federation.coordinator.revoke("D", by="boss")
        world.play(federation, rounds=2, names=THREE)
        federation.coordinator.invite("D", "site", by="boss")
        del world._credentials["D"], federation._credentials["D"]
        world.play(federation, rounds=5)
        aggregate = last(federation)
    assert set(aggregate.contributors) == set("ABCD")
    log.check(at_least=3 * 4 * 4)
