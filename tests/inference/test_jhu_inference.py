"""Tests of writing one file per class."""

from __future__ import annotations

import numpy as np
import pytest

from nnunetv2.inference.JHU_inference import JHUPredictor


def read(path):
    import SimpleITK as sitk

    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"one": [1], "two": [2]}),
        (
            {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": (1, 2)},
            {"whole": [1, 2], "core": [2]},
        ),
    ],
)
def test_each_class_gets_a_mask_of_its_own(make_predictor, write_images, tmp_path, changes, expected):
    predictor = make_predictor(predictor_class=JHUPredictor, **changes)
    predictor.predict_from_files(str(write_images(["a"])), str(tmp_path / "out"), save_probabilities=True)
    labels, masks = read(tmp_path / "out" / "a.nii.gz"), tmp_path / "out" / "a" / "predictions"
    assert {path.name for path in masks.iterdir()} == {f"{name}.nii.gz" for name in expected}
    assert (tmp_path / "out" / "a.npz").is_file()
    for name, values in expected.items():
        np.testing.assert_array_equal(read(masks / f"{name}.nii.gz"), np.isin(labels, values))


def test_returned_predictions_are_the_usual_ones(make_predictor, write_images):
    (label_map,) = make_predictor(predictor_class=JHUPredictor).predict_from_files(str(write_images(["a"])), None)
    assert label_map.shape == (14, 18, 22)
