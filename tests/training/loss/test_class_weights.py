import pytest
import torch
from torch import nn

from nnunetv2.training.loss.class_weights import weigh_classes_
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.training.loss.robust_ce_loss import TopKLoss

CPU = torch.device("cpu")
DICE = {"batch_dice": True, "smooth": 1e-5, "ddp": False}


def weigh(loss, weights, dims=2):
    return weigh_classes_(loss, weights, dims=dims, device=CPU)


def test_voxels_of_a_label_count_as_much_as_its_weight():
    loss = DC_and_CE_loss({**DICE, "do_bg": False}, {}, weight_dice=0)
    assert weigh(DeepSupervisionWrapper(loss, [1.0]), [1, 3]) == 1
    logits = torch.tensor([[[[2.0, 0.5]], [[0.0, -1.0]]]])  # one sample, two classes, two voxels
    target = torch.tensor([[[[0, 1]]]])
    of_voxel = nn.functional.cross_entropy(logits, target[:, 0], reduction="none").flatten()
    assert loss(logits, target) == pytest.approx(float(of_voxel[0] + 3 * of_voxel[1]) / 4)


@pytest.mark.parametrize("ignores", [False, True])
def test_terms_of_a_region_count_as_much_as_its_weight(ignores):
    loss = DC_and_BCE_loss({}, {**DICE, "do_bg": True}, weight_dice=0, use_ignore_label=ignores)
    plain = DC_and_BCE_loss({}, {**DICE, "do_bg": True}, weight_dice=0, use_ignore_label=ignores)
    assert weigh(loss, [1, 5]) == 1
    logits = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    target = torch.zeros(2, 2 + ignores, 3, 4, dtype=torch.bool)
    only_first, only_second = logits.clone(), logits.clone()
    only_first[:, 1] = only_second[:, 0] = -100.0  # sure and right: no loss
    assert loss(only_first, target) == pytest.approx(float(plain(only_first, target)), rel=1e-5)
    assert loss(only_second, target) == pytest.approx(5 * float(plain(only_second, target)), rel=1e-5)


def test_the_hardest_voxels_are_chosen_among_weighted_ones():
    loss = TopKLoss(k=50)
    assert weigh(loss, [0, 1]) == 1
    logits, target = torch.tensor([[[[-9.0, 1.0]], [[9.0, 1.0]]]]), torch.tensor([[[[0, 1]]]])
    assert float(loss(logits, target)) == pytest.approx(0.6931, abs=1e-3)


def test_a_loss_without_cross_entropy_says_so():
    assert weigh(MemoryEfficientSoftDiceLoss(**DICE), [1, 1]) == 0
