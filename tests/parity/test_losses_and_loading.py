"""Losses, schedules, patches and transforms beside the reference release."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.data_augmentation.default_transforms import build_validation_transforms
from nnunetv2.training.logging.nnunet_logger import MetaLogger

LOSSES = """
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss, DC_and_topk_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss, SoftDiceLoss, get_tp_fp_fn_tn
from nnunetv2.training.loss.robust_ce_loss import RobustCrossEntropyLoss, TopKLoss
from nnunetv2.utilities.helpers import softmax_helper_dim1

def run(name, loss, logits, *rest):
    logits = logits.clone().requires_grad_()
    value = loss(logits, *rest)
    value.backward()
    outputs[name] = value.detach().numpy()
    outputs[name + ".gradient"] = logits.grad.numpy()

tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
for dims in (2, 3):
    logits, labels, ignored, regions, mask = (
        tensors[f"{name}{dims}"] for name in ("logits", "labels", "ignored", "regions", "mask"))
    for dice in (MemoryEfficientSoftDiceLoss, SoftDiceLoss):
        for batch in (False, True):
            for background in (False, True):
                loss = dice(softmax_helper_dim1, batch, background, 1e-5, False)
                run(f"{dims}.{dice.__name__}.{batch}.{background}", loss, logits, labels)
                run(f"{dims}.{dice.__name__}.{batch}.{background}.mask", loss, logits, labels, mask)
        kwargs = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
        ce = DC_and_CE_loss(dict(kwargs), {}, 0.7, 1.3, None, dice)
        run(f"{dims}.dc_ce.{dice.__name__}", ce, logits, labels)
        run(f"{dims}.dc_ce_ignore.{dice.__name__}", DC_and_CE_loss(dict(kwargs), {}, ignore_label=4, dice_class=dice),
            logits, ignored)
        run(f"{dims}.dc_bce.{dice.__name__}", DC_and_BCE_loss({}, dict(kwargs), dice_class=dice), logits, regions)
        run(f"{dims}.dc_bce_ignore.{dice.__name__}",
            DC_and_BCE_loss({}, dict(kwargs), use_ignore_label=True, dice_class=dice),
            logits, torch.cat([regions, ~mask], 1))
    run(f"{dims}.ce", RobustCrossEntropyLoss(), logits, labels)
    run(f"{dims}.topk", TopKLoss(k=15), logits, labels)
    run(f"{dims}.dc_topk", DC_and_topk_loss(dict(kwargs), {"k": 10, "label_smoothing": 0.1}), logits, labels)
    counts = get_tp_fp_fn_tn(torch.softmax(logits, 1), labels, (0, 2), mask, True)
    outputs[f"{dims}.counts"] = torch.stack(counts).numpy()
    ds = DeepSupervisionWrapper(RobustCrossEntropyLoss(), (0.6, 0.4, 0))
    outputs[f"{dims}.ds"] = ds([logits] * 3, [labels] * 3).numpy()
"""


def loss_inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {}
    for dims, shape in ((2, (9, 11)), (3, (5, 7, 6))):
        arrays[f"logits{dims}"] = 3 * rng.normal(size=(2, 4, *shape)).astype(np.float32)
        arrays[f"labels{dims}"] = rng.integers(0, 4, (2, 1, *shape)).astype(np.int16)
        arrays[f"ignored{dims}"] = rng.integers(0, 5, (2, 1, *shape)).astype(np.int16)
        arrays[f"regions{dims}"] = rng.random((2, 4, *shape)) < 0.4
        arrays[f"mask{dims}"] = rng.random((2, 1, *shape)) < 0.8
    return arrays


def test_losses_and_their_gradients_are_equal(reference):
    arrays = loss_inputs()
    theirs, _ = reference.run(LOSSES, **arrays)
    names = {"inputs": arrays, "outputs": {}, "np": np}
    exec(LOSSES, names)
    assert set(theirs) == set(names["outputs"]) and len(theirs) > 80
    for name, expected in theirs.items():
        np.testing.assert_allclose(names["outputs"][name], expected, rtol=1e-6, atol=1e-6, err_msg=name)


SCHEDULES = """
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.lr_scheduler.warmup import (
    Lin_incr_LRScheduler, Lin_incr_offset_LRScheduler, PolyLRScheduler_offset)

