"""Curves of a training as text."""

from __future__ import annotations

import csv
import io
import json
import math

import numpy as np
import torch

from nnunetv2.training.logging.curve_files import encode_csv, encode_json, write_csv, write_json

CURVES = {
    "train_losses": [np.float32(0.5), np.float64(-0.25)],
    "mean_fg_dice": [math.nan, 0.75],
    "dice_per_class_or_region": [[np.float32(0.5), math.nan], [np.float32(0.25), 1.0]],
}


def test_a_row_is_an_epoch():
    assert encode_csv(CURVES).splitlines() == [
        "epoch,train_losses,mean_fg_dice,dice_per_class_or_region/class_1,dice_per_class_or_region/class_2",
        "0,0.5,,0.5,",
        "1,-0.25,0.75,0.25,1.0",
    ]


def test_curves_of_the_user_have_columns_of_their_own():
    curves = {**CURVES, "mine": ["a, b"], "shapes": [torch.tensor([1, 2])], "none": []}
    rows = list(csv.DictReader(io.StringIO(encode_csv(curves))))
    assert rows[0]["mine"] == "a, b" and rows[1]["mine"] == ""
    assert rows[0]["shapes/class_2"] == "2" and "none" not in rows[0]


def test_the_json_holds_lists_and_null_for_what_is_no_number():
    assert json.loads(encode_json({**CURVES, "mine": [object]})) == {
        "train_losses": [0.5, -0.25],
        "mean_fg_dice": [None, 0.75],
        "dice_per_class_or_region": [[0.5, None], [0.25, 1.0]],
        "mine": ["<class 'object'>"],
    }


def test_without_an_epoch_there_is_a_header_only():
    assert encode_csv({"lrs": []}) == "epoch\n" and encode_json({"lrs": []}) == '{"lrs": []}'


def test_files_are_replaced_as_a_whole(tmp_path):
    for values in ([1.0], [1.0, 2.0]):
        write_csv({"lrs": values}, tmp_path)
        write_json({"lrs": values}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["progress.csv", "progress.json"]
    assert (tmp_path / "progress.csv").read_text() == "epoch,lrs\n0,1.0\n1,2.0\n"
