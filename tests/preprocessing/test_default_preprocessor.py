import json
import logging
import shutil

import numpy as np
import pytest

from nnunetv2.preprocessing.case_workers import CaseFailedError
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.preprocessing.preprocessors.foreground_locations import sample_foreground_locations
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

NAME = "Dataset987_Blobs"
SHAPE = (12, 16, 20)


def make_plans(*, transpose=(0, 1, 2), spacing=(2.0, 1.0, 1.0), channels=1, **changes) -> dict:
    def resampling(is_seg, order):
        return {"is_seg": is_seg, "order": order, "order_z": 0, "force_separate_z": None}
    name = "resample_data_or_seg_to_shape"
    return {
        "dataset_name": NAME, "plans_name": "nnUNetPlans", "image_reader_writer": "SimpleITKIO",
        "transpose_forward": list(transpose), "transpose_backward": list(np.argsort(transpose)),
        "label_manager": "LabelManager", "experiment_planner_used": "ExperimentPlanner",
        "foreground_intensity_properties_per_channel": {
            str(channel): {"mean": 0.5, "std": 0.2, "percentile_00_5": -1.0, "percentile_99_5": 2.0}
            for channel in range(channels)},
        "configurations": {"3d_fullres": {
            "data_identifier": "nnUNetPlans_3d_fullres", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
            "patch_size": [8, 16, 16], "spacing": list(spacing),
            "normalization_schemes": ["ZScoreNormalization"] * channels, "use_mask_for_norm": [False] * channels,
            "resampling_fn_data": name, "resampling_fn_data_kwargs": resampling(False, 3),
            "resampling_fn_seg": name, "resampling_fn_seg_kwargs": resampling(True, 1),
            "resampling_fn_probabilities": name, "resampling_fn_probabilities_kwargs": resampling(False, 1),
            "architecture": {}, **changes}}}


def make_dataset_json(labels=None, **changes) -> dict:
    return {"channel_names": {"0": "MRI"}, "labels": labels or {"background": 0, "blob": 1, "core": 2},
            "numTraining": 4, "file_ending": ".nii.gz", **changes}


def make_case(seed=0, shape=SHAPE, channels=1):
    """A ball in noise, with a margin of zeros on the first axis."""
    rng = np.random.default_rng(seed)
    distance = np.sqrt(sum((axis - n / 2) ** 2 for axis, n in zip(np.indices(shape), shape)))
    seg = ((distance < 5).astype(np.float32) + (distance < 3))[None]
    data = rng.normal(1, 0.2, (channels, *shape)).astype(np.float32) + seg
    data[:, :2] = 0
    return data, seg


def preprocess(data, seg, *, spacing=(2.0, 1.0, 1.0), target=(2.0, 1.0, 1.0), dataset_json=None, **plans):
    manager = PlansManager(make_plans(spacing=target, **plans))
    properties = {"spacing": list(spacing)}
    return DefaultPreprocessor(verbose=False).run_case_npy(
        data, seg, properties, manager, manager.get_configuration("3d_fullres"), dataset_json or make_dataset_json())


def write_raw_dataset(roots, cases=3):
    import SimpleITK as sitk
    raw, preprocessed = (roots[key] / NAME for key in ("nnUNet_raw", "nnUNet_preprocessed"))
    for folder in (raw / "imagesTr", raw / "labelsTr", preprocessed):
        folder.mkdir(parents=True)
    for i in range(cases):
        data, seg = make_case(i)
        for array, path in ((data[0], f"imagesTr/case_{i}_0000.nii.gz"), (seg[0], f"labelsTr/case_{i}.nii.gz")):
            image = sitk.GetImageFromArray(array)
            image.SetSpacing((1.0, 1.0, 2.0))
            sitk.WriteImage(image, str(raw / path))
    for folder in (raw, preprocessed):
        (folder / "dataset.json").write_text(json.dumps(make_dataset_json()))
    (preprocessed / "nnUNetPlans.json").write_text(json.dumps(make_plans(spacing=(1.0, 1.0, 1.0)), default=int))
    return preprocessed / "nnUNetPlans_3d_fullres"


