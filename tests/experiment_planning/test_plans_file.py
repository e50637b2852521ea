"""Plans and splits beside existing files."""

import json
import logging

import pytest

from nnunetv2.errors import InvalidInputError
from nnunetv2.experiment_planning.experiment_planners.plans_file import write_plans
from nnunetv2.experiment_planning.experiment_planners.splits import adopt_splits


def make_plans(*names, spacing=(1.0, 1.0, 1.0), identifier="nnUNetPlans_3d_fullres"):
    return {
        "transpose_forward": [0, 1, 2],
        "configurations": {name: {"data_identifier": identifier, "spacing": spacing} for name in names},
    }


def read(file):
    return json.loads(file.read_text())


def test_configurations_of_users_survive_new_plans(tmp_path):
    file = tmp_path / "nnUNetPlans.json"
    write_plans(make_plans("2d", "my_large_patch"), file)
    write_plans(make_plans("2d", "3d_fullres", spacing=(2.0, 1.0, 1.0)), file)
    assert list(read(file)["configurations"]) == ["2d", "3d_fullres", "my_large_patch"]
    assert read(file)["configurations"]["2d"]["spacing"] == [2, 1, 1]


def test_lowres_of_an_earlier_planning_goes(tmp_path, caplog):
    file = tmp_path / "nnUNetPlans.json"
    write_plans(make_plans("2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres", "mine"), file)
    write_plans(make_plans("2d", "3d_fullres"), file)
    assert list(read(file)["configurations"]) == ["2d", "3d_fullres", "mine"]
    assert "3d_lowres, 3d_cascade_fullres of an earlier planning removed" in caplog.text


def test_lowres_stays_where_a_configuration_of_the_user_builds_on_it(tmp_path, caplog):
    file = tmp_path / "nnUNetPlans.json"
    plans = make_plans("3d_lowres", "3d_fullres", "3d_cascade_fullres", "mine", "mine too")
    plans["configurations"]["mine"]["inherits_from"] = "mine too"
    plans["configurations"]["mine too"]["previous_stage"] = "3d_lowres"
    write_plans(plans, file)
    write_plans(make_plans("3d_fullres"), file)
    assert list(read(file)["configurations"]) == ["3d_fullres", "3d_lowres", "mine", "mine too"]
    assert "keeps 3d_lowres from an earlier planning, because" in caplog.text


def test_shared_folder_with_other_data_is_reported(tmp_path, caplog):
    write_plans(make_plans("3d_fullres"), tmp_path / "nnUNetPlans.json")
    write_plans(make_plans("3d_fullres", spacing=(1.0, 1.0, 2.0)), tmp_path / "nnUNetResEncUNetLPlans.json")
    assert "share the folder nnUNetPlans_3d_fullres but differ in spacing" in caplog.text


def test_shared_folder_with_the_same_data_is_fine(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    (tmp_path / "dataset.json").write_text("{}")
    (tmp_path / "splits_final.json").write_text("[]")
    write_plans(make_plans("3d_fullres"), tmp_path / "nnUNetPlans.json")
    write_plans(make_plans("3d_fullres"), tmp_path / "nnUNetResEncUNetLPlans.json")
    assert not caplog.text


@pytest.fixture
def folders(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "splits_final.json").write_text(json.dumps([{"train": ["a", "b"], "val": ["c"]}]))
    return raw, tmp_path / "preprocessed"


def test_splits_are_copied(folders):
    adopt_splits(*folders)
    assert read(folders[1] / "splits_final.json") == [{"train": ["a", "b"], "val": ["c"]}]


def test_equal_splits_and_further_folds_are_accepted(folders):
    adopt_splits(*folders)
    content = [{"train": ["b", "a"], "val": ["c"]}, {"train": ["c"], "val": ["a"]}]
    (folders[1] / "splits_final.json").write_text(json.dumps(content))
    adopt_splits(*folders)
    assert read(folders[1] / "splits_final.json") == content


@pytest.mark.parametrize("content", [[], [{"train": ["a"], "val": ["c"]}], [{"train": ["a", "b"], "val": ["d"]}]])
def test_differing_splits_are_refused(folders, content):
    adopt_splits(*folders)
    (folders[1] / "splits_final.json").write_text(json.dumps(content))
    with pytest.raises(InvalidInputError, match="fold 0 of"):
        adopt_splits(*folders)
