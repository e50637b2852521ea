"""Schedules of the learning rate."""

from __future__ import annotations

import math

import pytest
import torch

from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.lr_scheduler.warmup import (
    CosineAnnealingLR_offset,
    Lin_incr_LRScheduler,
    Lin_incr_offset_LRScheduler,
    PolyLRScheduler_offset,
)


@pytest.fixture
def optimizer() -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.5)]
    return torch.optim.SGD(groups, lr=0.1)


def rates(optimizer, scheduler, steps) -> list[float]:
    result = []
    for step in steps:
        scheduler.step(step)
        result.append(optimizer.param_groups[0]["lr"])
    return result


def test_three_epochs_have_the_learning_rates_of_the_specification(optimizer):
    scheduler = PolyLRScheduler(optimizer, 0.01, 3)
    assert rates(optimizer, scheduler, range(3)) == pytest.approx([0.01, 0.00694, 0.00372], abs=5e-6)


def test_all_groups_get_the_same_rate_from_the_start(optimizer):
    scheduler = PolyLRScheduler(optimizer, 0.01, 10)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.01]
    assert scheduler.get_last_lr() == [0.01, 0.01]
    assert scheduler.ctr == 1


def test_without_a_step_the_own_counter_goes_on(optimizer):
    scheduler = PolyLRScheduler(optimizer, 1.0, 10, exponent=1)
    assert rates(optimizer, scheduler, [None, -1, 7, None]) == pytest.approx([0.9, 0.8, 0.3, 0.7])


def test_the_rate_stays_zero_after_the_end(optimizer):
    assert rates(optimizer, PolyLRScheduler(optimizer, 1.0, 10), [10, 12]) == [0, 0]


def test_a_line_climbs_to_the_largest_rate(optimizer):
    assert rates(optimizer, Lin_incr_LRScheduler(optimizer, 0.1, 10), [0, 4, 9]) == pytest.approx([0.01, 0.05, 0.1])
    offset = Lin_incr_offset_LRScheduler(optimizer, 0.1, 10, start_step=5)
    assert rates(optimizer, offset, [5, 9, 14]) == pytest.approx([0.01, 0.05, 0.1])


def test_the_polynomial_waits_for_its_start(optimizer):
    scheduler = PolyLRScheduler_offset(optimizer, 0.1, 10, 3)
    expected = [0.1, 0.1, 0.1 * (6 / 7) ** 0.9, 0.1 * (1 / 7) ** 0.9, 0]
    assert rates(optimizer, scheduler, [0, 3, 4, 9, 10]) == pytest.approx(expected)


def test_the_cosine_keeps_the_groups_apart(optimizer):
    scheduler = CosineAnnealingLR_offset(optimizer, T_max=12, eta_min=0.01, offset=2)
    assert rates(optimizer, scheduler, [2, 7, 12]) == pytest.approx([0.1, 0.055, 0.01])
    scheduler.step(7)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.255)


def test_the_cosine_is_the_one_of_torch(optimizer):
    ours = rates(optimizer, CosineAnnealingLR_offset(optimizer, 10), range(10))
    assert ours == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 10)) for step in range(10)])


@pytest.mark.parametrize(
    "build",
    [
        lambda o: PolyLRScheduler(o, 0.1, 0),
        lambda o: Lin_incr_LRScheduler(o, 0.1, 0),
        lambda o: PolyLRScheduler_offset(o, 0.1, 5, 5),
        lambda o: CosineAnnealingLR_offset(o, 5, offset=5),
    ],
)
def test_a_schedule_without_a_step_is_refused(optimizer, build):
    with pytest.raises(ValueError, match="above 0"):
        build(optimizer)


def test_a_new_optimizer_step_needs_no_warning(optimizer):
    scheduler = PolyLRScheduler(optimizer, 0.1, 10)
    for epoch in range(3):
        scheduler.step(epoch)
        optimizer.step()
