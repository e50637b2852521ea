"""The picture of augmented patches at the start of a training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunetv2.training.data_augmentation import example_picture
from nnunetv2.training.data_augmentation.example_picture import (
    choose_views,
    overlay,
    save_augmentation_examples,
    stretch,
)


def make_batch(spatial=(6, 20, 18), channels=2, regions=False, deep_supervision=True) -> dict:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn((2, channels, *spatial), generator=generator)
    target = torch.zeros((2, 1, *spatial), dtype=torch.int16)
    target[1, ..., 4:9, 5:12] = 1
    target[1, ..., 6:8, 7:9] = 2
    if regions:
        target = torch.cat([target > 0, target == 2], 1)
    return {
        "data": data,
        "target": [target, target[..., ::2]] if deep_supervision else target,
        "keys": np.array(["empty", "full"]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("spatial", [(6, 20, 18), (20, 18)])
@pytest.mark.parametrize("regions", [False, True])
def test_a_picture_is_written(tmp_path, spatial, regions):
    from matplotlib.image import imread

    path = tmp_path / "augmentation_examples.png"
    save_augmentation_examples(
        path,
        [make_batch(spatial, regions=regions, deep_supervision=not regions)],
        spacing=(3, 1, 1)[-len(spatial) :],
        names={1: "tumour"},
    )
    picture = imread(path)
    assert picture.ndim == 3 and picture.std() > 0.05
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.slow
def test_samples_with_foreground_come_first_and_few_are_shown(tmp_path, monkeypatch):
    drawn, draw = [], example_picture._draw
    monkeypatch.setattr(example_picture, "_draw", lambda samples, *rest: drawn.extend(samples) or draw(samples, *rest))
    save_augmentation_examples(tmp_path / "p.png", [make_batch()] * 2, max_samples=3, names={1: "tumour"})
    assert [sample.key for sample in drawn] == ["full", "full", "empty"]
    assert sorted(drawn[0].masks) == ["label 2", "tumour"] and drawn[2].masks == {}


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no sample"):
        save_augmentation_examples(tmp_path / "p.png", [])


def test_patches_without_foreground_are_drawn_too(tmp_path):
    batch = make_batch()
    batch["target"] = torch.zeros_like(batch["target"][0])
    save_augmentation_examples(tmp_path / "p.png", [batch])
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_the_slices_with_the_most_foreground_are_shown():
    mask = np.zeros((4, 6, 8), bool)
    mask[3, 1:3, 5] = mask[2, 1, 5] = True
    assert [(view.axis, view.index) for view in choose_views([mask], mask.shape)] == [(0, 3), (1, 1), (2, 5)]
    assert [view.index for view in choose_views([], mask.shape)] == [2, 3, 4]
    assert choose_views([mask], mask.shape)[1].cut(mask).shape == (4, 8)
    assert [view.axis for view in choose_views([], (5, 6))] == [None]


def test_masks_are_outlined_strongly_and_filled_lightly():
    mask = np.zeros((5, 5), bool)
    mask[1:4, 1:4] = True
    painted = overlay(np.zeros((5, 5)), [mask], [(1, 0, 0)])
    assert painted[0, 0].tolist() == [0, 0, 0]
    assert painted[2, 2] == pytest.approx([0.2, 0, 0])
    assert painted[1, 2] == pytest.approx([0.9, 0, 0])
    mask[:2] = True
    at_the_edge = overlay(np.zeros((5, 5)), [mask], [(1, 0, 0)])[0, 2]
    assert at_the_edge == pytest.approx([0.2, 0, 0])


def test_intensities_are_stretched_and_flaws_are_white():
    image = np.array([[0.0, 5.0], [10.0, np.nan]])
    assert stretch(image) == pytest.approx(np.array([[0, 0.5], [1, 1]]), abs=0.01)
    assert stretch(np.full((2, 2), np.nan)).tolist() == [[1, 1], [1, 1]]
    assert stretch(np.full((2, 2), 3.0)).tolist() == [[0, 0], [0, 0]]
