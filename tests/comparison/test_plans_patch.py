"""Merge patches of plans, as RFC 7396 defines them."""

import json

import pytest

from nnunetv2.comparison.plans_patch import merge_patch, patch_plans


@pytest.mark.parametrize(
    ("target", "patch", "expected"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_examples_of_the_standard(target, patch, expected):
    assert merge_patch(target, patch) == expected


def write_plans(folder, num_stages):
    network = {"n_stages": num_stages, "features_per_stage": [32] * num_stages}
    plans = {"configurations": {"2d": {"batch_size": 9, "architecture": {"arch_kwargs": network}}}}
    file = folder / "nnUNetPlans.json"
    file.write_text(json.dumps(plans))
    return file


def patch_of(**network):
    return {"configurations": {"2d": {"batch_size": 2, "architecture": {"arch_kwargs": network}}}}


def test_one_patch_serves_networks_of_any_depth(tmp_path):
    file = write_plans(tmp_path, 3)
    patch_plans(file, patch_of(features_per_stage=[4, 8, 16, 32]))
    configuration = json.loads(file.read_text())["configurations"]["2d"]
    assert configuration["batch_size"] == 2
    assert configuration["architecture"]["arch_kwargs"]["features_per_stage"] == [4, 8, 16]


def test_a_patch_that_fits_no_network_is_refused_and_changes_nothing(tmp_path):
    file = write_plans(tmp_path, 3)
    before = file.read_text()
    with pytest.raises(ValueError, match=r"gives 2 values of features_per_stage.*has 3 stages"):
        patch_plans(file, patch_of(features_per_stage=[4, 8]))
    with pytest.raises(ValueError, match="configuration '3d', .* has 2d"):
        patch_plans(file, {"configurations": {"3d": {}}})
    assert file.read_text() == before
