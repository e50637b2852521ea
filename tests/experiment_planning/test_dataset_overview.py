"""The picture of a dataset, and the numbers in it."""

import json

import numpy as np
import pytest

from nnunetv2.experiment_planning.dataset_look import CaseLook, DatasetOverview
from nnunetv2.experiment_planning.dataset_overview import (
    describe_intensities,
    foreground_labels,
    look_at_dataset,
    spread_evenly,
    write_dataset_overview,
)
from nnunetv2.experiment_planning.overview_picture import draw_overview, find_outliers
from nnunetv2.preprocessed_data.fingerprint_files import find_local_fingerprint, forget_pooled_fingerprint


def make_overview(*, num_cases=5, num_channels=1, num_labels=2, slices=6, scale=1.0):
    rng = np.random.default_rng(0)
    looks = [
        CaseLook(
            f"case_{i}",
            np.sort(rng.normal(100, 20 * scale, (num_channels, 5)), axis=1),
            {label: int(rng.integers(0, 50)) for label in range(1, num_labels + 1)},
            4.0,
        )
        for i in range(num_cases)
    ]
    return DatasetOverview(
        "Dataset001_X",
        num_cases,
        np.full((num_cases, 3), (slices, 30, 40)),
        np.full((num_cases, 3), (3.0, 1.0, 1.0)),
        [f"channel {i}" for i in range(num_channels)],
        {f"label {i}": [i] for i in range(1, num_labels + 1)},
        looks,
    )


@pytest.mark.slow
def test_dataset_is_looked_at(make_scans, make_case, tmp_path):
    folder = make_scans(
        {f"case_{i}": make_case(i, num_channels=2) for i in range(3)},
        labels={"background": 0, "whole": [1, 2], "core": 2},
        regions_class_order=[1, 2],
    )
    fingerprint = tmp_path / "dataset_fingerprint.json"
    fingerprint.write_text(json.dumps({"shapes_after_crop": [[6, 8, 10]] * 3, "spacings": [[3.0, 1.5, 1.0]] * 3}))
    overview = look_at_dataset(folder, fingerprint)
    assert overview.num_cases == 3 and [look.case for look in overview.looks] == ["case_0", "case_1", "case_2"]
    assert overview.looks[0].intensities.shape == (2, 5)
    # 3 x 4 x 5 voxels of 4.5 mm3, 2 x 2 of them core
    assert overview.label_sizes("whole") == pytest.approx([60 * 4.5 / 1000] * 3)
    assert overview.label_sizes("core") == pytest.approx([4 * 4.5 / 1000] * 3)
    write_dataset_overview(folder, fingerprint, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"num_cases": 1},
        {"num_channels": 11, "num_labels": 60},
        {"slices": 1},
        {"num_labels": 0},
        {"scale": 1e4, "num_cases": 100},
    ],
)
def test_every_kind_of_dataset_can_be_drawn(kind, tmp_path):
    draw_overview(make_overview(**kind)).savefig(tmp_path / "picture.png", dpi=40)
    assert (tmp_path / "picture.png").is_file()


def test_sizes_of_flat_images_are_pixels():
    assert make_overview(slices=1).label_sizes("label 1").tolist() == [
        look.label_voxels[1] for look in make_overview().looks
    ]


def test_intensities_are_those_of_the_foreground():
    image, label = np.arange(8.0).reshape(2, 2, 2), np.zeros((2, 2, 2))
    assert describe_intensities(image, label)[2] == 4  # median of 1 to 7: 0 is air
    label[1, 1] = 1
    assert describe_intensities(image, label)[2] == 6.5
    assert describe_intensities(np.zeros((2, 2, 2)), np.zeros((2, 2, 2))).tolist() == [0] * 5


def test_cases_are_spread_over_the_dataset():
    assert spread_evenly([1, 2, 3], 5) == [1, 2, 3]
    assert spread_evenly(range(100), 4) == [0, 33, 66, 99]


def test_background_is_no_label_of_interest():
    assert foreground_labels({"background": 0, "air": [0], "a": 1, "b": (1, 2)}) == {"a": [1], "b": [1, 2]}


def test_a_case_far_from_all_others_is_named():
    assert find_outliers(np.array([1.0, 1.1, 0.9, 50.0, 1.05])) == [3]
    assert find_outliers(np.array([1.0, 1.1, 0.9])) == []
    assert find_outliers(np.array([2.0, 2.0, 2.0, 3.0])) == [3]
    assert find_outliers(np.zeros(3)) == []


def test_the_own_fingerprint_of_a_site_lies_beside_the_pooled_one(tmp_path):
    assert find_local_fingerprint(tmp_path).name == "dataset_fingerprint.json"
    (tmp_path / "dataset_fingerprint_local.json").touch()
    assert find_local_fingerprint(tmp_path).name == "dataset_fingerprint_local.json"
    forget_pooled_fingerprint(tmp_path)
    assert find_local_fingerprint(tmp_path).name == "dataset_fingerprint.json"
