"""The marginal loss is the loss of the marginal likelihood: background and what is not annotated are one class."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nnunetv2.plans.label_manager import LabelManager
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss, DC_and_topk_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.default_loss import build_default_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.training.loss.marginal import MarginalLoss, PartialLabelsError, over_annotated_classes
from nnunetv2.training.loss.robust_ce_loss import RobustCrossEntropyLoss

CPU = torch.device("cpu")
NUM_OUTPUTS, IGNORE = 5, 5


def draw(rng, dims, *, annotated, with_ignored=False, num_outputs=NUM_OUTPUTS):
    shape = (2, *(4, 6, 5)[:dims])
    logits = torch.tensor(rng.normal(0, 3, (2, num_outputs, *shape[1:])), dtype=torch.float64)
    values = [0, *annotated, *([num_outputs] if with_ignored else [])]
    target = torch.tensor(rng.choice(values, (2, 1, *shape[1:])))
    return logits, target.to(torch.int16)


def direct_likelihood(logits, target, annotated):
    """Return -log p(y) averaged over voxels: of what a site sees as background, p sums over all that it may be."""
    p = torch.softmax(logits, 1).numpy()
    losses = []
    for index in np.ndindex(target.shape[:1] + target.shape[2:]):
        label = int(target[(index[0], 0, *index[1:])])
        if label == IGNORE:
            continue
        voxel = p[(index[0], slice(None), *index[1:])]
        channels = [label] if label in annotated else [c for c in range(len(voxel)) if c not in annotated]
        losses.append(-np.log(voxel[channels].sum()))
    return np.mean(losses)


def direct_dice(logits, target, annotated):
    """Return minus the soft Dice of the annotated classes, per case, in which ignored voxels do not count."""
    p, wanted = torch.softmax(logits, 1).numpy(), target.numpy()[:, 0]
    counts = wanted != IGNORE
    dice = [
        (2 * (p[b, c] * (wanted[b] == c) * counts[b]).sum() + 1e-5)
        / ((p[b, c] * counts[b]).sum() + (wanted[b] == c).sum() + 1e-5)
        for b in range(len(p))
        for c in annotated
    ]
    return -np.mean(dice)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("with_ignored", [False, True])
def test_the_loss_is_that_of_the_marginal_likelihood(seed, dims, with_ignored):
    rng = np.random.default_rng([seed, dims])
    annotated = sorted(rng.choice(range(1, NUM_OUTPUTS), rng.integers(1, NUM_OUTPUTS - 1), replace=False).tolist())
    logits, target = draw(rng, dims, annotated=annotated, with_ignored=with_ignored)
    labels = {"background": 0, **{f"class {n}": n for n in range(1, NUM_OUTPUTS)}}
    manager = LabelManager({**labels, "ignore": IGNORE} if with_ignored else labels, None)
    default = build_default_loss(manager, batch_dice=False, ddp=False)
    loss = over_annotated_classes(default, annotated=annotated, num_outputs=NUM_OUTPUTS, device=CPU)
    expected = direct_likelihood(logits, target, annotated) + direct_dice(logits, target, annotated)
    assert loss(logits, target).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dims", [2, 3])
def test_each_output_of_deep_supervision_is_treated_so(dims):
    rng = np.random.default_rng(dims)
    pairs = [draw(rng, dims, annotated=[2, 3]) for _ in range(3)]
    weights = (0.5, 0.3, 0.2)
    supervised = DeepSupervisionWrapper(RobustCrossEntropyLoss(), weights)
    loss = over_annotated_classes(supervised, annotated=[2, 3], num_outputs=NUM_OUTPUTS, device=CPU)
    outputs, targets = map(list, zip(*pairs))
    expected = sum(weight * direct_likelihood(*pair, [2, 3]) for weight, pair in zip(weights, pairs))
    assert loss(outputs, targets).item() == pytest.approx(expected, rel=1e-6)


def test_gradients_push_hidden_classes_only_as_parts_of_background():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]], dtype=torch.float64)[..., None, None].requires_grad_()
    loss = over_annotated_classes(RobustCrossEntropyLoss(), annotated=[1], num_outputs=4, device=CPU)
    loss(logits, torch.tensor([[[[0]]]])).backward()
    gradient, p = logits.grad.flatten(), torch.softmax(logits.detach().flatten(), 0)
    together = p[[0, 2, 3]].sum()
    assert gradient[1].item() == pytest.approx(p[1].item())
    for channel in (0, 2, 3):  # background and hidden classes share the blame by what they have claimed
        assert gradient[channel].item() == pytest.approx((p[channel] - p[channel] / together).item())


def test_a_site_that_annotates_everything_trains_with_its_own_loss():
    loss = RobustCrossEntropyLoss()
    assert over_annotated_classes(loss, annotated=[1, 2], num_outputs=3, device=CPU) is loss


def test_a_loss_is_wrapped_once():
    once = over_annotated_classes(RobustCrossEntropyLoss(), annotated=[1], num_outputs=3, device=CPU)
    assert over_annotated_classes(once, annotated=[1], num_outputs=3, device=CPU) is once


class Numbered(nn.Module):
    supports_partial_labels = False


def test_a_loss_that_knows_classes_by_number_is_refused():
    loss = DeepSupervisionWrapper(Numbered(), (1.0,))
    with pytest.raises(PartialLabelsError, match=r"^Numbered knows classes by their numbers.*another loss"):
        over_annotated_classes(loss, annotated=[1], num_outputs=3, device=CPU)
    assert over_annotated_classes(loss, annotated=[1, 2], num_outputs=3, device=CPU) is loss


def test_weights_of_classes_become_those_of_the_annotated_ones():
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    loss = over_annotated_classes(RobustCrossEntropyLoss(weight=weights), annotated=[3], num_outputs=4, device=CPU)
    assert loss.loss.weight.tolist() == [1.0, 4.0]


def test_losses_of_a_users_own_are_wrapped_too():
    logits, target = draw(np.random.default_rng(0), 3, annotated=[2])
    for own in (
        DC_and_topk_loss({"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}, {"k": 10}),
        DC_and_CE_loss({"batch_dice": True, "ddp": False}, {}, dice_class=MemoryEfficientSoftDiceLoss),
    ):
        loss = over_annotated_classes(own, annotated=[2], num_outputs=NUM_OUTPUTS, device=CPU)
        merged = torch.cat([torch.logsumexp(logits[:, [0, 1, 3, 4]], 1, keepdim=True), logits[:, [2]]], 1)
        assert torch.equal(loss(logits, target), own(merged, (target == 2).to(torch.int16)))


def test_half_precision_is_left_before_the_sum():
    loss = MarginalLoss(RobustCrossEntropyLoss(), annotated=[1], num_outputs=3)
    assert loss.merge_logits(torch.zeros(1, 3, 2, 2, dtype=torch.bfloat16)).dtype == torch.float32


def test_labels_that_nobody_has_annotated_are_background():
    loss = MarginalLoss(RobustCrossEntropyLoss(), annotated=[1, 3], num_outputs=4)
    for dtype in (torch.int16, torch.float32):
        target = torch.tensor([0, 1, 2, 3, 4], dtype=dtype)
        assert loss.renumber(target).tolist() == [0, 1, 0, 2, 4]
        assert loss.renumber(target).dtype == dtype


@pytest.mark.slow
def test_the_loss_can_be_compiled_and_saved_without_buffers():
    loss = MarginalLoss(RobustCrossEntropyLoss(), annotated=[1], num_outputs=3)
    assert not loss.state_dict()
    logits, target = draw(np.random.default_rng(1), 2, annotated=[1], num_outputs=3)
    compiled = torch.compile(loss, backend="eager")
    assert torch.equal(compiled(logits, target), loss(logits, target))
