"""Make a tiny preprocessed dataset with plans, in which a training of two epochs takes a second."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

NAME = "Dataset998_Tiny"
PATCH = {2: (16, 24), 3: (16, 12, 20)}
SHAPE = (20, 22, 24)


def make_configuration(*, dims: int = 3, stages: int = 2, batch_size: int = 2, **changes) -> dict:
    """Describe a configuration with a plain U-Net of 4, 8, 8... features."""
    conv = f"torch.nn.modules.conv.Conv{dims}d"
    resampling = "resample_data_or_seg_to_shape"
    options = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    return {
        "data_identifier": f"nnUNetPlans_{'3d_fullres' if dims == 3 else '2d'}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": batch_size,
        "patch_size": list(PATCH[dims]),
        "median_image_size_in_voxels": list(SHAPE[-dims:]),
        "spacing": [1.0, 1.0, 1.0][-dims:],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": resampling,
        "resampling_fn_seg": resampling,
        "resampling_fn_probabilities": resampling,
        "resampling_fn_data_kwargs": options,
        "resampling_fn_seg_kwargs": {**options, "is_seg": True},
        "resampling_fn_probabilities_kwargs": options,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": stages,
                "features_per_stage": [4, *[8] * (stages - 1)],
                "conv_op": conv,
                "kernel_sizes": [[3] * dims] * stages,
                "strides": [[1] * dims, *[[2] * dims] * (stages - 1)],
                "n_conv_per_stage": [2] * stages,
                "n_conv_per_stage_decoder": [2] * (stages - 1),
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": dims == 2,
        **changes,
    }


def make_plans(*, dims: int = 3, **options) -> dict:
    return {
        "dataset_name": NAME,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": list(SHAPE),
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres" if dims == 3 else "2d": make_configuration(dims=dims, **options)},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": {
                "max": 1.0,
                "mean": 0.5,
                "median": 0.5,
                "min": 0.0,
                "percentile_00_5": 0.0,
                "percentile_99_5": 1.0,
                "std": 0.2,
            }
        },
    }


def make_dataset_json(**changes) -> dict:
    return {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "blob": 1, "core": 2},
        "numTraining": 6,
        "file_ending": ".nii.gz",
        **changes,
    }


def make_labels(rng: np.random.Generator) -> np.ndarray:
    """Draw a ball of label 1 with a core of label 2, somewhere in the middle."""
    centre = np.array(SHAPE) / 2 + rng.uniform(-2, 2, 3)
    distance = np.sqrt(sum((axis - c) ** 2 for axis, c in zip(np.indices(SHAPE), centre)))
    return (distance < 7).astype(np.int16) + (distance < 4)


def write_case(folder: Path, gt_folder: Path, case: str, rng: np.random.Generator) -> None:
    """Write a preprocessed case, whose image shows its labels under noise, and its reference segmentation."""
    import SimpleITK as sitk

    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    labels = make_labels(rng)
    image = (labels + rng.normal(0, 0.3, SHAPE)).astype(np.float32)[None]
    properties = {
        "sitk_stuff": {
            "spacing": (1.0, 1.0, 1.0),
            "origin": (0.0, 0.0, 0.0),
            "direction": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
        },
        "spacing": [1.0, 1.0, 1.0],
        "shape_before_cropping": SHAPE,
        "bbox_used_for_cropping": [[0, n] for n in SHAPE],
        "shape_after_cropping_and_before_resampling": SHAPE,
        "class_locations": {label: np.argwhere(labels[None] == label) for label in (1, 2)},
    }
    blocks = (1, *(8,) * 3)
    nnUNetDatasetBlosc2.save_case(image, labels[None], properties, str(folder / case), chunks=blocks, blocks=blocks)
    sitk.WriteImage(sitk.GetImageFromArray(labels.astype(np.uint8)), str(gt_folder / f"{case}.nii.gz"))


def make_tiny_dataset(
    preprocessed: Path, *, dims: int = 3, cases: int = 6, dataset_json: dict | None = None, **options
) -> dict:
    """Write everything a training needs below nnUNet_preprocessed and return the plans."""
    folder = preprocessed / NAME
    plans = make_plans(dims=dims, **options)
    (configuration,) = plans["configurations"].values()
    cases_folder, gt_folder = folder / configuration["data_identifier"], folder / "gt_segmentations"
    for path in (cases_folder, gt_folder):
        path.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(cases):
        write_case(cases_folder, gt_folder, f"case_{number:02}", rng)
    contents = {
        "nnUNetPlans": plans,
        "dataset": dataset_json or make_dataset_json(),
        "dataset_fingerprint": {"spacings": [[1.0, 1.0, 1.0]] * cases},
    }
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return plans
