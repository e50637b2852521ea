"""Samples of one case."""

import numpy as np
import pytest

from nnunetv2.experiment_planning.dataset_fingerprint import case_sample
from nnunetv2.experiment_planning.dataset_fingerprint.case_sample import (
    draw_foreground,
    merge_equal_values,
    sample_case,
)


class ArrayReader:
    """Reads what the test puts there; a "file" is an array."""

    def read_images(self, files):
        return np.stack(files).astype(np.float32), {"spacing": [np.float64(3), 1.5, 1]}

    def read_seg(self, file):
        return file[None].astype(np.float32), {"spacing": [3, 1.5, 1]}


@pytest.fixture
def scan():
    images = np.random.default_rng(0).normal(0, 10, (2, 4, 5, 6)).astype(np.float32)
    label = np.zeros((1, 4, 5, 6), dtype=np.float32)
    label[0, 1:3, 1:4, 2:5] = 1
    label[0, 2, 2, 3] = 7
    return images, label


@pytest.mark.parametrize("num_samples", [1, 17, 5000])
def test_sample_is_the_draw_with_replacement(scan, num_samples):
    images, label = scan
    generator = np.random.RandomState(1234)
    for image, (values, counts) in zip(images, draw_foreground(label, images, num_samples=num_samples)):
        expected = generator.choice(image[label[0] > 0], num_samples, replace=True)
        assert np.array_equal(np.repeat(values, counts), np.sort(expected))
        assert values.dtype == np.float32 and counts.dtype == np.int64 and counts.sum() == num_samples


def test_sample_is_the_same_however_the_draws_are_cut(scan, monkeypatch):
    images, label = scan
    whole = draw_foreground(label, images, num_samples=1000)
    monkeypatch.setattr(case_sample, "DRAWS_AT_ONCE", 7)
    for (values, counts), (expected_values, expected_counts) in zip(
        draw_foreground(label, images, num_samples=1000), whole
    ):
        assert np.array_equal(values, expected_values) and np.array_equal(counts, expected_counts)


def test_case_without_foreground_has_empty_samples(scan):
    images, label = scan
    for values, counts in draw_foreground(label * 0, images, num_samples=10):
        assert not len(values) and not len(counts) and values.dtype == np.float32


def test_equal_values_are_merged_and_unused_ones_left_out():
    values, counts = merge_equal_values(np.float32([5, 2, 5, 9]), np.array([1, 2, 3, 0]))
    assert values.tolist() == [2, 5] and counts.tolist() == [2, 4]


def test_case_is_cropped_to_its_nonzero_region():
    image = np.zeros((6, 8, 10), dtype=np.float32)
    image[1:4, 2:7, 3:9] = 5
    sample = sample_case([image], image > 0, ArrayReader, 100)
    assert sample.shape_after_crop == (3, 5, 6)
    assert sample.relative_size == pytest.approx(90 / 480)
    assert sample.spacing == (3.0, 1.5, 1) and type(sample.spacing[0]) is float
    ((values, counts),) = sample.intensities
    assert values.tolist() == [5] and counts.tolist() == [100]


def test_label_of_another_shape_is_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"label has shape \(4, 5, 6\), the image \(4, 6, 5\)"):
        sample_case([np.ones((4, 6, 5))], np.ones((4, 5, 6)), ArrayReader, 10)


@pytest.mark.parametrize("where", ["image", "label"])
def test_nan_is_refused(where):
    arrays = {"image": np.ones((4, 5, 6)), "label": np.ones((4, 5, 6))}
    arrays[where][1, 1, 1] = np.nan
    with pytest.raises(ValueError, match=f"channel 0 of the {where} has 1 voxels that are NaN"):
        sample_case([arrays["image"]], arrays["label"], ArrayReader, 10)


def test_unexpected_number_of_channels_is_refused():
    with pytest.raises(ValueError, match=r"has 1 channel\(s\), dataset.json names 2"):
        sample_case([np.ones((4, 5, 6))], np.ones((4, 5, 6)), ArrayReader, 10, num_channels=2)
