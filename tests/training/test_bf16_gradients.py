"""Tests of the check that keeps trainings on a CPU in float32 where bfloat16 would give wrong gradients."""

import pytest
import torch
from tiny_dataset import make_dataset_json, make_plans
from torch import nn
from torch.nn import functional

from nnunetv2.training.bf16_gradients import describe_wrong_gradients
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


@pytest.mark.parametrize(
    ("kernel", "depth", "is_wrong"),
    [(3, 1, False), (3, 2, True), (3, 3, False), (5, 4, True), (5, 5, False), ((1, 3, 3), 2, False)],
)
def test_inputs_shorter_than_the_kernel_are_found(kernel, depth, is_wrong):
    network = nn.Sequential(nn.Conv3d(1, 1, 1), nn.Conv3d(1, 2, kernel, padding="same"))
    found = describe_wrong_gradients(network, torch.zeros(1, 1, depth, 6, 7))
    assert (found is not None) == is_wrong
    assert found is None or f"on {depth} x 6 x 7 voxels" in found


def test_transposed_and_functional_convolutions_are_found():
    class Functional(nn.Module):
        def forward(self, values):
            return functional.conv3d(weight=torch.ones(1, 1, 3, 1, 1), input=values, padding=1)

    image = torch.zeros(1, 1, 2, 6, 7)
    assert describe_wrong_gradients(Functional(), image) == "kernel 3 x 1 x 1 on 2 x 6 x 7 voxels"
    assert describe_wrong_gradients(nn.ConvTranspose3d(1, 1, 3), image) is not None
    assert describe_wrong_gradients(nn.ConvTranspose3d(1, 1, 2, 2), image) is None


def test_pictures_are_not_concerned():
    assert describe_wrong_gradients(nn.Conv2d(1, 1, 3), torch.zeros(1, 1, 2, 7)) is None


def test_the_network_is_left_as_it_was():
    network = nn.Sequential(nn.BatchNorm3d(1), nn.Dropout(0.5), nn.Conv3d(1, 1, 1))
    network[0].eval()
    state, mean = torch.get_rng_state(), network[0].running_mean.clone()
    describe_wrong_gradients(network, torch.ones(2, 1, 2, 6, 7))
    assert [module.training for module in network] == [False, True, True]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(network[0].running_mean, mean)


@pytest.fixture
def make_trainer(monkeypatch):
    """Build a trainer whose network is a single convolution, and collect what it logs."""

    def make(kernel: int, *, autocast: str = "1") -> tuple[nnUNetTrainer, list[str]]:
        monkeypatch.setenv("nnUNet_cpu_autocast", autocast)
        plans = make_plans()
        (configuration,) = plans["configurations"]
        trainer = nnUNetTrainer(plans, configuration, 0, make_dataset_json(), device=torch.device("cpu"))
        trainer.network, trainer.loss = nn.Conv3d(1, 2, kernel, padding="same"), lambda output, target: output.sum()
        lines: list[str] = []
        trainer.print_to_log_file = lambda line: lines.append(line)
        return trainer, lines

    return make


@pytest.mark.parametrize(
    ("kernel", "autocast", "dtype", "is_logged"),
    [(3, "1", torch.bfloat16, False), (5, "1", torch.float32, True), (5, "0", torch.float32, False)],
)
def test_a_trainer_keeps_float32_and_says_so_once(make_trainer, kernel, autocast, dtype, is_logged):
    trainer, lines = make_trainer(kernel, autocast=autocast)
    seen = []
    trainer.network.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    for _ in range(2):
        trainer._forward(torch.zeros(2, 1, 4, 6, 7), torch.zeros(2, 1, 4, 6, 7))
    assert seen[-2:] == [dtype, dtype]
    assert len(lines) == is_logged and all("5 x 5 x 5 on 4 x 6 x 7 voxels" in line for line in lines)