def run(num_processes, preprocessor=None):
    preprocessor = preprocessor or DefaultPreprocessor(verbose=False)
    preprocessor.show_progress_bar = False
    preprocessor.run(987, "3d_fullres", "nnUNetPlans", num_processes)


def test_what_is_done_to_a_case_is_written_down():
    data, seg = make_case()
    kept = data.copy(), seg.copy()
    result, labels, properties = preprocess(data, seg, spacing=(2.0, 1.0, 1.5), transpose=(1, 0, 2))
    np.testing.assert_array_equal(data, kept[0])
    np.testing.assert_array_equal(seg, kept[1])
    assert properties["shape_before_cropping"] == (16, 12, 20)
    assert properties["bbox_used_for_cropping"] == [[0, 16], [2, 12], [0, 20]]
    assert properties["shape_after_cropping_and_before_resampling"] == (16, 10, 20)
    assert properties["spacing"] == [2.0, 1.0, 1.5]
    # Transposed spacing is (1, 2, 1.5), wanted (2, 1, 1).
    assert result.shape == (1, 8, 20, 30)
    assert labels.shape == (1, 8, 20, 30)
    assert (result.dtype, labels.dtype) == (np.float32, np.int8)


def test_two_dimensional_plans_leave_slices_apart():
    data, seg = make_case()
    result, _, _ = preprocess(data, seg, spacing=(5.0, 1.0, 1.0), target=(0.5, 0.5))
    assert result.shape == (1, 10, 32, 40)


def test_normalization_comes_before_resampling():
    data, seg = make_case()
    result, _, _ = preprocess(data, seg)
    cropped = data[:, 2:]
    np.testing.assert_allclose(result, (cropped - cropped.mean()) / cropped.std(), atol=1e-5)


def test_without_a_segmentation_the_crop_is_marked():
    data, _ = make_case()
    data[:, :, 0, 0] = 0
    _, labels, properties = preprocess(data, None)
    assert "class_locations" not in properties
    assert np.unique(labels).tolist() == [-1, 0]
    assert (labels[0, :, 0, 0] == -1).all()


def test_large_labels_need_more_bits():
    data, seg = make_case()
    _, labels, _ = preprocess(data, seg * 100, dataset_json=make_dataset_json({"background": 0, "a": 100, "b": 200}))
    assert labels.dtype == np.int16
    assert labels.max() == 200


def test_locations_point_at_their_class():
    data, seg = make_case()
    _, labels, properties = preprocess(data, seg, dataset_json=make_dataset_json(
        {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, regions_class_order=[1, 2]))
    locations = properties["class_locations"]
    assert list(locations) == [(1, 2), 2, (-1, 0, 1, 2)]
    assert set(labels[tuple(locations[1, 2].T)]) == {1, 2}
    assert set(labels[tuple(locations[2].T)]) == {2}
    assert all(type(label) is int for key in locations if isinstance(key, tuple) for label in key)


def test_locations_follow_the_legacy_generator():
    seg = np.zeros((1, 2, 3, 4), np.int8)
    seg[0, 1, :, 1:3] = 1
    seg[0, 0, 0, 0] = 2
    drawn = sample_foreground_locations(seg, [1, 7, (2, 1)], min_num_samples=4, min_percent_coverage=0.01)
    random_state = np.random.RandomState(1234)
    ones, twos = np.argwhere(seg == 1), np.argwhere(seg == 2)
    np.testing.assert_array_equal(drawn[1], ones[random_state.permutation(6)[:4]])
    np.testing.assert_array_equal(drawn[2, 1], np.concatenate([twos, ones])[random_state.permutation(7)[:4]])
    assert drawn[7] == []
    assert drawn[1].dtype == np.int64


def test_large_classes_are_covered_in_part():
    seg = np.ones((1, 10, 10, 10), np.int8)
    assert len(sample_foreground_locations(seg, [1], min_num_samples=5)[1]) == 10
    assert len(sample_foreground_locations(seg, [1])[1]) == 1000


def test_unknown_normalizations_and_missing_statistics_are_explained():
    data, seg = make_case()
    with pytest.raises(RuntimeError, match="MadeUpNormalization"):
        preprocess(data, seg, normalization_schemes=["MadeUpNormalization"])
    with pytest.raises(ValueError, match="2 channels"):
        preprocess(*make_case(channels=2))
    with pytest.raises(AssertionError, match="differ in shape"):
        preprocess(data, seg[:, :-1])


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_dataset_is_preprocessed_completely(roots, num_processes):
    folder = write_raw_dataset(roots)
    folder.mkdir()
    (folder / "left_over.b2nd").touch()
    run(num_processes)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"case_{i}{ending}" for i in range(3) for ending in (".b2nd", ".pkl", "_seg.b2nd"))
    data, seg, previous, properties = nnUNetDatasetBlosc2(str(folder))["case_1"]
    assert data.shape == seg.shape == (1, 20, 16, 20)
    assert (data.dtype, seg.dtype, previous) == (np.float32, np.int16, None)
    assert properties["sitk_stuff"]["spacing"] == (1.0, 1.0, 2.0)
    assert list(properties["class_locations"]) == [1, 2]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_bad_case_is_named_and_leaves_nothing_half_written(roots, num_processes):
    folder = write_raw_dataset(roots)
    raw = roots["nnUNet_raw"] / NAME
    (raw / "labelsTr" / "case_1.nii.gz").write_bytes(b"not an image")
    with pytest.raises(CaseFailedError, match="case case_1: "):
        run(num_processes)
    for path in folder.iterdir():
        assert (folder / f"{path.name.split('.')[0].removesuffix('_seg')}.pkl").is_file()


