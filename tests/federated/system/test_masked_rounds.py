"""Masked rounds over real HTTP: the mean is right, nobody sees an update, and runs outlast sites that drop out."""

from __future__ import annotations

import numpy as np
import pytest
from fake_federation import RUN, in_threads, make_weights, served
from masked_sites import FIVE, THREE, digest_of, masked_settings, masked_site

from nnunetv2.federated.protocol.keys import RoundKey


def expected_mean(sites, start, number):
    """Return what a plain weighted mean would be: names -> float64."""
    total = sum(site.registration.num_training_cases for site in sites)
    trained = [(site.registration.num_training_cases, site.epoch(number, start)) for site in sites]
    return {name: sum(cases * weights[name].astype(np.float64) for cases, weights in trained) / total for name in start}


@pytest.mark.parametrize("names", [THREE, FIVE])
def test_masked_rounds_give_the_weighted_mean(tmp_path, names):
    with served(tmp_path / "federation", masked_settings(names)) as federation:
        sites = [masked_site(federation, name, seed=seed) for seed, name in enumerate(names)]
        digests = in_threads(*(lambda site=site: site.train(3) for site in sites))
        assert len(set(digests)) == 1, digests
        start = make_weights(len(names) - 1)  # the site with most cases owns all tensors
        for number in range(3):
            start = {name: mean.astype(np.float32) for name, mean in expected_mean(sites, start, number).items()}
        with federation.state.documents.result(RoundKey(RUN, 2)) as document:
            for name, values in start.items():
                np.testing.assert_allclose(document.read(name), values, rtol=1e-5, atol=1e-6)
            assert document.message.contributors == dict.fromkeys(names, 1.0)
            assert digest_of({name: document.read(name) for name in start}) == digests[0]
        records = federation.state.store.load_rounds(RUN)
        assert [record["pooled"]["conspicuous"] for record in records] == [0, 0, 0]
        assert federation.state.store.load_last_validation(RUN)["round"] == 2
