"""Tests of the way from logits to label maps and files."""

from __future__ import annotations

import json
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import LINEAR, TinyModel

from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape as convert
from nnunetv2.inference.export_prediction import (
    export_prediction_from_logits,
    resample_and_save,
    save_probabilities_file,
    write_segmentation,
)
from nnunetv2.inference.logit_resampling import find_grid_change, write_labels
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

LABELS = LabelManager({"background": 0, "one": 1, "two": 2}, None)
REGIONS = LabelManager({"background": 0, "whole": [1, 2], "core": [2]}, [1, 2])
ISOTROPIC, LONG_FIRST, LONG_LAST = (1.0, 1.0, 1.0), (5.0, 1.0, 1.0), (1.0, 1.0, 5.0)


def make_logits(shape=(3, 7, 9, 8), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float16)


def make_case(shape=(7, 9, 8), bbox=((1, 8), (2, 11), (0, 8)), full=(9, 12, 8), spacing=(2.0, 1.0, 1.0)):
    """Properties as preprocessing writes them: shapes in network order, spacing in the image's."""
    return {
        "spacing": list(spacing),
        "shape_before_cropping": full,
        "bbox_used_for_cropping": [list(b) for b in bbox],
        "shape_after_cropping_and_before_resampling": shape,
    }


def managers(model=None, **changes):
    model = model or TinyModel(**changes)
    plans_manager = PlansManager(model.plans())
    return (
        plans_manager,
        plans_manager.get_configuration(model.configuration_name),
        plans_manager.get_label_manager(model.dataset_json()),
    )


def whole_volume_way(logits, resampling_fn, shape, current, new, label_manager):
    resampled = resampling_fn(logits.astype(np.float32), shape, current, new)
    return label_manager.convert_logits_to_segmentation(np.asarray(resampled))


@pytest.mark.parametrize("label_manager", [LABELS, REGIONS], ids=["labels", "regions"])
@pytest.mark.parametrize(
    "resampling_fn",
    [
        partial(resample_data_or_seg_to_shape, **LINEAR),
        partial(resample_torch_fornnunet, is_seg=False, force_separate_z=False, memefficient_seg_resampling=False),
        partial(resample_torch_fornnunet, is_seg=False, force_separate_z=None),
    ],
    ids=["default", "torch", "torch, separate z"],
)
@pytest.mark.parametrize("spacing", [ISOTROPIC, LONG_FIRST, LONG_LAST])
@pytest.mark.parametrize("shape", [(14, 6, 17), (3, 20, 8), (7, 9, 8)])
@pytest.mark.parametrize("threads", [1, 3])
def test_slabs_give_the_labels_of_whole_volumes(label_manager, resampling_fn, spacing, shape, threads, monkeypatch):
    monkeypatch.setattr("nnunetv2.inference.logit_resampling._SLAB_VOXELS", 2 * shape[1] * shape[2])
    logits = make_logits((label_manager.num_segmentation_heads, 7, 9, 8))
    labels = np.zeros(shape, dtype=np.uint8)
    change = find_grid_change(resampling_fn, logits.shape[1:], shape, spacing, spacing)
    write_labels(logits, change, label_manager, labels, threads)
    expected = whole_volume_way(logits, resampling_fn, shape, spacing, spacing, label_manager)
    assert np.mean(labels == expected) > 0.998  # interpolated float32 logits can tie


@pytest.mark.parametrize(
    "resampling_fn",
    [
        partial(resample_data_or_seg_to_shape, **{**LINEAR, "order": 0}),
        partial(resample_data_or_seg_to_shape, **{**LINEAR, "order": 3}),
        partial(resample_data_or_seg_to_shape, **{**LINEAR, "order_z": 1}),
        partial(resample_data_or_seg_to_shape, **{**LINEAR, "is_seg": True}),
        partial(resample_torch_fornnunet, is_seg=False, aniso_axis_mode="nearest"),
        lambda data, new_shape, current_spacing, new_spacing: data,
    ],
)
def test_other_resampling_is_not_done_in_slabs(resampling_fn):
    assert find_grid_change(resampling_fn, (7, 9, 8), (14, 9, 8), ISOTROPIC, ISOTROPIC) is None


def test_other_resampling_functions_are_called():
    plans_manager, configuration_manager, label_manager = managers(
        probabilities=("resample_data_or_seg_to_shape", {**LINEAR, "order": 3})
    )
    logits, case = make_logits((3, 4, 9, 8)), make_case()
    expected = whole_volume_way(
        logits, configuration_manager.resampling_fn_probabilities, (7, 9, 8), (2, 1, 1), (2, 1, 1), label_manager
    )
    labels = convert(logits, plans_manager, configuration_manager, label_manager, case)
    np.testing.assert_array_equal(labels[1:8, 2:11], expected)


