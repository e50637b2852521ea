"""Batch Dice of a training in several processes, which may hold batches of different size."""

from __future__ import annotations

import pytest
import torch
from torch import distributed
from torch.multiprocessing import spawn

from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss, SoftDiceLoss
from nnunetv2.utilities.helpers import softmax_helper_dim1

SHARES = (slice(0, 1), slice(1, 3))


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((3, 3, 4, 5), generator=generator), torch.randint(0, 3, (3, 1, 4, 5), generator=generator)


def compute_share(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=len(SHARES))
    logits, labels = (tensor[SHARES[rank]] for tensor in make_batch())
    results = []
    for dice_class in (MemoryEfficientSoftDiceLoss, SoftDiceLoss):
        share = logits.clone().requires_grad_()
        loss = dice_class(softmax_helper_dim1, batch_dice=True, smooth=1e-5, ddp=True)(share, labels)
        loss.backward()
        results.append((loss.detach(), share.grad))
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_with_unequal_batches_agree_with_a_single_one(tmp_path):
    spawn(compute_share, args=(str(tmp_path),), nprocs=len(SHARES))
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(SHARES))]
    logits, labels = make_batch()
    for number, dice_class in enumerate((MemoryEfficientSoftDiceLoss, SoftDiceLoss)):
        whole = logits.clone().requires_grad_()
        loss = dice_class(softmax_helper_dim1, batch_dice=True, smooth=1e-5, ddp=False)(whole, labels)
        loss.backward()
        gradient = torch.cat([share[number][1] for share in shares])
        assert all(share[number][0].item() == pytest.approx(loss.item(), abs=1e-6) for share in shares)
        # The optimizer averages gradients over processes, so each one's is that of the sum of all losses.
        torch.testing.assert_close(gradient / len(SHARES), whole.grad)
