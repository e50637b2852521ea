import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnunetv2.training import steps
from nnunetv2.utilities import device

LABELS = SimpleNamespace(has_regions=False, has_ignore_label=False, ignore_label=None)


def as_logits(labels, num_classes):
    """Make logits `(b, c, x)` whose argmax is `labels` `(b, x)`."""
    return torch.nn.functional.one_hot(torch.tensor(labels), num_classes).movedim(-1, 1).float()


def test_hits_are_counted_per_foreground_class():
    output, target = as_logits([[0, 1, 1, 2]], 3), torch.tensor([[[0, 1, 2, 2]]])
    tp, fp, fn = steps.count_hits(output, target, LABELS)
    assert tp.tolist() == [1, 1] and fp.tolist() == [1, 0] and fn.tolist() == [0, 1]
    assert tp.dtype == np.float64


def test_ignored_voxels_do_not_count():
    labels = SimpleNamespace(has_regions=False, has_ignore_label=True, ignore_label=3)
    output, target = as_logits([[1, 1, 2, 2]], 3), torch.tensor([[[1, 3, 3, 1]]])
    tp, fp, fn = steps.count_hits(output, target, labels)
    assert tp.tolist() == [1, 0] and fp.tolist() == [0, 1] and fn.tolist() == [1, 0]


def test_regions_are_counted_each_on_its_own_and_the_last_map_is_what_to_ignore():
    labels = SimpleNamespace(has_regions=True, has_ignore_label=True, ignore_label=3)
    output = torch.tensor([[[5.0, 5, -5, 5], [5, -5, 5, 5]]])
    target = torch.tensor([[[1, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 1]]]).bool()
    tp, fp, fn = steps.count_hits(output, target, labels)
    assert tp.tolist() == [1, 1] and fp.tolist() == [1, 1] and fn.tolist() == [1, 1]


def test_dice_is_unknown_where_there_is_nothing():
    dice = steps.dice_from_counts(np.array([2.0, 0]), np.array([1.0, 0]), np.array([1.0, 0]))
    assert dice[0] == np.float32(2 / 3) and math.isnan(dice[1])
    assert steps.mean_of_known(dice) == np.float32(2 / 3)
    assert math.isnan(steps.mean_of_known([float("nan")]))


def test_the_gradient_is_clipped_before_the_step():
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(network.weight)
    optimizer = torch.optim.SGD(network.parameters(), 1.0)
    loss = network(torch.tensor([[100.0]])).sum()
    steps.update_weights_(loss, network, optimizer, None)
    assert torch.allclose(network.weight, torch.tensor([[-12.0]]))


@pytest.mark.parametrize(
    ("autocast", "has_amx", "expected"), [("1", True, True), ("0", True, False), ("1", False, False)]
)
def test_batches_are_laid_out_channels_last_for_matrix_units(monkeypatch, autocast, has_amx, expected):
    monkeypatch.setenv("nnUNet_cpu_autocast", autocast)
    monkeypatch.setattr(device, "_cpu_has_amx", lambda: has_amx)
    data, _ = steps.move_batch({"data": torch.zeros(1, 2, 4, 4, 4), "target": []}, torch.device("cpu"))
    assert data.is_contiguous(memory_format=torch.channels_last_3d) is expected


def test_batches_move_with_one_target_per_resolution_or_a_single_one():
    batch = {"data": torch.zeros(1, 2, 4, 4, 4), "target": [torch.zeros(1, 1, 4, 4, 4), torch.ones(1, 1, 2, 2, 2)]}
    data, target = steps.move_batch(batch, torch.device("cpu"))
    assert data.shape == (1, 2, 4, 4, 4)
    assert [tuple(entry.shape) for entry in target] == [(1, 1, 4, 4, 4), (1, 1, 2, 2, 2)]
    assert steps.move_batch({**batch, "target": target[1]}, torch.device("cpu"))[1].shape == (1, 1, 2, 2, 2)
