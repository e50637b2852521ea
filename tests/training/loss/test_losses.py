"""Losses: the golden values of the specification, and what each option is for."""

from __future__ import annotations

import pytest
import torch

from nnunetv2.training.loss import dice as dice_module
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss, DC_and_topk_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss, SoftDiceLoss, get_tp_fp_fn_tn
from nnunetv2.training.loss.robust_ce_loss import RobustCrossEntropyLoss, TopKLoss
from nnunetv2.utilities.helpers import softmax_helper_dim1

DICE = {"smooth": 1e-5, "do_bg": False, "ddp": False}


@pytest.fixture
def logits() -> torch.Tensor:
    return (2 * torch.sin(torch.arange(96.0))).reshape(2, 3, 4, 4)


@pytest.fixture
def labels() -> torch.Tensor:
    return (torch.arange(32) % 3).reshape(2, 1, 4, 4)


@pytest.fixture
def partly_ignored(labels) -> torch.Tensor:
    labels = labels.clone()
    labels[0, 0, 0] = 3
    return labels


@pytest.fixture
def regions(labels) -> torch.Tensor:
    return torch.cat([labels >= 1, labels == 2, labels == 0], 1)


@pytest.mark.parametrize("dice_class", [MemoryEfficientSoftDiceLoss, SoftDiceLoss])
@pytest.mark.parametrize(
    ("batch_dice", "do_bg", "expected"),
    [(False, False, -0.300497), (False, True, -0.326389), (True, False, -0.302409), (True, True, -0.328257)],
)
def test_dice_has_its_golden_values(logits, labels, dice_class, batch_dice, do_bg, expected):
    loss = dice_class(softmax_helper_dim1, batch_dice, do_bg, smooth=1e-5, ddp=False)
    assert loss(logits, labels).item() == pytest.approx(expected, abs=1e-6)


def test_cross_entropies_have_their_golden_values(logits, labels):
    assert RobustCrossEntropyLoss()(logits, labels.float()).item() == pytest.approx(1.857922, abs=1e-6)
    assert TopKLoss(k=10)(logits, labels).item() == pytest.approx(4.218129, abs=2e-6)


def test_compound_losses_have_their_golden_values(logits, labels, partly_ignored, regions):
    assert DC_and_CE_loss(DICE, {})(logits, labels).item() == pytest.approx(1.557425, abs=1e-6)
    with_ignore = DC_and_CE_loss(DICE, {}, ignore_label=3, dice_class=MemoryEfficientSoftDiceLoss)
    assert with_ignore(logits, partly_ignored).item() == pytest.approx(1.520528, abs=1e-6)
    assert DC_and_topk_loss(DICE, {"k": 10})(logits, labels).item() == pytest.approx(3.917632, abs=2e-6)
    with_background = {**DICE, "do_bg": True}
    assert DC_and_BCE_loss({}, with_background)(logits, regions).item() == pytest.approx(0.448348, abs=1e-6)
    ignored = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    ignored[0, 0, 0] = True
    loss = DC_and_BCE_loss({}, with_background, use_ignore_label=True)
    assert loss(logits, torch.cat([regions, ignored], 1)).item() == pytest.approx(2.294057, abs=1e-6)
    assert loss(logits, torch.cat([regions, ignored], 1).float()).item() == pytest.approx(2.294057, abs=1e-6)


def test_only_dice_of_nothing_remains_if_all_voxels_are_ignored(logits, labels):
    loss = DC_and_CE_loss(DICE, {}, ignore_label=3, dice_class=MemoryEfficientSoftDiceLoss)
    assert loss(logits, torch.full_like(labels, 3)).item() == -1.0


def test_ignored_voxels_have_no_gradient(logits, partly_ignored):
    logits.requires_grad_()
    DC_and_CE_loss(DICE, {}, ignore_label=3, dice_class=MemoryEfficientSoftDiceLoss)(logits, partly_ignored).backward()
    assert logits.grad[0, :, 0].abs().max() == 0
    assert logits.grad[0, :, 1:].abs().min() > 0


def test_the_callers_options_stay_as_they_are():
    options = {"label_smoothing": 0.1}
    assert DC_and_CE_loss(DICE, options, ignore_label=3).ce.ignore_index == 3
    assert options == {"label_smoothing": 0.1}


def test_a_term_of_weight_zero_is_not_computed(logits, labels):
    loss = DC_and_CE_loss(DICE, {}, weight_ce=0, weight_dice=2)
    loss.ce = None
    assert loss(logits, labels) == 2 * loss.dc(logits, labels)


def test_regions_given_to_a_label_loss_are_refused(logits, regions):
    with pytest.raises(ValueError, match="DC_and_BCE_loss"):
        DC_and_CE_loss(DICE, {})(logits, regions)


def test_average_over_channels_divides_the_binary_cross_entropy(logits, regions):
    target = torch.cat([regions, torch.zeros(2, 1, 4, 4, dtype=torch.bool)], 1)
    plain = DC_and_BCE_loss({}, DICE, weight_dice=0)(logits, regions)
    averaged = DC_and_BCE_loss({}, DICE, weight_dice=0, use_ignore_label=True, average_over_channels=True)
    summed = DC_and_BCE_loss({}, DICE, weight_dice=0, use_ignore_label=True)
    assert averaged(logits, target).item() == pytest.approx(plain.item(), abs=1e-6)
    assert summed(logits, target).item() == pytest.approx(3 * plain.item(), abs=1e-5)