@pytest.mark.parametrize("transpose", [(0, 1, 2), (2, 0, 1)])
def test_cropping_and_transposition_are_undone(transpose):
    plans_manager, configuration_manager, label_manager = managers(transpose_forward=transpose)
    logits = np.zeros((3, 7, 9, 8), dtype=np.float32)
    logits[1, 3, 4, 5] = 1
    labels = convert(torch.from_numpy(logits), plans_manager, configuration_manager, label_manager, make_case())
    position = np.array((3 + 1, 4 + 2, 5))[list(plans_manager.transpose_backward)]
    assert labels.dtype == np.uint8
    assert labels.shape == tuple(np.array((9, 12, 8))[list(plans_manager.transpose_backward)])
    assert np.argwhere(labels).tolist() == [position.tolist()]


@pytest.mark.parametrize(
    "probabilities",
    [("resample_data_or_seg_to_shape", LINEAR), ("resample_data_or_seg_to_shape", {**LINEAR, "order": 2})],
)
@pytest.mark.parametrize("regions", [False, True])
def test_probabilities_are_background_outside_of_the_crop(regions, probabilities):
    changes = {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": (1, 2)}
    plans_manager, configuration_manager, label_manager = managers(
        transpose_forward=(1, 2, 0), probabilities=probabilities, **(changes if regions else {})
    )
    logits = make_logits((label_manager.num_segmentation_heads, 5, 9, 8))
    labels, result = convert(
        logits, plans_manager, configuration_manager, label_manager, make_case(), return_probabilities=True
    )
    assert result.dtype == np.float32
    assert result.shape == (len(logits), 8, 9, 12)
    outside = result[:, :, 0]  # image axis 1 is network axis 0, cropped to 1:8
    assert np.all(outside[0] == (0 if regions else 1))
    assert np.all(outside[1:] == 0)
    inside = result.transpose(0, 2, 3, 1)[:, 1:8, 2:11]
    np.testing.assert_array_equal(
        label_manager.convert_probabilities_to_segmentation(inside), labels.transpose(1, 2, 0)[1:8, 2:11]
    )
    alone = convert(logits, plans_manager, configuration_manager, label_manager, make_case())
    assert np.mean(alone == labels) > 0.995


def test_flat_models_keep_the_spacing_between_slices():
    plans_manager, configuration_manager, label_manager = managers(patch_size=(16, 16), spacing=(1.0, 1.0))
    seen = []

    def spy(data, new_shape, current_spacing, new_spacing):
        seen.append((list(new_shape), list(current_spacing), list(new_spacing)))
        return np.zeros((3, *new_shape), dtype=np.float32)

    configuration_manager = type(
        "Spied", (), {"spacing": configuration_manager.spacing, "resampling_fn_probabilities": staticmethod(spy)}
    )
    convert(
        make_logits((3, 7, 5, 5)),
        plans_manager,
        configuration_manager,
        label_manager,
        make_case(spacing=(4.0, 0.5, 0.5)),
    )
    assert seen == [([7, 9, 8], [4.0, 1.0, 1.0], [4.0, 0.5, 0.5])]


def test_properties_stay_unchanged(tmp_path):
    plans_manager, configuration_manager, _ = managers()
    case = make_nifti_case()
    before = pickle.dumps(case)
    export_prediction_from_logits(
        make_logits(),
        case,
        configuration_manager,
        plans_manager,
        TinyModel().dataset_json(),
        str(tmp_path / "case"),
        save_probabilities=True,
    )
    assert pickle.dumps(case) == before


def make_nifti_case():
    case = make_case()
    case["sitk_stuff"] = {
        "spacing": (1.0, 1.0, 2.0),
        "origin": (10.0, -20.0, 5.0),
        "direction": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
    }
    return case


def test_an_export_writes_a_label_map_probabilities_and_properties(tmp_path):
    plans_manager, configuration_manager, _ = managers()
    dataset_json = tmp_path / "dataset.json"
    dataset_json.write_text(json.dumps(TinyModel().dataset_json()))
    (tmp_path / "out").mkdir()
    export_prediction_from_logits(
        make_logits(),
        make_nifti_case(),
        configuration_manager,
        plans_manager,
        str(dataset_json),
        str(tmp_path / "out" / "case"),
        save_probabilities=True,
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["case.nii.gz", "case.npz", "case.pkl"]
    with np.load(tmp_path / "out" / "case.npz") as archive:
        assert list(archive) == ["probabilities"]
        assert archive["probabilities"].shape == (3, 9, 12, 8)
        np.testing.assert_allclose(archive["probabilities"].sum(axis=0), 1, atol=1e-5)
    with (tmp_path / "out" / "case.pkl").open("rb") as file:
        assert pickle.load(file) == make_nifti_case()


def test_probabilities_survive_the_file(tmp_path):
    probabilities = np.random.default_rng(0).random((3, 4, 5, 6), dtype=np.float32)[:, ::2].transpose(0, 3, 1, 2)
    save_probabilities_file(probabilities, tmp_path / "case.npz")
    with np.load(tmp_path / "case.npz") as archive:
        np.testing.assert_array_equal(archive["probabilities"], probabilities)


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    class BrokenWriter:
        def write_seg(self, seg, path, properties):
            Path(path).write_text("half")
            raise OSError("disk full")

    target = tmp_path / "case.nii.gz"
    target.write_text("earlier")
    with pytest.raises(OSError, match="disk full"):
        write_segmentation(BrokenWriter(), np.zeros((2, 2, 2)), target, {})
    assert target.read_text() == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["case.nii.gz"]


def test_side_cars_come_along(tmp_path):
    from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

    write_segmentation(Tiff3DIO(), np.ones((3, 4, 5), dtype=np.uint8), tmp_path / "case.tif", {"spacing": (3, 1, 1)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["case.json", "case.tif"]


def test_labels_for_the_next_stage_have_its_shape(tmp_path):
    import blosc2

    plans_manager, configuration_manager, label_manager = managers()
    logits = make_logits()
    resample_and_save(
        logits,
        (14, 18, 16),
        str(tmp_path / "case"),
        plans_manager,
        configuration_manager,
        make_case(),
        TinyModel().dataset_json(),
    )
    stored = blosc2.open(str(tmp_path / "case.b2nd"), mode="r")[:]
    assert stored.dtype == np.uint8
    expected = whole_volume_way(
        logits, configuration_manager.resampling_fn_probabilities, (14, 18, 16), ISOTROPIC, ISOTROPIC, label_manager
    )
    assert np.mean(stored == expected) > 0.998


def make_ball_logits(shape, centre, radius):
    distance = np.linalg.norm(np.indices(shape) - np.reshape(centre, (3, 1, 1, 1)), axis=0)
    return (radius - distance).astype(np.float16)


@pytest.mark.parametrize("regions", [False, True])
def test_cropped_resampling_finds_the_same_objects(regions):
    changes = {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": (1, 2)}
    plans_manager, configuration_manager, label_manager = managers(**(changes if regions else {}))
    balls = [make_ball_logits((20, 22, 24), (6, 7, 8), 4), make_ball_logits((20, 22, 24), (14, 15, 16), 3)]
    logits = np.stack(balls if regions else [np.full_like(balls[0], 0), *balls])
    case = make_case(shape=(40, 33, 50), bbox=((0, 40), (0, 33), (0, 50)), full=(40, 33, 50))
    arguments = (logits, plans_manager, configuration_manager, label_manager, case)
    cropped = convert(*arguments, use_cropped_logits_resampling=True)
    assert set(np.unique(cropped)) == {0, 1, 2}
    assert np.mean(cropped == convert(*arguments)) > 0.9995


def test_cropped_resampling_gives_way_to_probabilities(caplog):
    plans_manager, configuration_manager, label_manager = managers()
    arguments = (make_logits(), plans_manager, configuration_manager, label_manager, make_case(), True)
    _, probabilities = convert(*arguments, use_cropped_logits_resampling=True)
    assert "ignored" in caplog.text
    np.testing.assert_array_equal(probabilities, convert(*arguments)[1])


def test_custom_label_managers_see_the_whole_volume():
    class OnlyLargest(LabelManager):
        def convert_logits_to_segmentation(self, predicted_logits):
            assert predicted_logits.shape == (3, 7, 9, 8)
            return np.full(predicted_logits.shape[1:], 2)

    plans_manager, configuration_manager, _ = managers()
    labels = convert(
        make_logits((3, 3, 9, 8)),
        plans_manager,
        configuration_manager,
        OnlyLargest(TinyModel().labels, None),
        make_case(),
    )
    assert np.all(labels[1:8, 2:11] == 2)


def test_probabilities_dominate_the_memory_of_an_export():
    from nnunetv2.inference.export_prediction import estimate_export_bytes

    logits, properties = np.zeros((5, 4, 4, 4), np.float16), {"shape_before_cropping": (10, 10, 10)}
    assert estimate_export_bytes(logits, properties, False) == 640 + 2000
    assert estimate_export_bytes(logits, properties, True) == 640 + 2000 + 4 * 5 * 1000