answer = {}
for build in (lambda o: PolyLRScheduler(o, 0.01, 20), lambda o: PolyLRScheduler(o, 0.01, 20, 0.5),
              lambda o: Lin_incr_LRScheduler(o, 0.01, 20), lambda o: Lin_incr_offset_LRScheduler(o, 0.01, 20, 5),
              lambda o: PolyLRScheduler_offset(o, 0.01, 20, 5)):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build(optimizer)
    rates = []
    for step in (*range(20), None, None, -1, 3, None):
        schedule.step(step)
        rates.append(optimizer.param_groups[0]["lr"])
    answer[f"{len(answer)} {type(schedule).__name__}"] = rates
"""


def test_schedules_are_equal(reference):
    _, theirs = reference.run(SCHEDULES)
    names = {}
    exec(SCHEDULES, names)
    assert set(theirs) == set(names["answer"])
    for name, rates in theirs.items():
        assert names["answer"][name] == pytest.approx(rates, rel=1e-12), name


def test_initial_patch_sizes_are_equal(reference):
    rng = np.random.default_rng(0)
    cases = [
        [rng.integers(4, 400, dims).tolist(), *np.sort(rng.uniform(-4, 4, (3, 2))).tolist(), [0.7 + rng.random(), 1.8]]
        for dims in (2, 3)
        for _ in range(100)
    ]
    _, theirs = reference.run(
        """
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
answer = [get_patch_size(p, tuple(x), tuple(y), tuple(z), tuple(s)).tolist() for p, x, y, z, s in value]
""",
        value=cases,
    )
    ours = [get_patch_size(p, tuple(x), tuple(y), tuple(z), tuple(s)).tolist() for p, x, y, z, s in cases]
    assert ours == theirs


LABELS = {"background": 0, "a": 1, "b": 2}
BOXES = """
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.label_handling.label_handling import LabelManager

class Dataset:
    identifiers = ["case"]

answer = []
for number, (labels, shape, patch, final, sides, force, present) in enumerate(value["cases"]):
    manager = LabelManager(labels, None)
    loader = nnUNetDataLoader(Dataset(), 2, patch, final, manager, 0.33, None, sides)
    locations = {1: inputs["first"], 2: inputs["second"] if present else []}
    if manager.has_ignore_label:
        locations[loader.annotated_classes_key] = inputs["annotated"]
    np.random.seed(number)
    outputs[str(number)] = np.array([loader.get_bbox(shape, force, locations) for _ in range(value["draws"])])
