"""Plans of known datasets."""

import importlib
import json
import subprocess
import sys
import warnings

import numpy as np
import pytest

from nnunetv2.errors import InvalidInputError
from nnunetv2.experiment_planning.experiment_planners.architecture import class_path
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.resampling.planners_no_resampling import (
    nnUNetPlannerResEncL_noResampling,
)
from nnunetv2.experiment_planning.experiment_planners.resampling.resample_with_torch import (
    nnUNetPlanner_torchres,
    nnUNetPlannerResEncL_torchres_sepz,
)
from nnunetv2.experiment_planning.experiment_planners.resencUNet_planner import usual_plans_name
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    ResEncUNetPlanner,
    nnUNetPlannerResEncL,
    nnUNetPlannerResEncM,
    nnUNetPlannerResEncXL,
)

PLANNERS = {
    "plain": ExperimentPlanner,
    "M": nnUNetPlannerResEncM,
    "L": nnUNetPlannerResEncL,
    "XL": nnUNetPlannerResEncXL,
}

LIVER = {
    "spacings": [[1, 0.7676, 0.7676]] * 5 + [[0.7, 0.8, 0.8]] * 4,
    "shapes": [[432, 512, 512]] * 9,
    "num_training": 131,
}
HIPPOCAMPUS = {"spacings": [[1, 1, 1]], "shapes": [[36, 50, 35]], "num_training": 260, "channels": ["MR"]}
PROSTATE = {
    "spacings": [[3.6, 0.625, 0.625]],
    "shapes": [[20, 320, 319]],
    "num_training": 32,
    "channels": ["T2", "ADC"],
}
ACDC = {
    "spacings": [[10, 1.5625, 1.5625]] * 6 + [[5, 1.4, 1.4]] * 4,
    "shapes": [[9, 256, 216]] * 10,
    "num_training": 200,
    "channels": ["MR"],
    "labels": {"background": 0, "a": 1, "b": 2, "c": 3},
}
ROAD = {
    "spacings": [[999, 1, 1]],
    "shapes": [[1, 1500, 1500]],
    "num_training": 770,
    "channels": ["R", "G", "B"],
    "labels": {"background": 0, "road": 1},
}
BRATS = {
    "spacings": [[1, 1, 1]],
    "shapes": [[140, 171, 137]],
    "num_training": 1251,
    "channels": ["T1", "T1ce", "T2", "Flair"],
    "relative_size": 0.36,
    "regions_class_order": [1, 2, 3],
    "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]},
}

# dataset, planner -> configuration -> patch, batch size
GOLDEN = [
    (LIVER, "plain", {"2d": ([512, 512], 12), "3d_fullres": ([128] * 3, 2), "3d_lowres": ([128] * 3, 2)}),
    (LIVER, "M", {"2d": ([512, 512], 12), "3d_fullres": ([128] * 3, 2), "3d_lowres": ([128] * 3, 2)}),
    (LIVER, "L", {"2d": ([512, 512], 35), "3d_fullres": ([160, 224, 192], 2), "3d_lowres": ([160, 224, 192], 2)}),
    (LIVER, "XL", {"2d": ([512, 512], 52), "3d_fullres": ([192, 256, 256], 2), "3d_lowres": ([192, 256, 256], 2)}),
    (HIPPOCAMPUS, "plain", {"2d": ([56, 40], 366), "3d_fullres": ([40, 56, 40], 9)}),
    (HIPPOCAMPUS, "M", {"2d": ([56, 40], 1618), "3d_fullres": ([40, 56, 40], 58)}),
    (HIPPOCAMPUS, "L", {"2d": ([56, 40], 4554), "3d_fullres": ([40, 56, 40], 178)}),
    (HIPPOCAMPUS, "XL", {"2d": ([56, 40], 6711), "3d_fullres": ([40, 56, 40], 183)}),
    (PROSTATE, "plain", {"2d": ([320, 320], 32), "3d_fullres": ([20, 320, 256], 2)}),
    (PROSTATE, "M", {"2d": ([320, 320], 32), "3d_fullres": ([20, 256, 256], 2)}),
    (PROSTATE, "L", {"2d": ([320, 320], 90), "3d_fullres": ([20, 320, 320], 5)}),
    (PROSTATE, "XL", {"2d": ([320, 320], 133), "3d_fullres": ([20, 320, 320], 8)}),
    (ACDC, "plain", {"2d": ([256, 224], 56), "3d_fullres": ([20, 256, 224], 4)}),
    (ACDC, "M", {"2d": ([256, 224], 57), "3d_fullres": ([20, 256, 224], 3)}),
    (ACDC, "L", {"2d": ([256, 224], 161), "3d_fullres": ([20, 256, 224], 10)}),
    (ACDC, "XL", {"2d": ([256, 224], 238), "3d_fullres": ([20, 256, 224], 17)}),
    (ROAD, "plain", {"2d": ([1280, 1024], 2)}),
    (ROAD, "M", {"2d": ([512, 512], 13)}),
    (ROAD, "L", {"2d": ([896, 768], 13)}),
    (ROAD, "XL", {"2d": ([1024, 1024], 13)}),
    (BRATS, "plain", {"2d": ([192, 160], 105), "3d_fullres": ([128] * 3, 2)}),
    (BRATS, "M", {"2d": ([192, 160], 107), "3d_fullres": ([128] * 3, 2)}),
    (BRATS, "L", {"2d": ([192, 160], 301), "3d_fullres": ([160, 192, 160], 3)}),
    (BRATS, "XL", {"2d": ([192, 160], 444), "3d_fullres": ([160, 192, 160], 5)}),
]


