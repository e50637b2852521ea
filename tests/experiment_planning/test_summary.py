"""The lines that nnUNetv2_plan_and_preprocess ends with."""

import shlex

import pytest

from nnunetv2.experiment_planning.summary import FolderUse, format_bytes, measure_folder, summarise
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager


def make_configuration(name, *, dims=3, **more):
    return {
        "data_identifier": f"mine_{name}",
        "batch_size": 2,
        "patch_size": [64, 96, 80][-dims:],
        "median_image_size_in_voxels": [80.0, 120.5, 100.0][-dims:],
        "spacing": [3.0, 0.79999, 0.8][-dims:],
        "architecture": {"arch_kwargs": {"strides": [[1] * dims] * 5}},
        **more,
    }


@pytest.fixture
def plans():
    return PlansManager(
        {
            "dataset_name": "Dataset001_X",
            "plans_name": "mine",
            "configurations": {
                "2d": make_configuration("2d", dims=2),
                "3d_fullres": make_configuration("3d_fullres"),
                "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
            },
        }
    )


def test_summary_has_a_line_per_configuration(plans, tmp_path):
    folder = tmp_path / "mine_3d_fullres"
    folder.mkdir()
    for case in "ab":
        (folder / f"{case}.b2nd").write_bytes(bytes(600))
        (folder / f"{case}.pkl").write_bytes(bytes(150))
    assert summarise(plans, tmp_path, 3).splitlines() == [
        "",
        "Dataset001_X: 3 training cases, plans mine",
        "  configuration       spacing [mm]   median image      patch         batch  stages  preprocessed data",
        "  2d                  0.8 x 0.8      120.5 x 100       96 x 80       2      5       none yet",
        "  3d_fullres          3 x 0.8 x 0.8  80 x 120.5 x 100  64 x 96 x 80  2      5       1.5 KB, 2 of 3 cases",
        "  3d_cascade_fullres  3 x 0.8 x 0.8  80 x 120.5 x 100  64 x 96 x 80  2      5       1.5 KB, 2 of 3 cases; "
        "starts from predictions of 3d_lowres",
        "",
        "Next: nnUNetv2_train Dataset001_X 3d_fullres 0 -p mine",
    ]
    assert summarise(plans, tmp_path, 3, trainer="nnUNetTrainerFedAvg").endswith(" 0 -tr nnUNetTrainerFedAvg -p mine")


def test_a_folder_that_is_missing_holds_nothing(tmp_path):
    assert measure_folder(tmp_path / "absent") == FolderUse(0, 0)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 KB"), (123456789, "123 MB"), (4.2e9, "4.2 GB"), (5e15, "5000 TB")],
)
def test_sizes_are_for_people(size, text):
    assert format_bytes(size) == text


def test_names_in_plans_do_not_become_commands(tmp_path):
    plans = PlansManager(
        {
            "dataset_name": "Dataset001_$(id)",
            "plans_name": "a; b\x1b[2K",
            "configurations": {"2d`id`\n": make_configuration("2d", dims=2)},
        }
    )
    lines = summarise(plans, tmp_path, 3).splitlines()
    assert lines[1] == r"Dataset001_$(id): 3 training cases, plans a; b\x1b[2K" and len(lines) == 6
    assert shlex.split(lines[-1]) == [
        "Next:",
        "nnUNetv2_train",
        "Dataset001_$(id)",
        "2d`id` ",
        "0",
        "-p",
        r"a; b\x1b[2K",
    ]


def test_configurations_too_small_to_train_are_not_recommended(plans, tmp_path):
    small = {"median_image_size_in_voxels": [5.0, 6.0, 7.0], "architecture": {"arch_kwargs": {"strides": [[1] * 3]}}}
    plans.plans["configurations"]["3d_fullres"].update(small)
    lines = summarise(plans, tmp_path, 3).splitlines()
    assert "3d_fullres cannot be trained: its images are too small, 5 x 6 x 7 voxels" in "\n".join(lines)
    assert lines[-1] == "Next: nnUNetv2_train Dataset001_X 2d 0 -p mine"
    plans = PlansManager({**plans.plans, "configurations": {"3d_fullres": make_configuration("3d_fullres", **small)}})
    assert summarise(plans, tmp_path, 3).splitlines()[-1] == "Next: correct the images, and plan again"