def test_counts_of_a_hand_checked_prediction():
    prediction = torch.tensor([[[1.0, 0.25]], [[0.0, 0.75]]]).reshape(1, 2, 1, 2)
    truth = torch.tensor([0, 1]).reshape(1, 1, 1, 2)
    tp, fp, fn, tn = get_tp_fp_fn_tn(prediction, truth)
    assert tp.tolist() == [[1.0, 0.75]]
    assert fp.tolist() == [[0.25, 0.0]]
    assert fn.tolist() == [[0.0, 0.25]]
    assert tn.tolist() == [[0.75, 1.0]]


def test_counts_take_a_mask_squares_and_axes():
    prediction = torch.full((1, 1, 2, 2), 0.5)
    truth = torch.ones(1, 1, 2, 2)
    mask = torch.tensor([[True, False], [True, True]]).reshape(1, 1, 2, 2)
    assert get_tp_fp_fn_tn(prediction, truth, mask=mask)[0].item() == 1.5
    assert get_tp_fp_fn_tn(prediction, truth, mask=mask, square=True)[0].item() == 0.75
    assert get_tp_fp_fn_tn(prediction, truth, axes=[])[0].shape == (1, 1, 2, 2)
    assert get_tp_fp_fn_tn(prediction, truth, axes=(0, 2, 3))[0].shape == (1,)


def test_a_target_that_does_not_fit_is_refused(logits):
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 5\)"):
        MemoryEfficientSoftDiceLoss(ddp=False)(logits, torch.zeros(2, 1, 4, 5))


def test_clipped_hits_bound_the_dice_from_below(logits, labels):
    nothing_hit = torch.full_like(logits, -50.0)
    nothing_hit[:, 0] = 50
    loss = SoftDiceLoss(softmax_helper_dim1, do_bg=False, smooth=0, ddp=False, clip_tp=1.0)
    assert loss(nothing_hit, labels.clamp(min=1)).item() < 0


@pytest.mark.parametrize("dice_class", [MemoryEfficientSoftDiceLoss, SoftDiceLoss])
def test_dice_of_half_precision_logits_on_a_cpu_is_computed_in_full_precision(logits, labels, dice_class):
    logits = logits.to(torch.bfloat16)
    loss = dice_class(softmax_helper_dim1, smooth=1e-5, ddp=False)
    assert loss(logits, labels).item() == loss(logits.float(), labels).item()


@pytest.mark.parametrize("dice_class", [MemoryEfficientSoftDiceLoss, SoftDiceLoss])
def test_batch_dice_of_two_ranks_is_that_of_the_whole_batch(logits, labels, dice_class, monkeypatch):
    """Ranks hold 1 and 2 samples: what they exchange must not depend on the number of samples."""
    logits, labels = torch.cat([logits, logits[:1].flip(-1)]), torch.cat([labels, labels[:1]])
    expected = dice_class(softmax_helper_dim1, batch_dice=True, ddp=False)(logits, labels)

    exchanged = []
    monkeypatch.setattr(dice_module.AllGatherGrad, "apply", lambda values: exchanged.append(values) or values[None])
    loss = dice_class(softmax_helper_dim1, batch_dice=True, ddp=True)
    loss(logits[:1], labels[:1])
    first_rank, exchanged = exchanged, []
    answers = iter(first_rank)
    monkeypatch.setattr(dice_module.AllGatherGrad, "apply", lambda values: torch.stack([next(answers), values]))
    assert loss(logits[1:], labels[1:]).item() == pytest.approx(expected.item(), abs=1e-6)


def test_top_k_leaves_ignored_voxels_out_and_keeps_at_least_one(logits, labels):
    counted = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    counted[0, 0, 0] = True
    target = torch.where(counted, labels, -100)
    voxelwise = torch.nn.functional.cross_entropy(logits, labels[:, 0], reduction="none")[0, 0]
    hardest = voxelwise.sort(descending=True).values
    assert TopKLoss(k=50)(logits, target).item() == pytest.approx(hardest[:2].mean().item())
    assert TopKLoss(k=1)(logits, target).item() == pytest.approx(hardest[0].item())
    assert TopKLoss(k=1)(logits, torch.full_like(labels, -100)).item() == 0


def test_cross_entropy_refuses_several_target_channels(logits, regions):
    with pytest.raises(AssertionError, match="one channel"):
        RobustCrossEntropyLoss()(logits, regions)


@pytest.mark.parametrize(
    "build",
    [
        lambda: DC_and_CE_loss({"smooth": 1e-5, "ddp": False}, {}, ignore_label=3),
        lambda: DC_and_topk_loss({"smooth": 1e-5, "ddp": False}, {"k": 10}, ignore_label=3),
    ],
)
def test_gradients_stay_finite_where_every_voxel_is_ignored(logits, labels, build):
    given = logits.clone().requires_grad_()
    build()(given, torch.full_like(labels, 3)).backward()
    assert torch.isfinite(given.grad).all()


@pytest.mark.parametrize(("k", "ignored", "count"), [(10, 0, 3), (10, 12, 2), (50, 31, 1), (1, 0, 1), (100, 8, 24)])
def test_the_hardest_share_of_the_counted_voxels_is_averaged(k, ignored, count):
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 3, (2, 1, 4, 4), generator=torch.Generator().manual_seed(1))
    labels.view(-1)[:ignored] = 3
    voxels = torch.nn.functional.cross_entropy(logits, labels[:, 0], reduction="none", ignore_index=3).flatten()
    expected = voxels[labels.flatten() != 3].sort(descending=True).values[:count].mean()
    assert TopKLoss(k=k, ignore_index=3)(logits, labels) == pytest.approx(expected.item(), rel=1e-6)
