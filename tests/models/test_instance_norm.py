import copy
import pickle

import pytest
import torch
from torch import nn

from nnunetv2.models.instance_norm import FastInstanceNorm3d, use_fast_instance_norm_


def make_network(dims):
    norm = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[dims](4, eps=1e-5, affine=True)
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    return nn.Sequential(norm)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_output_and_gradients_are_those_of_torch(dims):
    torch.manual_seed(0)
    theirs = make_network(dims)
    ours = use_fast_instance_norm_(copy.deepcopy(theirs))
    x = torch.randn(2, 4, *(6, 5, 7)[:dims]) * 3 + 1
    wanted, got = (network(x) for network in (theirs, ours))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    for output in (wanted, got):
        output.square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_networks_with_it_are_pickled_and_others_stay():
    network = nn.Sequential(nn.InstanceNorm3d(2), nn.InstanceNorm3d(2, track_running_stats=True), nn.BatchNorm3d(2))
    assert type(pickle.loads(pickle.dumps(use_fast_instance_norm_(network)))[0]) is FastInstanceNorm3d
    assert type(network[2]) is nn.BatchNorm3d
    network(torch.randn(1, 2, 3, 3, 3))
    assert network[1].running_mean.abs().sum() > 0  # still kept
