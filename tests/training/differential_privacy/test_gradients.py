"""Clipped sums against backward passes of their own, for the networks, losses and labels that nnU-Net has."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_dataset import PATCH, make_dataset_json, make_plans

from nnunetv2.plans.plans_manager import PlansManager
from nnunetv2.training.differential_privacy.gradients import ClippedSum, standard_normal_like
from nnunetv2.training.differential_privacy.lots import secret_generator
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper, deep_supervision_weights
from nnunetv2.training.loss.default_loss import build_default_loss
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

CLIP = 0.1
LABELS = {
    "labels": {},
    "regions": {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]},
    "ignore label": {"labels": {"background": 0, "blob": 1, "core": 2, "ignore": 3}},
}


class Scene:
    """A network with deep supervision, its loss, and the patches of some patients."""

    def __init__(self, *, dims=3, residual=False, labels="labels", num_patients=3, patches=2) -> None:
        torch.manual_seed(0)
        plans = make_plans(dims=dims, stages=3)
        (configuration,) = plans["configurations"].values()
        if residual:
            architecture = configuration["architecture"]
            architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
            architecture["arch_kwargs"]["n_blocks_per_stage"] = architecture["arch_kwargs"].pop("n_conv_per_stage")
        manager = PlansManager(plans)
        description = manager.get_configuration("3d_fullres" if dims == 3 else "2d")
        label_manager = manager.get_label_manager(make_dataset_json(**LABELS[labels]))
        self.network = nnUNetTrainer.build_network_architecture(
            manager, description, 1, label_manager.num_segmentation_heads
        )
        loss = build_default_loss(label_manager, batch_dice=dims == 2, ddp=False)
        self._loss = DeepSupervisionWrapper(loss, deep_supervision_weights(2, keep_last_tiny=False))
        sizes = [PATCH[dims], tuple(length // 2 for length in PATCH[dims])]
        self.batches = []
        for _ in range(num_patients):
            data = torch.randn(patches, 1, *PATCH[dims])
            if labels == "regions":
                target = [torch.randint(0, 2, (patches, 2, *size)).float() for size in sizes]
            else:
                highest = 4 if labels == "ignore label" else 3
                target = [torch.randint(0, highest, (patches, 1, *size)).float() for size in sizes]
            self.batches.append((data, target))

    def loss(self, number: int) -> torch.Tensor:
        data, target = self.batches[number]
        return self._loss(self.network(data), target)

    def separate_gradient(self, number: int) -> list[torch.Tensor]:
        """Return a patient's gradient from a backward pass as usual."""
        self.network.zero_grad(set_to_none=True)
        self.loss(number).backward()
        return [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            for parameter in self.network.parameters()
        ]


def norm(gradient: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(part.double().pow(2).sum()) for part in gradient))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"residual": True},
        {"dims": 2},
        {"dims": 2, "residual": True},
        {"labels": "regions"},
        {"labels": "ignore label"},
    ],
    ids=lambda options: " ".join(f"{name} {value}" for name, value in options.items()) or "plain",
)
def test_a_sum_is_that_of_separate_backward_passes(options):
    scene = Scene(**options)
    found = ClippedSum(scene.network.parameters(), clip_norm=CLIP)
    norms = [found.add(scene.loss(number)) for number in range(3)]
    separate = [scene.separate_gradient(number) for number in range(3)]
    assert norms == pytest.approx([norm(one) for one in separate], rel=1e-6)
    assert max(norms) > CLIP  # or nothing is clipped
    expected = [sum(part * min(1.0, CLIP / n) for part, n in zip(parts, norms)) for parts in zip(*separate)]
    difference = norm([a - b for a, b in zip(found.total, expected)])
    assert difference <= 1e-6 * norm(expected)


@pytest.mark.parametrize("options", [{}, {"residual": True}, {"labels": "ignore label"}], ids=str)
def test_a_patient_moves_a_sum_by_the_clipping_norm_at_most(options):
    scene = Scene(**options)
    sums = {}
    for present in ((0, 1, 2), (1, 2)):
        found = ClippedSum(scene.network.parameters(), clip_norm=CLIP)
        for number in present:
            found.add(scene.loss(number))
        sums[present] = [total.clone() for total in found.total]
    moved = norm([a - b for a, b in zip(*sums.values())])
    assert 0 < moved <= CLIP * (1 + 1e-6)


def test_a_short_gradient_is_not_made_longer():
    scene = Scene()
    found = ClippedSum(scene.network.parameters(), clip_norm=1e6)
    assert found.add(scene.loss(0)) == pytest.approx(norm(found.total), rel=1e-6)


def test_a_network_keeps_all_its_gradients_over_ten_steps():
    scene = Scene()
    before = sum(bool(part.abs().sum()) for part in scene.separate_gradient(0))
    found, optimizer = (
        ClippedSum(scene.network.parameters(), clip_norm=1.0),
        torch.optim.SGD(scene.network.parameters(), 0.01),
    )
    for _ in range(10):
        found.add(scene.loss(0))
        found.release_(sigma=0.01, lot=1, generator=secret_generator())
        optimizer.step()
    assert sum(bool(part.abs().sum()) for part in scene.separate_gradient(0)) == before


def test_a_patient_without_a_finite_gradient_adds_nothing():
    parameter = torch.nn.Parameter(torch.ones(3))
    found = ClippedSum([parameter], clip_norm=1.0)
    found.add((parameter * torch.tensor([1.0, float("nan"), 1.0])).sum())
    assert not found.total[0].any()


def test_what_is_released_is_the_noisy_sum_over_the_size_of_a_lot():
    parameter = torch.nn.Parameter(torch.zeros(400, 500))
    found = ClippedSum([parameter], clip_norm=2.0)
    found.add(parameter.sum())
    expected = found.total[0].clone() / 5
    found.release_(sigma=3.0, lot=5, generator=secret_generator())
    noise = (parameter.grad - expected) * 5
    assert float(noise.std()) == pytest.approx(3.0 * 2.0, rel=0.01)
    assert abs(float(noise.mean())) < 5 * 6.0 / math.sqrt(200_000)
    assert not found.total[0].any()  # the next lot begins with nothing


def test_an_empty_lot_releases_noise():
    parameter = torch.nn.Parameter(torch.zeros(100_000))
    found = ClippedSum([parameter], clip_norm=1.0)
    found.release_(sigma=1.0, lot=2, generator=secret_generator())
    assert float(parameter.grad.std()) == pytest.approx(0.5, rel=0.02)


def test_nobody_who_seeds_numpy_or_torch_knows_the_noise(monkeypatch):
    monkeypatch.setenv("nnUNet_seed", "1")
    drawn = []
    for _ in range(2):
        np.random.seed(1)
        torch.manual_seed(1)
        drawn.append(standard_normal_like(torch.zeros(100), secret_generator()))
    assert not torch.equal(*drawn)


def test_frozen_parameters_have_no_part():
    trained, frozen = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2), requires_grad=False)
    found = ClippedSum([trained, frozen], clip_norm=1.0)
    found.add((trained * frozen).sum())
    found.release_(sigma=1.0, lot=1, generator=secret_generator())
    assert frozen.grad is None and trained.grad is not None
