"""Weights of resolutions, and the sum of losses over them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_dataset import make_dataset_json, make_plans
from torch import nn

from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper, deep_supervision_weights
from nnunetv2.training.loss.default_loss import build_default_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class Difference(nn.Module):
    def forward(self, output, target):
        return (output - target).sum()


def entries(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([value]) for value in values]


@pytest.mark.parametrize(
    ("num_scales", "expected"),
    [(1, [1]), (2, [1, 0]), (3, [2 / 3, 1 / 3, 0]), (5, [0.5333, 0.2667, 0.1333, 0.0667, 0])],
)
def test_weights_halve_and_the_last_is_dropped(num_scales, expected):
    assert deep_supervision_weights(num_scales, keep_last_tiny=False) == pytest.approx(expected, abs=5e-5)


def test_the_last_weight_is_tiny_where_every_output_needs_a_gradient():
    weights = deep_supervision_weights(3, keep_last_tiny=True)
    assert 0 < weights[-1] < 1e-6
    assert weights.sum() == pytest.approx(1)


def test_no_output_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        deep_supervision_weights(0, keep_last_tiny=False)


def test_losses_are_weighted_and_summed():
    loss = DeepSupervisionWrapper(Difference(), np.array([0.5, 0.25]))
    assert loss(entries(5, 9), entries(1, 1)).item() == 0.5 * 4 + 0.25 * 8
    assert loss.weight_factors == (0.5, 0.25)


def test_a_resolution_of_weight_zero_is_not_computed():
    loss = DeepSupervisionWrapper(Difference(), [1, 0])
    assert loss([torch.tensor([5.0]), None], [torch.tensor([1.0]), None]).item() == 4


def test_without_weights_all_count_equally():
    assert DeepSupervisionWrapper(Difference())(entries(2, 3), entries(1, 1)).item() == 3


def test_weights_of_zero_only_are_refused():
    with pytest.raises(ValueError, match="differ from 0"):
        DeepSupervisionWrapper(Difference(), [0, 0])


def test_tensors_instead_of_lists_are_refused():
    with pytest.raises(TypeError, match="Tensor"):
        DeepSupervisionWrapper(Difference())(torch.ones(2), torch.ones(2))


def labels(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{"has_regions": False, "has_ignore_label": False, "ignore_label": None, **changes})


def test_labels_get_dice_and_cross_entropy():
    loss = build_default_loss(labels(has_ignore_label=True, ignore_label=4), batch_dice=True, ddp=False)
    assert isinstance(loss, DC_and_CE_loss)
    assert isinstance(loss.dc, MemoryEfficientSoftDiceLoss)
    assert (loss.dc.batch_dice, loss.dc.do_bg, loss.dc.smooth, loss.dc.ddp) == (True, False, 1e-5, False)
    assert loss.ignore_label == loss.ce.ignore_index == 4


def test_regions_get_dice_and_binary_cross_entropy():
    loss = build_default_loss(
        labels(has_regions=True, has_ignore_label=True, ignore_label=4), batch_dice=True, ddp=True
    )
    assert isinstance(loss, DC_and_BCE_loss)
    assert (loss.use_ignore_label, loss.dc.do_bg, loss.dc.ddp) == (True, True, True)


class Compiled(nn.Module):
    """Stands in for a compiled module, which takes seconds to make."""

    def __init__(self, module):
        super().__init__()
        self.original = module


def make_trainer(*, stages=3, compiles=False, **attributes):
    trainer = nnUNetTrainer(make_plans(stages=stages), "3d_fullres", 0, make_dataset_json(), torch.device("cpu"))
    vars(trainer).update(attributes, _do_i_compile=lambda: compiles)
    return trainer


def test_deep_supervision_wraps_the_loss():
    loss = make_trainer(stages=4)._build_loss()
    assert loss.weight_factors == pytest.approx((2 / 3, 1 / 3, 0))
    assert isinstance(loss.loss, DC_and_CE_loss)
    assert isinstance(make_trainer(enable_deep_supervision=False)._build_loss(), DC_and_CE_loss)


def test_the_only_output_of_a_network_with_two_stages_counts():
    assert make_trainer(stages=2)._build_loss().weight_factors == (1,)


def test_processes_without_compilation_keep_all_outputs_in_use(monkeypatch):
    monkeypatch.setattr(torch, "compile", Compiled)
    assert make_trainer(is_ddp=True)._build_loss().weight_factors[-1] > 0
    assert make_trainer(is_ddp=True, compiles=True)._build_loss().weight_factors[-1] == 0


def test_only_the_dice_term_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", Compiled)
    loss = make_trainer(compiles=True, enable_deep_supervision=False)._build_loss()
    assert isinstance(loss, DC_and_CE_loss)
    assert isinstance(loss.dc.original, MemoryEfficientSoftDiceLoss)