"""


def test_patches_are_drawn_from_the_same_distribution(reference):
    """Compare, per axis, the range and the mean of the lower corners, and the size of the patches."""
    rng = np.random.default_rng(0)
    shape = [20, 24, 30]
    voxels = {
        name: np.concatenate([np.zeros((n, 1), int), rng.integers(0, shape, (n, 3))], 1)
        for name, n in (("first", 6), ("second", 40), ("annotated", 50))
    }
    with_ignore = {**LABELS, "ignore": 3}
    cases = [
        (LABELS, shape, [12, 12, 12], [8, 8, 8], None, False, True),
        (LABELS, shape, [13, 12, 41], [8, 9, 8], None, False, True),
        (LABELS, shape, [12, 12, 12], [8, 8, 8], [2, 0, 5], False, True),
        (LABELS, shape, [12, 13, 12], [8, 8, 8], None, True, True),
        (LABELS, shape, [12, 13, 12], [8, 8, 8], None, True, False),
        (with_ignore, shape, [8, 9, 10], [8, 8, 8], None, False, True),
        (with_ignore, shape, [8, 9, 10], [8, 8, 8], None, True, True),
        (LABELS, shape, [15, 12], [11, 12], None, False, True),
        (LABELS, shape, [15, 12], [11, 12], [3, 4], True, True),
    ]
    value = {"cases": cases, "draws": 4000}
    theirs, _ = reference.run(BOXES, value=value, **voxels)
    names = {"inputs": voxels, "outputs": {}, "np": np, "value": value}
    exec(BOXES, names)
    for number, case in enumerate(cases):
        ours, expected = names["outputs"][str(number)], theirs[str(number)]
        assert np.array_equal(ours[0, 1] - ours[0, 0], expected[0, 1] - expected[0, 0]), case
        assert np.array_equal(ours[:, 0].min(0), expected[:, 0].min(0)), case
        assert np.array_equal(ours[:, 0].max(0), expected[:, 0].max(0)), case
        spread = np.maximum(expected[:, 0].std(0), 1e-9)
        difference = np.abs(ours[:, 0].mean(0) - expected[:, 0].mean(0)) / spread * np.sqrt(len(ours) / 2)
        assert difference.max() < 4.5, case  # standard errors


TARGETS = """
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
for name, scales, cascaded, foreground, regions, ignore in value:
    regions = None if regions is None else [tuple(r) if isinstance(r, list) else r for r in regions]
    transforms = nnUNetTrainer.get_validation_transforms(scales, cascaded, foreground, regions, ignore)
    result = transforms(image=torch.from_numpy(inputs["image"].copy()),
                        segmentation=torch.from_numpy(inputs["segmentation"].copy()))
    outputs[name + ".image"] = result["image"].numpy()
    targets = result["segmentation"] if isinstance(result["segmentation"], list) else [result["segmentation"]]
    for number, target in enumerate(targets):
        outputs[f"{name}.{number}"] = target.numpy()
"""
SCALES = [[1, 1, 1], [1, 0.5, 0.5], [0.5, 0.25, 0.25]]
KINDS = [
    ["labels", SCALES, False, None, None, None],
    ["single", None, False, None, None, None],
    ["regions", SCALES, False, None, [[1, 2], 2], None],
    ["regions_ignore", None, False, None, [[1, 2], [2]], 3],
    ["cascade", SCALES, True, [1, 2], None, None],
    ["cascade_regions", SCALES, True, [1, 2, 3], [[1, 2], [2, 3]], None],
]


def test_targets_are_equal(reference):
    rng = np.random.default_rng(0)
    arrays = {
        "image": rng.normal(size=(2, 8, 11, 12)).astype(np.float32),
        "segmentation": rng.integers(-1, 4, (2, 8, 11, 12)).astype(np.int16),
    }
    theirs, _ = reference.run(TARGETS, value=KINDS, **arrays)
    seen = set()
    for name, scales, cascaded, foreground, regions, ignore in KINDS:
        transforms = build_validation_transforms(scales, cascaded, foreground, regions, ignore)
        result = transforms(**{key: torch.from_numpy(array.copy()) for key, array in arrays.items()})
        targets = result["segmentation"] if isinstance(result["segmentation"], list) else [result["segmentation"]]
        ours = {f"{name}.image": result["image"], **{f"{name}.{i}": target for i, target in enumerate(targets)}}
        seen |= set(ours)
        for key, tensor in ours.items():
            assert np.array_equal(tensor.numpy(), theirs[key]) and tensor.numpy().dtype == theirs[key].dtype, key
    assert seen == set(theirs)


def test_curves_of_a_training_are_equal(reference, tmp_path):
    values = [0.5, 0.7, 0.2, 0.9]
    _, theirs = reference.run(
        """
from nnunetv2.training.logging.nnunet_logger import MetaLogger
logger = MetaLogger(value["folder"], False)
for epoch, dice in enumerate(value["values"]):
    logger.log("mean_fg_dice", dice, epoch)
answer = logger.get_checkpoint()
""",
        value={"folder": str(tmp_path), "values": values},
    )
    ours = MetaLogger(tmp_path, False)
    for epoch, dice in enumerate(values):
        ours.log("mean_fg_dice", dice, epoch)
    assert ours.get_checkpoint().keys() == theirs.keys()
    assert ours.get_value("ema_fg_dice", None) == pytest.approx(theirs["ema_fg_dice"], rel=1e-12)
