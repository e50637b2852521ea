"""Preprocessed cases of this package and of the reference release, made from the same scans and the same plans."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nnunetv2.preprocessing.cropping.cropping import create_nonzero_mask, crop_to_nonzero
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.preprocessing.resampling.default_resampling import (
    compute_new_shape,
    determine_do_sep_z_and_axis,
    resample_data_or_seg_to_shape,
)
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.utilities.restricted_pickle import load_pickle_safely

NAME = "Dataset986_Parity"

# (old shape, new shape, current spacing, new spacing)
GRIDS = [
    ((24, 31, 17), (33, 29, 40), (1, 1, 1), (0.7, 1.1, 0.4)),
    ((20, 40, 36), (40, 20, 72), (1, 1, 1), (0.5, 2, 0.5)),
    ((6, 40, 36), (12, 61, 50), (5, 1, 1), (2.5, 0.6, 0.7)),  # separate z by the current spacing
    ((30, 25, 9), (31, 17, 4), (1, 1, 1), (1, 1.5, 4)),  # and by the new one, along the last axis
    ((1, 50, 60), (1, 71, 33), (999, 1, 1), (999, 0.7, 1.8)),
    ((12, 13, 14), (12, 13, 21), (1, 1, 1.5), (1, 1, 1)),
]

RESAMPLE = """
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
for i, (name, new, current, wanted, options) in enumerate(value):
    outputs[str(i)] = resample_data_or_seg_to_shape(inputs[name], new, current, wanted, **options)
"""

TORCH_RESAMPLE = RESAMPLE.replace(
    "default_resampling import resample_data_or_seg_to_shape",
    "resample_torch import resample_torch_fornnunet as resample_data_or_seg_to_shape",
)

PREPROCESS = """
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
preprocessor = DefaultPreprocessor(verbose=False)
for configuration in value:
    preprocessor.run(986, configuration, "nnUNetPlans", 1)
"""

READ = """
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
dataset = infer_dataset_class(value)(value)
answer = {}
for case in dataset.identifiers:
    data, seg, previous, properties = dataset.load_case(case)
    outputs[case], outputs[case + "_seg"] = data[:], seg[:]
    answer[case] = {"keys": sorted(properties), "locations": {
        repr(key): np.asarray(found).tolist() for key, found in properties["class_locations"].items()}}
