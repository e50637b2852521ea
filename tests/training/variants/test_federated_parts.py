"""The parts of methods for sites that differ, one by one."""

import pytest
import torch
from torch import nn

from nnunetv2.federated.errors import FederationError
from nnunetv2.training.nnUNetTrainer.variants.federated.local_tensors import find_local_tensors
from nnunetv2.training.nnUNetTrainer.variants.federated.proximal import ProximalTerm
from nnunetv2.training.optimization import build_sgd

CPU = torch.device("cpu")


@pytest.mark.parametrize("make", [lambda network: build_sgd(network, initial_lr=0.5, weight_decay=0, device=CPU), None])
def test_each_step_is_pulled_towards_where_the_round_began(make):
    network = nn.Linear(2, 1, bias=False)
    optimizer = make(network) if make else torch.optim.SGD(network.parameters(), lr=0.5)
    optimizer.param_groups[0]["momentum"], optimizer.param_groups[0]["nesterov"] = 0, False
    term = ProximalTerm(0.1)
    term.anchor(network.parameters())
    start = network.weight.detach().clone()
    term.attach_(optimizer), term.attach_(optimizer)
    with torch.no_grad():
        network.weight += 2
    network.weight.grad = torch.ones_like(network.weight)
    optimizer.step()
    assert torch.allclose(network.weight, start + 2 - 0.5 * (1 + 0.1 * 2))
    term.anchor(network.parameters())
    network.weight.grad = torch.zeros_like(network.weight)
    optimizer.step()
    assert torch.allclose(network.weight, start + 2 - 0.5 * (1 + 0.1 * 2))


def test_a_parameter_that_is_not_shared_or_has_no_gradient_is_left_alone():
    network = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    term = ProximalTerm(1.0)
    term.anchor([network.weight])
    term.attach_(optimizer)
    with torch.no_grad():
        network.weight += 1
        network.bias += 1
    before = network.bias.detach().clone(), network.weight.detach().clone()
    network.bias.grad = torch.zeros_like(network.bias)
    optimizer.step()
    assert torch.equal(network.bias, before[0]) and torch.equal(network.weight, before[1])


class ConvNorm(nn.Sequential):
    """A block named after what is in it."""


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = ConvNorm(nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2, affine=True))
        self.decoder = nn.Module()
        self.decoder.encoder = self.encoder
        self.decoder.stage = nn.Conv2d(2, 2, 3)
        self.decoder.seg_layers = nn.ModuleList([nn.Conv2d(2, 3, 1)])


SHARED = {
    "encoder.0.weight",
    "encoder.0.bias",
    "encoder.1.weight",
    "encoder.1.bias",
    "decoder.stage.weight",
    "decoder.stage.bias",
    "decoder.seg_layers.0.weight",
    "decoder.seg_layers.0.bias",
}


@pytest.mark.parametrize(
    ("what", "kept"),
    [
        ("norm", {"encoder.1.weight", "encoder.1.bias"}),
        ("head", {"decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias"}),
        ("decoder", {name for name in SHARED if name.startswith("decoder.")}),
        ("encoder.?.bias", {"encoder.0.bias", "encoder.1.bias"}),
        ("encoder.0", {"encoder.0.weight", "encoder.0.bias"}),
    ],
)
def test_tensors_are_meant_by_their_part_or_their_name(what, kept):
    assert find_local_tensors(Network(), what, SHARED) == kept


@pytest.mark.parametrize(
    ("what", "complaint"), [("encode", "none of the tensors.*for example decoder"), ("*", "and nothing is left")]
)
def test_tensors_that_nobody_or_everybody_means_are_refused(what, complaint):
    with pytest.raises(FederationError, match=complaint):
        find_local_tensors(Network(), what, SHARED)