@pytest.fixture
def plan(make_planned_dataset):
    def plan(dataset, planner=ExperimentPlanner, **arguments):
        return planner(make_planned_dataset(**dataset), **arguments).plan_experiment()

    return plan


@pytest.mark.parametrize(("dataset", "planner", "expected"), GOLDEN)
def test_patch_and_batch_equal_known_values(plan, dataset, planner, expected):
    configurations = plan(dataset, PLANNERS[planner])["configurations"]
    planned = {
        name: (list(configuration["patch_size"]), configuration["batch_size"])
        for name, configuration in configurations.items()
        if "patch_size" in configuration
    }
    assert planned == expected


@pytest.mark.parametrize(
    ("planner", "median", "spacing"),
    [
        ("plain", [178, 211, 211], [2.4273, 1.8632, 1.8632]),
        ("L", [269, 319, 319], [1.6047, 1.2318, 1.2318]),
        ("XL", [321, 381, 381], [1.3439, 1.0316, 1.0316]),
    ],
)
def test_lowres_of_large_images_equals_known_values(plan, planner, median, spacing):
    configurations = plan(LIVER, PLANNERS[planner])["configurations"]
    lowres = configurations["3d_lowres"]
    assert list(lowres["median_image_size_in_voxels"]) == median
    assert lowres["spacing"] == pytest.approx(spacing, abs=5e-5)
    assert lowres["next_stage"] == "3d_cascade_fullres" and lowres["batch_dice"] is False
    assert configurations["3d_fullres"]["batch_dice"] is True
    assert configurations["3d_cascade_fullres"] == {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}


@pytest.mark.parametrize(
    ("dataset", "stages"),
    [
        (LIVER, {"2d": 8, "3d_fullres": 6}),
        (HIPPOCAMPUS, {"3d_fullres": 4}),
        (PROSTATE, {"3d_fullres": 7}),
        (ACDC, {"3d_fullres": 6}),
        (ROAD, {"2d": 9}),
        (BRATS, {"3d_fullres": 6}),
    ],
)
def test_depth_equals_known_values(plan, dataset, stages):
    configurations = plan(dataset)["configurations"]
    for name, expected in stages.items():
        assert configurations[name]["architecture"]["arch_kwargs"]["n_stages"] == expected