"""


def relative_difference(result: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(result.astype(np.float64) - expected).max() / max(np.ptp(expected), 1e-12))


def blobs(shape, num_labels, seed):
    from scipy.ndimage import gaussian_filter

    smooth = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 3)
    return np.digitize(smooth, np.quantile(smooth, np.linspace(0, 1, num_labels + 1)[1:-1]))


def options_for(is_seg, order, order_z):
    return {"is_seg": is_seg, "order": order, "order_z": order_z, "force_separate_z": None}


def test_images_are_resampled_alike(reference):
    rng = np.random.default_rng(0)
    arrays = {str(i): rng.normal(2, 3, (2, *old)).astype(np.float32) for i, (old, *_) in enumerate(GRIDS)}
    calls = [
        (str(i), *grid[1:], options_for(False, order, order_z))
        for i, grid in enumerate(GRIDS)
        for order in (0, 1, 3)
        for order_z in (0, 1, 3)
    ]
    expected, _ = reference.run(RESAMPLE, calls, **arrays)
    for i, (name, *grid, options) in enumerate(calls):
        result = resample_data_or_seg_to_shape(arrays[name], *grid, **options)
        assert result.shape == expected[str(i)].shape
        assert result.dtype == expected[str(i)].dtype
        assert relative_difference(result, expected[str(i)]) < 1e-6


@pytest.mark.parametrize("kind", ["smooth", "noise"])
def test_labels_are_resampled_alike(reference, kind):
    rng = np.random.default_rng(0)
    arrays = {}
    for i, (old, *_) in enumerate(GRIDS):
        labels = blobs((1, *old), 5, i) if kind == "smooth" else rng.integers(0, 5, (1, *old))
        arrays[str(i)] = labels.astype(np.int8) - 1
    calls = [
        (str(i), *grid[1:], options_for(True, order, order_z))
        for i, grid in enumerate(GRIDS)
        for order, order_z in ((0, 0), (1, 0), (1, 1), (3, 0))
    ]
    expected, _ = reference.run(RESAMPLE, calls, **arrays)
    for i, (name, *grid, options) in enumerate(calls):
        result = resample_data_or_seg_to_shape(arrays[name], *grid, **options)
        assert result.dtype == expected[str(i)].dtype
        # No plans ask for cubic labels. They tie halfway between voxels, up to rounding errors that are scipy's own.
        assert np.mean(result != expected[str(i)]) <= (1e-2 if options["order"] == 3 else 1e-4)


def test_torch_functions_agree(reference):
    from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet

    arrays = {str(i): blobs((1, *old), 5, i).astype(np.int16) for i, (old, *_) in enumerate(GRIDS)}
    calls = [
        (name, *GRIDS[int(name)][1:], options)
        for name in arrays
        for options in ({}, {"is_seg": True}, {"is_seg": True, "memefficient_seg_resampling": True})
    ]
    expected, _ = reference.run(TORCH_RESAMPLE, calls, **arrays)
    for i, (name, *grid, options) in enumerate(calls):
        result = resample_torch_fornnunet(arrays[name], *grid, **options)
        assert result.dtype == expected[str(i)].dtype
        np.testing.assert_allclose(result, expected[str(i)], atol=1e-5)


def test_grids_are_chosen_alike(reference):
    rng = np.random.default_rng(0)
    cases = []
    for _ in range(300):
        current, new = (np.round(rng.uniform(0.3, 6, 3), int(rng.integers(0, 3))).clip(0.3).tolist() for _ in "ab")
        shape = rng.integers(1, 600, 3).tolist()
        cases.append([shape, current, new, [None, True, False][rng.integers(3)]])
    _, expected = reference.run(
        """
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape, determine_do_sep_z_and_axis
answer = []
for shape, current, new, force in value:
    separate, axis = determine_do_sep_z_and_axis(force, current, new)
    shape = [int(n) for n in compute_new_shape(shape, current, new)]
    answer.append([shape, bool(separate), None if axis is None else int(axis)])
""",
        cases,
    )
    for (shape, current, new, force), (new_shape, *separation) in zip(cases, expected):
        assert compute_new_shape(shape, current, new).tolist() == [max(1, n) for n in new_shape]  # 0 is an error there
        assert list(determine_do_sep_z_and_axis(force, current, new)) == separation


def test_chunks_are_chosen_alike(reference):
    rng = np.random.default_rng(0)
    cases = []
    for _ in range(3000):
        patch = rng.integers(1, 320, rng.integers(2, 4)).tolist()
        cases.append([[int(rng.integers(1, 4)), *rng.integers(1, 700, 3).tolist()], patch, int(rng.choice([1, 2, 4]))])
    _, expected = reference.run(
        """
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params
answer = [[[int(n) for n in shape] for shape in comp_blosc2_params(*case)] for case in value]
""",
        cases,
    )
    for case, answer in zip(cases, expected):
        assert [list(shape) for shape in comp_blosc2_params(*case)] == answer


def test_crops_are_alike(reference):
    rng = np.random.default_rng(0)
    data = (rng.random((2, 14, 15, 16)) > 0.7).astype(np.float32)
    data[:, :3], data[..., -2:] = 0, 0
    seg = rng.integers(0, 3, (1, 14, 15, 16)).astype(np.int16)
    expected, boxes = reference.run(
        """
