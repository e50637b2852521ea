"""Tests of tiles, their weights and their blending."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunetv2.inference import forward_budget, logit_sums
from nnunetv2.inference.forward_budget import ForwardBudget, is_out_of_memory
from nnunetv2.inference.logit_sums import HalfSums, WindowedSums, allocate_sums
from nnunetv2.inference.mirroring import mirror_combinations, mirrored_mean
from nnunetv2.inference.sliding_window_prediction import (
    compute_gaussian,
    compute_steps_for_sliding_window,
    compute_tile_slicers,
)
from nnunetv2.inference.tile_accumulation import predict_tiles

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("image", "tile", "step", "starts"),
    [(110, 64, 0.5, [0, 23, 46]), (64, 64, 0.5, [0]), (65, 64, 1, [0, 1]), (128, 64, 1, [0, 64])],
)
def test_tiles_start_where_the_reference_starts_them(image, tile, step, starts):
    assert compute_steps_for_sliding_window((image, tile), (tile, tile), step) == [starts, [0]]


def test_an_image_smaller_than_a_tile_is_refused():
    with pytest.raises(ValueError, match="smaller than a tile"):
        compute_steps_for_sliding_window((10, 20), (10, 21), 0.5)


@pytest.mark.parametrize("step", [0, 1.1])
def test_a_step_outside_0_to_1_is_refused(step):
    with pytest.raises(AssertionError):
        compute_steps_for_sliding_window((10,), (5,), step)


def test_flat_patches_cover_each_slice():
    slicers = compute_tile_slicers((3, 20, 20), (16, 16), 0.5)
    assert len(slicers) == 12  # 3 slices x 2 x 2
    assert slicers[1] == (slice(None), 0, slice(0, 16), slice(4, 20))
    assert [slicer[1] for slicer in slicers] == sorted(slicer[1] for slicer in slicers)


def test_tiles_with_two_axes_too_few_are_refused():
    with pytest.raises(AssertionError, match="do not fit"):
        compute_tile_slicers((3, 20, 20), (16,), 0.5)


@pytest.mark.parametrize("side", [16, 128])
def test_half_precision_weights_end_at_the_smallest_number_above_zero(side):
    weights = compute_gaussian((side,) * 3, sigma_scale=1 / 8, value_scaling_factor=10, device=CPU)
    smallest = 2.0**-24  # the smallest subnormal of float16
    assert weights.dtype == torch.float16
    assert weights.max() == 10
    assert weights.min() == smallest
    assert (weights == smallest).sum() == {16: 55, 128: 18987}[side]
    assert np.unravel_index(int(weights.argmax()), weights.shape) == (side // 2,) * 3


def test_weights_of_large_flat_tiles():
    weights = compute_gaussian((512, 512), value_scaling_factor=10, device=CPU)
    assert float(weights.min()) == pytest.approx(1.13e-6, rel=0.01)


def test_weights_are_kept_until_cleared():
    compute_gaussian.cache_clear()
    assert compute_gaussian((8, 8), device=CPU) is compute_gaussian((8, 8), device=CPU)
    assert compute_gaussian.cache_info().hits == 1


def blend(image, tile_size, step=0.5, weight=1.0, predict=None, classes=2, tiles_at_once=3, slicers=None):
    """Blend tiles of which the network returns the first channel and its negative."""
    predict = predict or (lambda tiles: torch.cat((tiles[:, :1], -tiles[:, :1]), dim=1))
    return predict_tiles(
        predict,
        image,
        slicers or compute_tile_slicers(image.shape[1:], tile_size, step),
        classes=classes,
        weight=weight,
        device=CPU,
        results_device=CPU,
        budget=ForwardBudget(0),
        tiles_at_once=lambda voxels: tiles_at_once,
        leave_device=never,
        advance=lambda count: None,
    )


def never():
    raise AssertionError("the CPU is the last resort")


@pytest.mark.slow
@pytest.mark.parametrize("tile_size", [(6, 5, 4), (9, 11, 13), (5, 4)])
@pytest.mark.parametrize("is_weighted", [True, False])
def test_blending_identical_answers_changes_nothing(tile_size, is_weighted):
    image = torch.randn(1, 9, 11, 13)
    weight = compute_gaussian(tile_size, value_scaling_factor=10, dtype=torch.float32, device=CPU)
    logits = blend(image, tile_size, weight=weight if is_weighted else 1.0)
    assert logits.dtype == torch.float16
    assert logits.shape == (2, 9, 11, 13)
    torch.testing.assert_close(logits.float(), torch.cat((image, -image)), atol=2e-3, rtol=1e-3)


def test_blending_equals_the_weighted_mean_over_all_tiles():
    image, tile_size = torch.randn(1, 12, 9, 10), (5, 4, 6)
    weight = compute_gaussian(tile_size, dtype=torch.float32, device=CPU)

    def predict(tiles):  # depends on the position within the tile, so overlapping tiles disagree
        ramp = torch.arange(float(tiles[0, 0].numel())).reshape(tiles.shape[2:])
        return torch.stack([tile * ramp for tile in tiles])

    slicers = compute_tile_slicers(image.shape[1:], tile_size, 0.5)
    sums, weights = torch.zeros(image.shape, dtype=torch.float64), torch.zeros(image.shape[1:], dtype=torch.float64)
    for slicer in slicers:
        sums[slicer] += predict(image[slicer][None])[0] * weight
        weights[slicer[1:]] += weight
    logits = blend(image, tile_size, weight=weight, predict=predict, classes=1)
    torch.testing.assert_close(logits.double(), sums / weights, atol=1e-6, rtol=1e-3)


@pytest.fixture
def little_memory(monkeypatch):
    """Leave too little for sums in float32."""
    monkeypatch.setattr(logit_sums, "free_bytes", lambda device: 1000)


@pytest.mark.parametrize("is_weighted", [True, False])
@pytest.mark.parametrize("tile_size", [(6, 5, 4), (5, 4)])
def test_with_little_memory_tiles_are_added_in_half_precision(little_memory, is_weighted, tile_size, caplog):
    image = torch.randn(1, 9, 11, 13)
    weight = compute_gaussian(tile_size, value_scaling_factor=10, dtype=torch.float32, device=CPU)
    logits = blend(image, tile_size, weight=weight if is_weighted else 1.0)
    torch.testing.assert_close(logits.float(), torch.cat((image, -image)), atol=5e-3, rtol=5e-3)
    assert "adding tiles in float16" in caplog.text


def test_the_memory_decides_on_the_precision_of_sums(monkeypatch):
    wanted = WindowedSums.num_bytes(3, (10, 5, 5), 4)
    assert wanted == 2 * 3 * 250 + 4 * (3 + 1) * 100
    for free, kind in ((2 * wanted, WindowedSums), (wanted, HalfSums)):
        monkeypatch.setattr(logit_sums, "free_bytes", lambda device, free=free: free)
        assert isinstance(allocate_sums(3, (10, 5, 5), 4, CPU), kind)


def test_memory_that_torch_keeps_of_earlier_cases_counts_as_free(monkeypatch):
    total, tensors = 80, 10
    for reserved in (tensors, 60):  # for the first case, and after a large one
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, kept=reserved: (total - kept, total))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device, kept=reserved: kept)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: tensors)
        assert forward_budget.free_bytes(torch.device("cuda")) == total - tensors


def test_tiles_may_come_in_any_order():
    image = torch.randn(1, 12, 9, 10)
    slicers = compute_tile_slicers(image.shape[1:], (5, 4, 6), 0.5)
    torch.testing.assert_close(blend(image, (5, 4, 6), slicers=slicers[::-1]), blend(image, (5, 4, 6)))


def test_voxels_without_a_tile_are_zero():
    image = torch.ones(1, 12, 6, 6)
    logits = blend(image, (3, 6, 6), slicers=[(slice(None), slice(8, 11), slice(0, 6), slice(0, 6))])
    assert logits[0, :, 0, 0].tolist() == [0] * 8 + [1] * 3 + [0]


@pytest.mark.parametrize("sums", [WindowedSums(1, (1, 1, 2), 1, CPU), HalfSums(1, (1, 1, 2), CPU)])
def test_a_rim_weight_below_half_precision_does_not_round_logits(sums):
    # In the reference such voxels are rounded to whole numbers.
    sums.add(
        torch.full((1, 1, 1, 2), 0.4),
        (slice(None), slice(0, 1), slice(0, 1), slice(0, 2)),
        torch.tensor([[[6e-8, 10]]]),
    )
    np.testing.assert_allclose(sums.finish().float().numpy(), 0.4, rtol=1e-3)


@pytest.mark.parametrize("sums", [WindowedSums(2, (4, 3, 2), 4, CPU), HalfSums(2, (4, 3, 2), CPU)])
def test_sums_go_on_after_a_move(sums):
    whole = (slice(None), slice(0, 4), slice(0, 3), slice(0, 2))
    sums.add(torch.ones(2, 4, 3, 2), whole, 1.0)
    sums.move_to_(CPU)
    sums.add(3 * torch.ones(2, 4, 3, 2), whole, 1.0)
    assert (sums.finish() == 2).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_logits_that_are_not_finite_are_refused(value):
    with pytest.raises(RuntimeError, match="not finite"):
        blend(torch.full((1, 4, 4, 4), value), (4, 4, 4))


def test_an_error_in_the_network_comes_through_at_once():
    def predict(tiles):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        blend(torch.ones(1, 4, 4, 4), (4, 4, 4), predict=predict)


@pytest.mark.parametrize(
    "error",
    [torch.cuda.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_out_of_memory_makes_batches_smaller_and_keeps_what_is_done(error, caplog):
    image, predicted, budget = torch.randn(1, 4, 4, 32), [], ForwardBudget(4 * 64)

    def predict(tiles):
        if len(tiles) > 1:
            raise error
        predicted.append(len(tiles))
        return tiles

    logits = predict_tiles(
        predict,
        image,
        compute_tile_slicers((4, 4, 32), (4, 4, 4), 1),
        classes=1,
        weight=1.0,
        device=CPU,
        results_device=CPU,
        budget=budget,
        tiles_at_once=budget.items,
        leave_device=never,
        advance=lambda count: None,
    )
    assert len(predicted) == 8
    assert len(caplog.messages) == 1  # for two steps, from 4 tiles to 2 to 1
    torch.testing.assert_close(logits.float(), image, atol=1e-3, rtol=1e-3)


def test_a_network_too_large_for_its_device_goes_on_in_main_memory(caplog):
    """Tensors cannot be on an accelerator here, so the device is one in name only, where results stay on the CPU."""
    image, predicted = torch.randn(1, 4, 4, 16), []

    def predict_there(tiles):
        if predicted:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        predicted.append("there")
        return torch.as_tensor(image[:, :, :, :4])[None]

    def predict_here(tiles):
        predicted.append("here")
        return tiles

    logits = predict_tiles(
        predict_there,
        image,
        compute_tile_slicers((4, 4, 16), (4, 4, 4), 1),
        classes=1,
        weight=1.0,
        device=torch.device("meta"),
        results_device=CPU,
        budget=ForwardBudget(0),
        tiles_at_once=lambda voxels: 1,
        leave_device=lambda: predict_here,
        advance=lambda count: None,
    )
    assert predicted == ["there", "here", "here", "here"]
    assert [message for message in caplog.messages if "on the CPU" in message] == caplog.messages
    torch.testing.assert_close(logits.float(), image, atol=1e-3, rtol=1e-3)


def test_a_tile_too_large_for_main_memory_ends_the_prediction():
    def predict(tiles):
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9999 bytes.")

    with pytest.raises(RuntimeError, match="one tile alone"):
        blend(torch.ones(1, 4, 4, 4), (4, 4, 4), predict=predict)


def test_only_failed_allocations_count_as_out_of_memory():
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("anything"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (allocated 18 GB)"))
    assert not is_out_of_memory(RuntimeError("logits are not finite"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_mirrored_copies_are_ordered_by_size():
    assert mirror_combinations((0, 1, 2)) == [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
    assert mirror_combinations(()) == [()]


@pytest.mark.parametrize("copies_at_once", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("axes", [(0, 1, 2), (1,), ()])
def test_mirroring_equals_brute_force(axes, copies_at_once):
    torch.manual_seed(0)
    network = torch.nn.Conv3d(2, 3, 3, padding=1)
    tiles = torch.randn(2, 2, 5, 6, 7)
    with torch.no_grad():
        expected = torch.zeros(2, 3, 5, 6, 7)
        for choice in range(2 ** len(axes)):
            flips = [axis + 2 for i, axis in enumerate(axes) if choice >> i & 1]
            expected += torch.flip(network(torch.flip(tiles, flips)), flips) / 2 ** len(axes)
        torch.testing.assert_close(mirrored_mean(network, tiles, axes, copies_at_once), expected)


def test_mirroring_leaves_its_input_alone():
    tiles = torch.randn(1, 1, 3, 4)
    before = tiles.clone()
    mean = mirrored_mean(lambda x: x, tiles, (0, 1))
    torch.testing.assert_close(mean, before)
    torch.testing.assert_close(tiles, before)


def test_batches_follow_the_free_memory(monkeypatch):
    for free, expected in ((10**12, forward_budget._CPU_VOXELS), (2 * 1048 * 1000, 1000)):
        monkeypatch.setattr(forward_budget, "free_bytes", lambda device, free=free: free)
        assert forward_budget.budget_for(CPU, num_classes=3).voxels == expected
    assert forward_budget.budget_for(torch.device("mps"), 3).items(10) == 1  # one tile at a time
