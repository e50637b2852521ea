"""JSON export, splits, collation, file names, weights: one line of behaviour each."""

import json
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.model_selection import KFold

from nnunetv2.utilities.collate_outputs import collate_outputs
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.file_endings import split_channel, strip_ending
from nnunetv2.utilities.helpers import dummy_context, empty_cache, softmax_helper_dim0, softmax_helper_dim1
from nnunetv2.utilities.json_export import fix_types_iterable, recursive_fix_for_json_export
from nnunetv2.utilities.network_initialization import InitWeights_He

Point = namedtuple("Point", "x y")


def test_json_export_in_place_at_any_depth():
    content = {
        np.int64(3): (np.float32(1.5), [np.int16(2), {"d": np.uint64(4)}]),
        "a": np.array([[1, 2], [3, 4]]),
        "b": {np.uint8(1): np.bool_(True)},
        "path": Path("/x"),
        "device": torch.device("cpu"),
        "names": np.array(["n"]),
        "point": Point(np.int8(1), 2),
        "scalar": np.array(5),
        "same": None,
    }
    assert recursive_fix_for_json_export(content) is None
    assert content == {
        3: (1.5, [2, {"d": 4}]),
        "a": [[1, 2], [3, 4]],
        "b": {1: True},
        "path": "/x",
        "device": "cpu",
        "names": ["n"],
        "point": Point(1, 2),
        "scalar": 5,
        "same": None,
    }
    assert type(content[3][0]) is float and type(content["names"][0]) is str and content["b"][1] is True
    assert list(content)[:2] == [3, "a"]
    json.dumps(content)


def test_fix_types_iterable():
    assert fix_types_iterable(np.array([1, 2]), tuple) == (1, 2)


def test_split_golden_values():
    folds = generate_crossval_split([f"case_{i:02d}" for i in range(10)])
    assert [fold["val"] for fold in folds] == [
        ["case_00", "case_07"],
        ["case_03", "case_09"],
        ["case_04", "case_06"],
        ["case_01", "case_08"],
        ["case_02", "case_05"],
    ]
    assert folds[0]["train"] == [f"case_{i:02d}" for i in (1, 2, 3, 4, 5, 6, 8, 9)]
    json.dumps(folds)


@given(st.integers(2, 40), st.integers(0, 100), st.integers(2, 7))
def test_split_equals_scikit_learn(n, seed, n_splits):
    names = np.array([f"c{i}" for i in range(n)])
    if n < n_splits:
        with pytest.raises(ValueError, match=f"cannot split {n}"):
            generate_crossval_split(names, seed, n_splits)
        return
    expected = [
        {"train": list(names[train]), "val": list(names[val])}
        for train, val in KFold(n_splits, shuffle=True, random_state=seed).split(names)
    ]
    assert generate_crossval_split(names, seed, n_splits) == expected


def test_collate_by_type():
    merged = collate_outputs(
        [
            {"lr": np.float32(1), "loss": np.array(3.0), "tp": np.zeros(3), "keys": ["a"]},
            {"lr": np.float32(2), "loss": np.array(4.0), "tp": np.ones(3), "keys": ["b", "c"]},
        ]
    )
    assert merged["lr"] == [1, 2] and merged["keys"] == ["a", "b", "c"]
    assert merged["tp"].shape == (2, 3)
    assert merged["loss"].tolist() == [[3.0], [4.0]]  # a column, as in the release
    with pytest.raises(ValueError, match="'x'"):
        collate_outputs([{"x": object()}])


def test_endings_of_two_suffixes():
    assert strip_ending("liver_1.nii.gz", ".nii.gz") == "liver_1"
    with pytest.raises(ValueError, match=r"liver\.png"):
        strip_ending("liver.png", ".nii.gz")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("liver_1_0002.nii.gz", ("liver_1", 2)),
        ("a_b_0000.nii.gz", ("a_b", 0)),
        ("liver.nii.gz", None),
        ("liver_002.nii.gz", None),
        ("liver_00002.nii.gz", None),
        ("_0000.nii.gz", None),
        ("liver_0000xnii.gz", None),
    ],
)
def test_channel_of_a_file_name(name, expected):
    assert split_channel(name, ".nii.gz") == expected


def test_helpers():
    x = torch.rand(2, 3)
    assert torch.allclose(softmax_helper_dim0(x).sum(0), torch.ones(3))
    assert torch.allclose(softmax_helper_dim1(x).sum(1), torch.ones(2))
    empty_cache(torch.device("cpu"))
    with dummy_context():
        pass
    with pytest.raises(ZeroDivisionError), dummy_context():
        raise ZeroDivisionError


def test_he_initialisation_of_convolutions_only():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv3d(16, 64, 3), torch.nn.InstanceNorm3d(64, affine=True))
    network.apply(InitWeights_He(0.1))
    assert network[0].bias.abs().sum() == 0
    expected = (2 / (1 + 0.1**2) / (16 * 27)) ** 0.5
    assert network[0].weight.std().item() == pytest.approx(expected, rel=0.02)
    assert network[1].weight.eq(1).all()
