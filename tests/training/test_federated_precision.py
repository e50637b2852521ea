"""Whole trainers in a federation whose weights travel in half precision."""

from __future__ import annotations

import numpy as np
import pytest
from federated_sites import assert_equal_weights, run_of, weights_of

from nnunetv2.federated.protocol.keys import RoundKey
from nnunetv2.training.nnUNetTrainer.variants.federated.nnUNetTrainerFedAvg import (
    nnUNetTrainerAsymFedAvg,
    nnUNetTrainerAsymFedAvgOverlapped,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("trainer_class", [nnUNetTrainerAsymFedAvg, nnUNetTrainerAsymFedAvgOverlapped])
def test_sites_end_with_the_rounding_of_what_the_coordinator_keeps(make_sites, trainer_class):
    sites = make_sites(precision="float16")
    trainers = [sites.trainer("A", trainer_class), sites.trainer("B", trainer_class)]
    assert sites.run(*trainers) == [None, None]
    assert_equal_weights(*trainers)
    with sites.federation.state.documents.result(RoundKey(run_of(trainers[0]), 2)) as kept:
        ends = weights_of(trainers[0])
        for name in kept.specs:
            assert ends[name].dtype == np.float32
            np.testing.assert_array_equal(ends[name], kept.read(name).astype(np.float16))
