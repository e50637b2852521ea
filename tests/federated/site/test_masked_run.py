"""A site's part in masked runs: what it has to know, and what it leaves behind."""

from __future__ import annotations

import pytest
from fake_federation import RUN, in_threads, make_weights, served
from masked_sites import THREE, masked_settings, masked_site

from nnunetv2.federated.protocol.rounds import Rounds


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
        own = make_weights(0)
        position = again.participant.start(4, own, rounds=Rounds(3))
        assert position.epoch == 4 and all((position.weights[name] == own[name]).all() for name in own)
        start = results[0][0]
        results = in_threads(*(lambda site=site: site.round(1, start) for site in (again, *sites[1:])))
        assert all(isinstance(one, tuple) for one in results), results
        assert sorted(results[0][1].contributors) == list(THREE)