def test_largest_preset_goes_deeper_on_large_images(plan):
    arguments = plan(LIVER, nnUNetPlannerResEncXL)["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    assert np.prod(arguments["strides"], axis=0).tolist() == [32, 64, 64]


def test_plans_file_has_the_keys_in_their_order(plan, roots):
    plan(PROSTATE)
    plans = json.loads((roots["nnUNet_preprocessed"] / "Dataset001_Made" / "nnUNetPlans.json").read_text())
    assert list(plans) == [
        "dataset_name",
        "plans_name",
        "original_median_spacing_after_transp",
        "original_median_shape_after_transp",
        "image_reader_writer",
        "transpose_forward",
        "transpose_backward",
        "configurations",
        "experiment_planner_used",
        "label_manager",
        "foreground_intensity_properties_per_channel",
    ]
    assert list(plans["configurations"]) == ["2d", "3d_fullres"]
    assert list(plans["configurations"]["2d"]) == [
        "data_identifier",
        "preprocessor_name",
        "batch_size",
        "patch_size",
        "median_image_size_in_voxels",
        "spacing",
        "normalization_schemes",
        "use_mask_for_norm",
        "resampling_fn_data",
        "resampling_fn_seg",
        "resampling_fn_data_kwargs",
        "resampling_fn_seg_kwargs",
        "resampling_fn_probabilities",
        "resampling_fn_probabilities_kwargs",
        "architecture",
        "batch_dice",
    ]
    assert plans["configurations"]["2d"]["architecture"]["arch_kwargs"] == {
        "n_stages": 7,
        "features_per_stage": [32, 64, 128, 256, 512, 512, 512],
        "conv_op": "torch.nn.modules.conv.Conv2d",
        "kernel_sizes": [[3, 3]] * 7,
        "strides": [[1, 1]] + [[2, 2]] * 6,
        "n_conv_per_stage": [2] * 7,
        "n_conv_per_stage_decoder": [2] * 6,
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


def test_dataset_json_is_copied(plan, roots):
    plan(PROSTATE)
    raw, copy = (roots[root] / "Dataset001_Made" / "dataset.json" for root in ("nnUNet_raw", "nnUNet_preprocessed"))
    assert raw.read_text() == copy.read_text()


def test_mask_normalization_needs_zscore_and_a_large_border(plan):
    dataset = {**BRATS, "channels": ["T1", "CT", "rescale_to_0_1", "noNorm"]}
    fullres = plan(dataset)["configurations"]["3d_fullres"]
    assert fullres["normalization_schemes"] == [
        "ZScoreNormalization",
        "CTNormalization",
        "RescaleTo01Normalization",
        "NoNormalization",
    ]
    assert fullres["use_mask_for_norm"] == [True, False, False, False]


def test_spacing_can_be_overwritten_and_decides_the_axis_order(plan):
    plans = plan(HIPPOCAMPUS, overwrite_target_spacing=[1.0, 2.0, 1.0])
    assert plans["transpose_forward"] == [1, 0, 2]
    assert plans["configurations"]["3d_fullres"]["spacing"] == [2, 1, 1]
    assert plans["configurations"]["2d"]["spacing"] == [1, 1]


@pytest.mark.parametrize("spacing", [[], [1.0, 1.0], [1.0] * 4, [1, 1, 1], [1.0, 0.0, 1.0], [1.0, -1.0, 1.0]])
def test_spacing_must_be_three_positive_floats(plan, spacing):
    with pytest.raises(InvalidInputError, match="three positive floats"):
        plan(HIPPOCAMPUS, overwrite_target_spacing=spacing)


def test_transposition_can_be_suppressed(plan):
    dataset = {**HIPPOCAMPUS, "spacings": [[1, 1, 3]], "shapes": [[36, 50, 20]]}
    assert plan(dataset, suppress_transpose=True)["transpose_forward"] == [0, 1, 2]


def test_number_of_training_cases_bounds_the_batch(make_planned_dataset):
    planner = ExperimentPlanner(make_planned_dataset(**HIPPOCAMPUS))
    planner.num_training_cases = 26
    assert planner.plan_experiment()["configurations"]["2d"]["batch_size"] == 37


def test_memory_target_scales_the_patch(plan):
    patch = plan(LIVER, gpu_memory_target_in_gb=24)["configurations"]["3d_fullres"]["patch_size"]
    assert np.prod(patch) > 2 * 128**3


def test_hopeless_memory_target_is_refused(plan):
    with pytest.raises(InvalidInputError, match="no patch is small enough"):
        plan(LIVER, gpu_memory_target_in_gb=1e-7)


def test_missing_fingerprint_is_named(plan, roots):
    plan(HIPPOCAMPUS)
    (roots["nnUNet_preprocessed"] / "Dataset001_Made" / "dataset_fingerprint.json").unlink()
    with pytest.raises(RuntimeError, match="dataset_fingerprint.json is missing"):
        ExperimentPlanner(1)


def test_network_of_a_user_is_asked_for_its_size(make_planned_dataset, caplog):
    class Planner(ExperimentPlanner):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            from tests_network import FrugalUNet

            self.UNet_class = FrugalUNet

    import sys
    import types

    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    module = types.ModuleType("tests_network")
    module.FrugalUNet = type(
        "FrugalUNet",
        (PlainConvUNet,),
        {"compute_conv_feature_map_size": lambda self, size: 10 * int(np.prod(size)), "__module__": "tests_network"},
    )
    sys.modules["tests_network"] = module
    try:
        plans = Planner(make_planned_dataset(**HIPPOCAMPUS)).plan_experiment()
    finally:
        del sys.modules["tests_network"]
    fullres = plans["configurations"]["3d_fullres"]
    assert fullres["architecture"]["network_class_name"] == "tests_network.FrugalUNet"
    assert "nnUNet_extPackages names tests_network" in caplog.text  # or nobody could train with these plans
    # 560e6 / (10 * 40 * 56 * 40) * 2 = 1250 samples fit; 5 % of the voxels are 9 patches
    assert fullres["batch_size"] == 9


def test_presets_warn_about_other_memory(make_planned_dataset):
    dataset = make_planned_dataset(**HIPPOCAMPUS)
    with pytest.warns(UserWarning, match="meant for 24 GB"):
        nnUNetPlannerResEncL(dataset, gpu_memory_target_in_gb=12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nnUNetPlannerResEncL(dataset)


def test_residual_planner_is_one_class_under_both_paths():
    module = importlib.import_module("nnunetv2.experiment_planning.experiment_planners.resencUNet_planner")
    assert module.ResEncUNetPlanner is ResEncUNetPlanner


def test_residual_plans_share_the_data_of_the_default_plans(plan):
    configurations = plan(LIVER, nnUNetPlannerResEncL)["configurations"]
    assert configurations["2d"]["data_identifier"] == "nnUNetPlans_2d"
    assert configurations["3d_fullres"]["data_identifier"] == "nnUNetPlans_3d_fullres"
    assert configurations["3d_lowres"]["data_identifier"] == "nnUNetResEncUNetLPlans_3d_lowres"


def test_residual_plans_with_a_name_of_their_own_have_data_of_their_own(plan):
    configurations = plan(LIVER, nnUNetPlannerResEncL, plans_name="mine")["configurations"]
    assert [configurations[name]["data_identifier"] for name in ("2d", "3d_fullres", "3d_lowres")] == [
        "mine_2d",
        "mine_3d_fullres",
        "mine_3d_lowres",
    ]


def test_planners_of_users_share_data_under_their_usual_name(plan):
    class Mine(nnUNetPlannerResEncL):
        def __init__(
            self,
            dataset,
            gpu_memory_target_in_gb=24,
            preprocessor_name="DefaultPreprocessor",
            plans_name="minePlans",
            overwrite_target_spacing=None,
            suppress_transpose=False,
        ):
            super().__init__(
                dataset,
                gpu_memory_target_in_gb,
                preprocessor_name,
                plans_name,
                overwrite_target_spacing,
                suppress_transpose,
            )

    class Thin(Mine):
        pass

    for planner in (Mine, Thin):
        assert usual_plans_name(planner) == "minePlans"
    assert plan(HIPPOCAMPUS, Thin)["configurations"]["2d"]["data_identifier"] == "nnUNetPlans_2d"


def test_network_class_is_given_as_class_or_path(plan):
    from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualUNet

    class Mine(ExperimentPlanner):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            assert self.UNet_class is PlainConvUNet
            self.UNet_class = PlainConvUNet
            self.UNet_base_num_features = 16

    configuration = plan(HIPPOCAMPUS, Mine)["configurations"]["2d"]
    assert configuration["architecture"]["network_class_name"].endswith("unet.PlainConvUNet")
    assert configuration["architecture"]["arch_kwargs"]["features_per_stage"][0] == 16
    assert class_path(ResidualUNet) == "dynamic_network_architectures.architectures.unet.ResidualUNet"


def test_planning_needs_no_torch(make_planned_dataset):
    """torch takes seconds to import, planning takes milliseconds."""
    dataset = make_planned_dataset(number=9, **HIPPOCAMPUS)
    code = (
        "import sys\n"
        "from nnunetv2.experiment_planning.plan_and_preprocess_api import find_planner_class\n"
        "for name in ('ExperimentPlanner', 'nnUNetPlannerResEncL'):\n"
        "    planner = find_planner_class(name)\n"
        "    planner.determine_reader_writer = lambda self: int\n"
        f"    planner({dataset!r}).plan_experiment()\n"
        "assert not {'torch', 'scipy', 'SimpleITK', 'matplotlib'} & set(sys.modules), list(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_planners_without_resampling_keep_their_data_apart(plan):
    fullres = plan(HIPPOCAMPUS, nnUNetPlannerResEncL_noResampling)["configurations"]["3d_fullres"]
    assert fullres["data_identifier"] == "nnUNetResEncUNetLPlans_noResampling_3d_fullres"
    assert fullres["resampling_fn_data"] == "no_resampling_hack" and fullres["resampling_fn_data_kwargs"] == {}


@pytest.mark.parametrize(
    ("planner", "more"),
    [
        (nnUNetPlanner_torchres, {"force_separate_z": False, "memefficient_seg_resampling": False}),
        (
            nnUNetPlannerResEncL_torchres_sepz,
            {"force_separate_z": None, "memefficient_seg_resampling": False, "separate_z_anisotropy_threshold": 3},
        ),
    ],
)
def test_planners_with_torch_resampling(plan, planner, more):
    plans = plan(HIPPOCAMPUS, planner)
    fullres = plans["configurations"]["3d_fullres"]
    assert fullres["data_identifier"] == f"{plans['plans_name']}_3d_fullres"
    assert fullres["resampling_fn_probabilities"] == "resample_torch_fornnunet"
    assert fullres["resampling_fn_seg_kwargs"] == {"is_seg": True, **more}
    assert fullres["resampling_fn_probabilities_kwargs"] == {"is_seg": False, **more}