from nnunetv2.preprocessing.cropping.cropping import create_nonzero_mask, crop_to_nonzero
outputs["mask"] = create_nonzero_mask(inputs["data"])
outputs["data"], outputs["seg"], first = crop_to_nonzero(inputs["data"].copy(), inputs["seg"].copy())
_, outputs["none"], second = crop_to_nonzero(inputs["data"].copy())
answer = [[list(map(int, side)) for side in box] for box in (first, second)]
""",
        data=data,
        seg=seg,
    )
    np.testing.assert_array_equal(create_nonzero_mask(data), expected["mask"])
    cropped, cropped_seg, bbox = crop_to_nonzero(data, seg)
    np.testing.assert_array_equal(cropped, expected["data"])
    np.testing.assert_array_equal(cropped_seg, expected["seg"])
    _, no_seg, second_bbox = crop_to_nonzero(data)
    np.testing.assert_array_equal(no_seg, expected["none"])
    assert no_seg.dtype == expected["none"].dtype
    assert [bbox, second_bbox] == boxes


def test_intensities_are_normalized_alike(reference):
    from nnunetv2.preprocessing.normalization import default_normalization_schemes

    rng = np.random.default_rng(0)
    image = rng.uniform(0, 255, (20, 30, 40)).astype(np.float32)
    seg = rng.integers(-1, 2, image.shape).astype(np.int8)
    statistics = {"mean": 100.0, "std": 30.0, "percentile_00_5": 20.0, "percentile_99_5": 230.0}
    names = ("ZScore", "CT", "No", "RescaleTo01", "RGBTo01")
    calls = [(f"{name}Normalization", use_mask, statistics) for name in names for use_mask in (False, True)]
    expected, _ = reference.run(
        """
from nnunetv2.preprocessing.normalization import default_normalization_schemes
for i, (name, *arguments) in enumerate(value):
    scheme = getattr(default_normalization_schemes, name)(*arguments)
    outputs[str(i)] = scheme.run(inputs["image"].copy(), inputs["seg"])
