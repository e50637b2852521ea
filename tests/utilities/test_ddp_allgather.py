"""Gathering tensors across processes."""

import pytest
import torch
from torch import distributed, multiprocessing

from nnunetv2.utilities.ddp_allgather import AllGatherGrad, print_if_rank0


def gather(rank: int, world: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    share = torch.tensor([1.0 + rank, 10.0], requires_grad=True)
    gathered = AllGatherGrad.apply(share)
    # each process weighs the shares differently, so a share's gradient must collect all weights
    weights = torch.arange(world, dtype=torch.float32)[:, None] + 10**rank
    (gathered * weights).sum().backward()
    expected = sum(rank + 10**other for other in range(world))
    assert gathered.tolist() == [[1.0 + other, 10.0] for other in range(world)]
    assert share.grad.tolist() == [expected, expected]
    print_if_rank0("once")
    distributed.destroy_process_group()


def test_one_process(tmp_path, capsys):
    gather(0, 1, str(tmp_path))
    assert capsys.readouterr().out == "once\n"


def test_print_without_distributed_training(capsys):
    print_if_rank0("a", 1)
    assert capsys.readouterr().out == "a 1\n"


@pytest.mark.slow
def test_two_processes(tmp_path):
    multiprocessing.spawn(gather, args=(2, str(tmp_path)), nprocs=2)