def test_a_shape_mismatch_names_both_files(roots):
    write_raw_dataset(roots)
    labels = roots["nnUNet_raw"] / NAME / "labelsTr"
    images = roots["nnUNet_raw"] / NAME / "imagesTr"
    import SimpleITK as sitk
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((3, 4, 5), np.uint8)), str(labels / "case_2.nii.gz"))
    with pytest.raises(CaseFailedError) as caught:
        run(1)
    assert str(labels / "case_2.nii.gz") in str(caught.value)
    assert str(images / "case_2_0000.nii.gz") in str(caught.value)


def test_changed_dataset_json_is_pointed_out(roots, caplog):
    write_raw_dataset(roots, cases=1)
    changed = make_dataset_json({"background": 0, "all": 1})
    (roots["nnUNet_raw"] / NAME / "dataset.json").write_text(json.dumps(changed))
    with caplog.at_level(logging.WARNING):
        run(1)
    assert "was changed after planning" in caplog.text


def test_missing_plans_and_datasets_are_explained(roots):
    folder = write_raw_dataset(roots)
    (folder.parent / "nnUNetPlans.json").unlink()
    with pytest.raises(AssertionError, match="nnUNetv2_plan_experiment"):
        run(1)
    shutil.rmtree(roots["nnUNet_raw"] / NAME)
    with pytest.raises(AssertionError, match="no raw dataset"):
        run(1)


def test_only_folders_of_the_dataset_are_ever_emptied(roots):
    folder = write_raw_dataset(roots)
    plans = make_plans(data_identifier="../precious")
    (folder.parent / "nnUNetPlans.json").write_text(json.dumps(plans, default=int))
    precious = folder.parent.parent / "precious"
    precious.mkdir()
    with pytest.raises(ValueError, match="data_identifier"):
        run(1)
    assert precious.is_dir()


class Inverting(DefaultPreprocessor):
    def modify_seg_fn(self, seg, plans_manager, dataset_json, configuration_manager):
        return np.where(seg > 0, 5, 0).astype(seg.dtype)


def test_subclasses_may_change_labels(roots):
    folder = write_raw_dataset(roots, cases=1)
    run(1, Inverting(verbose=True))
    _, seg, _, properties = nnUNetDatasetBlosc2(str(folder))["case_0"]
    assert np.unique(seg[:]).tolist() == [0, 5]
    assert list(properties["class_locations"]) == [1, 2]  # of the labels before