""",
        calls,
        image=image,
        seg=seg,
    )
    for i, (name, *arguments) in enumerate(calls):
        scheme = getattr(default_normalization_schemes, name)(*arguments)
        np.testing.assert_array_equal(scheme.run(image.copy(), seg), expected[str(i)])


def test_locations_are_drawn_alike(reference):
    rng = np.random.default_rng(0)
    seg = rng.integers(-1, 4, (1, 30, 40, 50)).astype(np.int8)
    classes = [1, 2, 9, [2, 3], [8, 1], [-1, 0, 1, 2, 3]]
    expected, keys = reference.run(
        """
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
classes = [tuple(c) if isinstance(c, list) else c for c in value]
found = DefaultPreprocessor._sample_foreground_locations(inputs["seg"], classes)
answer = [repr(key) for key in found]
outputs = {repr(key): np.asarray(locations) for key, locations in found.items()}
""",
        classes,
        seg=seg,
    )
    found = DefaultPreprocessor._sample_foreground_locations(
        seg, [tuple(c) if isinstance(c, list) else c for c in classes]
    )
    assert [repr(key) for key in found] == keys
    for key, locations in found.items():
        np.testing.assert_array_equal(locations, expected[repr(key)])


def make_plans(*, spacing, reader, channels, normalization, use_mask, transpose=(0, 1, 2)) -> dict:
    name = "resample_data_or_seg_to_shape"
    configuration = {
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "normalization_schemes": [normalization] * channels,
        "use_mask_for_norm": [use_mask] * channels,
        "resampling_fn_data": name,
        "resampling_fn_seg": name,
        "resampling_fn_probabilities": name,
        "resampling_fn_data_kwargs": options_for(False, 3, 0),
        "resampling_fn_seg_kwargs": options_for(True, 1, 0),
        "resampling_fn_probabilities_kwargs": options_for(False, 1, 0),
        "architecture": {},
    }
    configurations = {
        "2d": {**configuration, "data_identifier": "nnUNetPlans_2d", "patch_size": [64, 64], "spacing": spacing[1:]}
    }
    if reader != "NaturalImage2DIO":
        configurations["3d_fullres"] = {
            **configuration,
            "data_identifier": "nnUNetPlans_3d_fullres",
            "patch_size": [32, 32, 32],
            "spacing": spacing,
        }
    statistics = {
        "mean": 300.0,
        "std": 120.0,
        "percentile_00_5": 20.0,
        "percentile_99_5": 800.0,
        "median": 280.0,
        "min": 0.0,
        "max": 2000.0,
    }
    return {
        "dataset_name": NAME,
        "plans_name": "nnUNetPlans",
        "image_reader_writer": reader,
        "transpose_forward": list(transpose),
        "transpose_backward": np.argsort(transpose).tolist(),
        "label_manager": "LabelManager",
        "experiment_planner_used": "ExperimentPlanner",
        "configurations": configurations,
        "original_median_spacing_after_transp": list(spacing),
        "original_median_shape_after_transp": [1, 1, 1],
        "foreground_intensity_properties_per_channel": {str(c): statistics for c in range(channels)},
    }


def write_dataset(roots, cases, labels, file_ending, plans, copy) -> Path:
    """Fill the raw folder with `cases`, {name: (image, label)}, and plan by hand; return the preprocessed folder."""
    raw, preprocessed = (roots[key] / NAME for key in ("nnUNet_raw", "nnUNet_preprocessed"))
    for folder in (raw / "imagesTr", raw / "labelsTr", preprocessed):
        folder.mkdir(parents=True)
    for name, (image, label) in cases.items():
        copy(image, raw / "imagesTr" / f"{name}_0000{file_ending}")
        copy(label, raw / "labelsTr" / f"{name}{file_ending}")
    dataset_json = {
        "channel_names": {"0": "MRI"},
        "labels": labels,
        "numTraining": len(cases),
        "file_ending": file_ending,
    }
    for folder in (raw, preprocessed):
        (folder / "dataset.json").write_text(json.dumps(dataset_json))
    (preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))
    return preprocessed


def compare_preprocessed_folders(reference, preprocessed: Path, configurations: list[str]) -> None:
    """Preprocess with both packages, one after the other, and let each read what the other wrote."""
    reference.run(PREPROCESS, configurations)
    for configuration in configurations:
        folder = preprocessed / f"nnUNetPlans_{configuration}"
        theirs = folder.rename(folder.with_name(f"theirs_{configuration}"))
        preprocessor = DefaultPreprocessor(verbose=False)
        preprocessor.show_progress_bar = False
        preprocessor.run(986, configuration, "nnUNetPlans", 1)
        assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in theirs.iterdir())

        read_by_reference, answer = reference.run(READ, str(folder))
        ours, their_dataset = nnUNetDatasetBlosc2(str(folder)), nnUNetDatasetBlosc2(str(theirs))
        for case in ours.identifiers:
            data, seg, _, properties = ours[case]
            expected, expected_seg, _, expected_properties = their_dataset[case]
            np.testing.assert_array_equal(read_by_reference[case], data[:])
            np.testing.assert_array_equal(read_by_reference[f"{case}_seg"], seg[:])
            compare_cases(data, seg, expected, expected_seg)
            same_labels = np.array_equal(seg[:], expected_seg[:])
            compare_properties(properties, expected_properties, same_labels)
            assert answer[case]["keys"] == sorted(properties)
            assert answer[case]["locations"] == {
                repr(key): np.asarray(found).tolist() for key, found in properties["class_locations"].items()
            }
            assert load_pickle_safely(theirs / f"{case}.pkl").keys() == properties.keys()


def compare_cases(data, seg, expected, expected_seg) -> None:
    assert (data.shape, data.dtype) == (expected.shape, expected.dtype)
    assert (seg.shape, seg.dtype) == (expected_seg.shape, expected_seg.dtype)
    assert (data.chunks, data.blocks) == (expected.chunks, expected.blocks)
    assert (seg.chunks, seg.blocks) == (expected_seg.chunks, expected_seg.blocks)
    for channel, expected_channel in zip(data[:], expected[:]):
        assert relative_difference(channel, expected_channel) < 1e-6
    assert np.mean(seg[:] == expected_seg[:]) >= 0.9999


def compare_properties(properties, expected, same_labels: bool) -> None:
    assert list(properties["class_locations"]) == list(expected["class_locations"])
    assert properties["bbox_used_for_cropping"] == [list(side) for side in expected["bbox_used_for_cropping"]]
    for key in ("shape_before_cropping", "shape_after_cropping_and_before_resampling"):
        assert properties[key] == expected[key]
        assert type(properties[key]) is type(expected[key])
    np.testing.assert_array_equal(properties["spacing"], expected["spacing"])
    if same_labels:
        for key, found in expected["class_locations"].items():
            assert type(properties["class_locations"][key]) is type(found)
            np.testing.assert_array_equal(properties["class_locations"][key], found)


def link(source: Path, target: Path) -> None:
    target.symlink_to(source)


def test_hippocampus_becomes_the_same(reference, roots, shared_data):
    folder = shared_data / "hippocampus"
    names = sorted(path.name.removesuffix(".nii.gz") for path in (folder / "labels").glob("*.nii.gz"))[::60]
    cases = {name: (find_image(folder / "images", name), folder / "labels" / f"{name}.nii.gz") for name in names}
    plans = make_plans(
        spacing=[1.3, 0.8, 0.9],
        reader="SimpleITKIO",
        channels=1,
        normalization="ZScoreNormalization",
        use_mask=False,
        transpose=(1, 2, 0),
    )
    preprocessed = write_dataset(roots, cases, {"background": 0, "anterior": 1, "posterior": 2}, ".nii.gz", plans, link)
    compare_preprocessed_folders(reference, preprocessed, ["3d_fullres", "2d"])


def test_anisotropic_spinal_cords_become_the_same(reference, roots, shared_data):
    cases = {}
    for site in ("ucl", "chum", "milan"):
        labels = sorted(
            path for path in (shared_data / "spinalcord" / site).rglob("*.nii.gz") if "label" in str(path).lower()
        )
        name = labels[0].name.removesuffix(".nii.gz")
        image = find_image(labels[0].parents[1] / "images", name)
        cases[f"{site}_{name}"] = (image, labels[0])
    plans = make_plans(
        spacing=[4.0, 0.5, 0.5], reader="SimpleITKIO", channels=1, normalization="CTNormalization", use_mask=True
    )
    preprocessed = write_dataset(
        roots, cases, {"background": 0, "all": [1, 2], "gray": 2, "ignore": 3}, ".nii.gz", plans, link
    )
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        path = roots[name] / NAME / "dataset.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "regions_class_order": [1, 2]}))
    compare_preprocessed_folders(reference, preprocessed, ["3d_fullres"])


def test_fundus_photographs_become_the_same(reference, roots, shared_data):
    from skimage import io

    def convert(source: Path, target: Path) -> None:
        array = io.imread(source)
        io.imsave(target, array if "imagesTr" in str(target) else (array > 0).astype(np.uint8), check_contrast=False)

    folder = shared_data / "retina" / "chasedb1"
    images = sorted((folder / "images").iterdir())[:2]
    cases = {image.stem: (image, find_image(folder / "labels", image.stem)) for image in images}
    plans = make_plans(
        spacing=[999.0, 1.4, 1.4],
        reader="NaturalImage2DIO",
        channels=3,
        use_mask=True,
        normalization="ZScoreNormalization",
    )
    preprocessed = write_dataset(roots, cases, {"background": 0, "vessel": 1}, ".png", plans, convert)
    compare_preprocessed_folders(reference, preprocessed, ["2d"])


def find_image(folder: Path, name: str) -> Path:
    return next(path for path in sorted(folder.iterdir()) if path.name.startswith(name))
