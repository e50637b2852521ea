import json
import logging
import shutil

import numpy as np
import pytest
from preprocessing_scans import NAME, make_case, make_dataset_json, make_plans, write_image, write_raw_dataset

from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.preprocessing.preprocessors.foreground_locations import (
    as_small_integers,
    find_voxels,
    sample_foreground_locations,
)
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.case_workers import CaseFailedError
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager


def preprocess(data, seg, *, spacing=(2.0, 1.0, 1.0), target=(2.0, 1.0, 1.0), dataset_json=None, **plans):
    manager = PlansManager(make_plans(spacing=target, **plans))
    properties = {"spacing": list(spacing)}
    return DefaultPreprocessor(verbose=False).run_case_npy(
        data, seg, properties, manager, manager.get_configuration("3d_fullres"), dataset_json or make_dataset_json()
    )


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
    _, labels, properties = preprocess(
        data,
        seg,
        dataset_json=make_dataset_json(
            {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, regions_class_order=[1, 2]
        ),
    )
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


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_dataset_is_preprocessed_completely(roots, num_processes):
    folder = write_raw_dataset(roots)
    folder.mkdir()
    (folder / "left_over.b2nd").touch()
    run(num_processes)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"case_{i}{ending}" for i in range(3) for ending in (".b2nd", ".pkl", "_seg.b2nd")
    )
    data, seg, previous, properties = nnUNetDatasetBlosc2(str(folder))["case_1"]
    assert data.shape == seg.shape == (1, 20, 16, 20)
    assert (data.dtype, seg.dtype, previous) == (np.float32, np.int16, None)
    assert properties["sitk_stuff"]["spacing"] == (1.0, 1.0, 2.0)
    assert list(properties["class_locations"]) == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_bad_case_is_named_and_leaves_nothing_half_written(roots, num_processes):
    folder = write_raw_dataset(roots)
    raw = roots["nnUNet_raw"] / NAME
    (raw / "labelsTr" / "case_1.nii.gz").write_bytes(b"not an image")
    with pytest.raises(CaseFailedError, match="case case_1: "):
        run(num_processes)
    for path in folder.glob("*.b2nd"):
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
    (folder.parent / "nnUNetPlans.json").write_text(json.dumps(plans))
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


class AddingLargeLabels(DefaultPreprocessor):
    def modify_seg_fn(self, seg, plans_manager, dataset_json, configuration_manager):
        assert seg.dtype == np.float32  # as the reader returned it
        seg[seg == 2] = 300
        return seg


def test_subclasses_may_write_labels_that_the_data_do_not_have(roots):
    folder = write_raw_dataset(roots, cases=1)
    run(1, AddingLargeLabels(verbose=False))
    assert np.unique(nnUNetDatasetBlosc2(str(folder))["case_0"][1][:]).tolist() == [0, 1, 300]


@pytest.mark.parametrize(("value", "num_processes"), [(np.nan, 1), (np.inf, 2), (-np.inf, 1)])
def test_voxels_that_are_no_numbers_are_refused_with_case_and_file(roots, value, num_processes):
    folder = write_raw_dataset(roots, ending=".nrrd")  # ITK reads NaN in NIfTI files as 0
    data, _ = make_case(1)
    data[0, 5, 6, 7] = value
    file = roots["nnUNet_raw"] / NAME / "imagesTr" / "case_1_0000.nrrd"
    write_image(data[0], file)
    with pytest.raises(
        CaseFailedError, match=rf"case case_1: .*{file.name}: channel 0 of the image has 1 voxels that are NaN"
    ):
        run(num_processes)
    assert not list(folder.glob("case_1*"))


def test_labels_that_are_no_numbers_are_refused():
    data, seg = make_case()
    seg[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="segmentation has voxels that are NaN"):
        preprocess(data, seg)


def test_users_resampling_functions_get_labels_as_they_were_read(monkeypatch):
    from functools import partial

    from nnunetv2.utilities.plans_handling import plans_handler

    seen = []

    def no_resampling_of_a_user(data, new_shape, current_spacing, new_spacing):
        seen.append(data.dtype)
        return data

    monkeypatch.setattr(
        plans_handler.ConfigurationManager,
        "_find_resampling_function",
        lambda self, key: partial(no_resampling_of_a_user),
    )
    preprocess(*make_case())
    assert seen == [np.float32, np.float32]


def test_fractions_in_labels_are_not_cut_off():
    seg = np.array([[[[0, 0.5, 1]]]], np.float32)
    assert as_small_integers(seg) is seg
    assert as_small_integers(np.array([-1.0, 127.0])).dtype == np.int8
    assert as_small_integers(np.array([0.0, 128.0])).dtype == np.int16
    assert as_small_integers(np.array([0.0, 70000.0])).dtype == np.float64


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint8, np.int32, np.float32])
def test_voxels_are_found_in_one_pass(dtype):
    seg = np.random.default_rng(0).integers(0, 5, (1, 130, 100, 110)).astype(dtype)  # more than one slab
    if np.issubdtype(dtype, np.signedinteger):
        seg[0, 0] = -1
    found = find_voxels(seg, [-1, 1, 4, 9, 1000])
    for label, voxels in found.items():
        np.testing.assert_array_equal(voxels, np.flatnonzero(seg == label))


def test_verbose_runs_log_each_case(roots, caplog):
    write_raw_dataset(roots, cases=2)
    with caplog.at_level(logging.INFO):
        DefaultPreprocessor(verbose=True).run(987, "3d_fullres", "nnUNetPlans", 1)
    assert "case_1 done, 2 of 2" in caplog.text
    assert "cases/s" in caplog.text
