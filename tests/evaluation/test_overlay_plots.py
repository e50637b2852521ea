"""Tests of pictures with labels in colour."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import SimpleITK as sitk
from tiny_dataset import NAME, make_tiny_dataset

from nnunetv2.utilities.label_colours import color_cycle, generate_overlay, hex_to_rgb
from nnunetv2.utilities.overlay_plots import (
    entry_point_generate_overlay,
    generate_overlays_from_preprocessed,
    generate_overlays_from_raw,
    select_slice_to_plot,
    select_slice_to_plot2,
)


def test_colours():
    assert hex_to_rgb("4363d8") == hex_to_rgb("#4363d8") == (67, 99, 216)
    assert len(color_cycle) == 15 and color_cycle[0] == "000000"
    with pytest.raises(ValueError, match="no colour"):
        hex_to_rgb("red")


def test_background_stays_grey_and_labels_get_their_colour():
    image, labels = np.array([[0.0, 10.0], [20.0, 0.0]]), np.array([[0, 0], [0, 7]])
    picture = generate_overlay(image, labels)
    assert picture.dtype == np.uint8 and picture.shape == (2, 2, 3)
    assert picture[0, 0].tolist() == [0, 0, 0] and picture[1, 0].tolist() == [255, 255, 255]
    assert picture[1, 1].tolist() == [int(np.float32(0.6 * c)) for c in hex_to_rgb(color_cycle[1])]


@pytest.mark.parametrize("image", [np.full((4, 5), 3.0), np.full((4, 5, 1), np.nan), np.zeros((4, 5), np.uint8)])
def test_images_without_contrast_are_shown(image):
    labels = np.zeros((4, 5), int)
    labels[0] = 1
    picture = generate_overlay(image, labels)
    assert picture[1:].max() == 0 and picture[0].min() > 0
    assert generate_overlay(image, np.zeros((4, 5), int)).max() == 0


def test_more_labels_than_colours_and_none_of_background():
    picture = generate_overlay(np.zeros((1, 40)), np.arange(40)[None])
    assert (picture[0, 1:].max(axis=-1) > 0).all()
    assert generate_overlay(np.zeros((1, 2)), np.array([[4, 4]])).max() > 0


def test_colour_images_are_refused():
    with pytest.raises(RuntimeError, match="two axes"):
        generate_overlay(np.zeros((4, 5, 3)), np.zeros((4, 5)))
    with pytest.raises(ValueError, match="shape"):
        generate_overlay(np.zeros((4, 5)), np.zeros((5, 4)))


def test_slices_that_tell_most():
    labels = np.zeros((4, 10, 10), int)
    labels[1, :9], labels[2, 0], labels[2, 1, :3] = 1, 1, 2
    assert select_slice_to_plot(labels, labels) == 1
    assert select_slice_to_plot2(labels, labels) == 2
    assert select_slice_to_plot2(labels, labels * 0) == 0


@pytest.mark.slow
def test_preprocessed_cases(roots, tmp_path):
    make_tiny_dataset(roots["nnUNet_preprocessed"], cases=2)
    generate_overlays_from_preprocessed(NAME, str(tmp_path / "pictures"), num_processes=1)
    assert sorted(file.name for file in (tmp_path / "pictures").iterdir()) == ["case_00.png", "case_01.png"]
    with pytest.raises(ValueError, match="no channel 5"):
        generate_overlays_from_preprocessed(NAME, str(tmp_path / "pictures"), 1, channel_idx=5)
    with pytest.raises(RuntimeError, match=r"other\.json"):
        generate_overlays_from_preprocessed(NAME, str(tmp_path / "pictures"), 1, plans_identifier="other")


def test_inheriting_configurations(roots, tmp_path):
    make_tiny_dataset(roots["nnUNet_preprocessed"], cases=1)
    file = roots["nnUNet_preprocessed"] / NAME / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["child"] = {"inherits_from": "3d_fullres"}
    file.write_text(json.dumps(plans))
    generate_overlays_from_preprocessed(NAME, str(tmp_path / "pictures"), 1, configuration="child")
    assert (tmp_path / "pictures" / "case_00.png").is_file()


def test_the_command_shows_raw_cases(roots, tmp_path, monkeypatch, capsys):
    folder = roots["nnUNet_raw"] / NAME
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    labels = np.zeros((5, 9, 8), np.uint8)
    labels[3, 2:5, 2:5] = 1
    sitk.WriteImage(sitk.GetImageFromArray(labels), str(folder / "labelsTr/a.nii.gz"))
    sitk.WriteImage(sitk.GetImageFromArray(labels.astype(np.float32)), str(folder / "imagesTr/a_0000.nii.gz"))
    (folder / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": "MR"},
                "labels": {"background": 0, "x": 1},
                "numTraining": 1,
                "file_ending": ".nii.gz",
            }
        )
    )
    monkeypatch.setattr(sys, "argv", ["plot", "-d", NAME, "-o", str(tmp_path / "p"), "--use_raw", "-np", "1"])
    entry_point_generate_overlay()
    assert (tmp_path / "p" / "a.png").stat().st_size > 50
    with pytest.raises(ValueError, match="no channel 1"):
        generate_overlays_from_raw(NAME, str(tmp_path / "p"), 1, channel_idx=1)
