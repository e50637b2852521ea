"""A tiny planned dataset of balls in noise, made without planning."""

import json

import numpy as np

NAME = "Dataset987_Blobs"
SHAPE = (12, 16, 20)


def make_plans(*, transpose=(0, 1, 2), spacing=(2.0, 1.0, 1.0), channels=1, **changes) -> dict:
    def resampling(is_seg, order):
        return {"is_seg": is_seg, "order": order, "order_z": 0, "force_separate_z": None}

    name = "resample_data_or_seg_to_shape"
    return {
        "dataset_name": NAME,
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": list(transpose),
        "transpose_backward": np.argsort(transpose).tolist(),
        "label_manager": "LabelManager",
        "experiment_planner_used": "ExperimentPlanner",
        "foreground_intensity_properties_per_channel": {
            str(channel): {"mean": 0.5, "std": 0.2, "percentile_00_5": -1.0, "percentile_99_5": 2.0}
            for channel in range(channels)
        },
        "configurations": {
            "3d_fullres": {
                "data_identifier": "nnUNetPlans_3d_fullres",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": [8, 16, 16],
                "spacing": list(spacing),
                "normalization_schemes": ["ZScoreNormalization"] * channels,
                "use_mask_for_norm": [False] * channels,
                "resampling_fn_data": name,
                "resampling_fn_data_kwargs": resampling(False, 3),
                "resampling_fn_seg": name,
                "resampling_fn_seg_kwargs": resampling(True, 1),
                "resampling_fn_probabilities": name,
                "resampling_fn_probabilities_kwargs": resampling(False, 1),
                "architecture": {},
                **changes,
            }
        },
    }


def make_dataset_json(labels=None, **changes) -> dict:
    return {
        "channel_names": {"0": "MRI"},
        "labels": labels or {"background": 0, "blob": 1, "core": 2},
        "numTraining": 4,
        "file_ending": ".nii.gz",
    } | changes


def make_case(seed=0, shape=SHAPE, channels=1):
    """A ball in noise, with a margin of zeros on the first axis."""
    rng = np.random.default_rng(seed)
    distance = np.sqrt(sum((axis - n / 2) ** 2 for axis, n in zip(np.indices(shape), shape)))
    seg = ((distance < 5).astype(np.float32) + (distance < 3))[None]
    data = rng.normal(1, 0.2, (channels, *shape)).astype(np.float32) + seg
    data[:, :2] = 0
    return data, seg


def write_image(array, path) -> None:
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(array)
    image.SetSpacing((1.0, 1.0, 2.0))
    sitk.WriteImage(image, str(path))


def write_raw_dataset(roots, cases=3, shape=SHAPE, ending=".nii.gz", **plans):
    """Write raw data, dataset.json and plans; return the folder that preprocessing will fill."""
    raw, preprocessed = (roots[key] / NAME for key in ("nnUNet_raw", "nnUNet_preprocessed"))
    for folder in (raw / "imagesTr", raw / "labelsTr", preprocessed):
        folder.mkdir(parents=True)
    for i in range(cases):
        data, seg = make_case(i, shape)
        write_image(data[0], raw / "imagesTr" / f"case_{i}_0000{ending}")
        write_image(seg[0], raw / "labelsTr" / f"case_{i}{ending}")
    for folder in (raw, preprocessed):
        (folder / "dataset.json").write_text(json.dumps(make_dataset_json(file_ending=ending)))
    write_plans(roots, **plans)
    return preprocessed / "nnUNetPlans_3d_fullres"


def write_plans(roots, **plans) -> None:
    plans = make_plans(**{"spacing": (1.0, 1.0, 1.0), **plans})
    (roots["nnUNet_preprocessed"] / NAME / "nnUNetPlans.json").write_text(json.dumps(plans))
