"""Plans of one dataset for another."""

import json
import logging

import pytest

from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints
from nnunetv2.experiment_planning.plans_for_pretraining import move_plans_between_datasets as moving
from nnunetv2.experiment_planning.plans_for_pretraining.move_plans_between_datasets import (
    move_plans_between_datasets,
    rename_data_identifier,
)

PLANS = {
    "dataset_name": "Dataset009_Source",
    "plans_name": "nnUNetPlans",
    "image_reader_writer": "NibabelIO",
    "foreground_intensity_properties_per_channel": {"0": {"mean": 3.0}},
    "configurations": {
        "2d": {"data_identifier": "nnUNetPlans_2d", "normalization_schemes": ["CTNormalization"]},
        "3d_fullres": {"data_identifier": "other", "normalization_schemes": ["CTNormalization"]},
        "mine": {"inherits_from": "2d"},
    },
}


@pytest.fixture
def target(make_scans, make_case, roots):
    """A raw dataset that has not been planned, beside the plans of another."""
    folder = make_scans({"a": make_case()}, number=2)
    source = roots["nnUNet_preprocessed"] / "Dataset009_Source"
    source.mkdir()
    (source / "nnUNetPlans.json").write_text(json.dumps(PLANS))
    return roots["nnUNet_preprocessed"] / folder.name


def test_plans_move_with_all_but_the_reader(target):
    moving.main(["-s", "9", "-t", "2", "-sp", "nnUNetPlans"])
    moved = json.loads((target / "nnUNetPlans.json").read_text())
    assert moved == {**PLANS, "dataset_name": "Dataset002_Scans", "image_reader_writer": "SimpleITKIO"}
    assert list(moved) == list(PLANS)
    assert (target / "dataset.json").is_file()


def test_another_name_renames_the_folders_of_data(target):
    move_plans_between_datasets("Dataset009_Source", 2, "nnUNetPlans", "mine")
    moved = json.loads((target / "mine.json").read_text())
    assert moved["plans_name"] == "mine"
    assert {name: configuration.get("data_identifier") for name, configuration in moved["configurations"].items()} == {
        "2d": "mine_2d",
        "3d_fullres": "mine_other",
        "mine": None,
    }


def test_identifiers_start_with_the_name_of_the_plans():
    assert rename_data_identifier("nnUNetPlans_2d", "nnUNetPlans", "mine") == "mine_2d"
    assert rename_data_identifier("nnUNetPlans_2d", "nnUNetResEncUNetLPlans", "mine") == "mine_nnUNetPlans_2d"


def test_an_existing_description_of_the_target_stays(target):
    target.mkdir()
    (target / "dataset.json").write_text("{}")
    move_plans_between_datasets(9, 2, "nnUNetPlans")
    assert (target / "dataset.json").read_text() == "{}"


def test_missing_plans_are_named(target):
    with pytest.raises(AssertionError, match="absent.json does not exist: plan Dataset009_Source first"):
        move_plans_between_datasets(9, 2, "absent")
    with pytest.raises(AssertionError, match="its raw dataset is needed"):
        move_plans_between_datasets(9, 9, "nnUNetPlans")


def test_other_channels_are_pointed_out(make_scans, make_case, target, caplog):
    make_scans({"a": make_case(num_channels=2)}, number=3)
    move_plans_between_datasets(9, 3, "nnUNetPlans")
    assert "Dataset003_Scans has 2 channel(s), the plans are for 1, and there is no" in caplog.text
    assert "dataset_fingerprint.json to adapt their normalization by" in caplog.text


@pytest.mark.slow
def test_channels_that_are_known_keep_their_normalization(make_scans, make_case, target, roots, caplog):
    caplog.set_level(logging.INFO)
    raw = make_scans({"a": make_case(num_channels=2)}, number=3)
    description = json.loads((raw / "dataset.json").read_text())
    description["channel_names"] = {"0": "MRI", "1": "CT"}
    (raw / "dataset.json").write_text(json.dumps(description))
    source, new = (roots["nnUNet_preprocessed"] / name for name in ("Dataset009_Source", raw.name))
    plans = json.loads(json.dumps(PLANS))
    for configuration in ("2d", "3d_fullres"):
        plans["configurations"][configuration]["use_mask_for_norm"] = [True]
    (source / "nnUNetPlans.json").write_text(json.dumps(plans))
    (source / "dataset.json").write_text(json.dumps({**description, "channel_names": {"0": "CT"}}))
    extract_fingerprints([3], num_processes=1)
    move_plans_between_datasets(9, 3, "nnUNetPlans")
    moved = json.loads((new / "nnUNetPlans.json").read_text())
    measured = json.loads((new / "dataset_fingerprint.json").read_text())["foreground_intensity_properties_per_channel"]
    assert moved["foreground_intensity_properties_per_channel"] == {"0": measured["0"], "1": {"mean": 3.0}}
    for name in ("2d", "3d_fullres"):
        assert moved["configurations"][name]["normalization_schemes"] == ["ZScoreNormalization", "CTNormalization"]
        assert moved["configurations"][name]["use_mask_for_norm"] == [False, True]
    assert moved["configurations"]["mine"] == {"inherits_from": "2d"}
    assert "Normalization as it was: CT; chosen and measured anew: MRI" in caplog.text
