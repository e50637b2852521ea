"""Training batches."""

from __future__ import annotations

import logging
import pickle
import random

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

from nnunetv2.training.data_augmentation.augmenters import build_augmenters
from nnunetv2.training.data_augmentation.default_transforms import (
    build_training_transforms,
    build_validation_transforms,
    rotation_and_patch_size,
)
from nnunetv2.training.dataloading import data_loader as data_loader_module
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetNumpy
from nnunetv2.utilities.restricted_pickle import save_pickle

PATCH = (8, 10, 9)
SCALES = [[1, 1, 1], [0.5, 0.5, 0.5]]


def seed_all(seed: int) -> None:
    np.random.seed(seed)
    torch.manual_seed(seed)
    random.seed(seed)


@pytest.fixture
def make_loader(make_dataset, make_labels):
    def build(patch=PATCH, batch_size=2, dataset=None, has_ignore=False, augment=False, scales=None, **options):
        dataset = dataset if dataset is not None else make_dataset()
        initial = patch
        if augment:
            geometry = rotation_and_patch_size(patch)
            initial = geometry.initial_patch_size
            options["transforms"] = build_training_transforms(
                patch, geometry.rotation, scales, geometry.mirror_axes, geometry.dummy_2d
            )
        return nnUNetDataLoader(dataset, batch_size, initial, patch, make_labels(has_ignore), **options)

    return build


def test_a_batch_without_transforms_holds_the_patches_as_they_are(make_loader):
    batch = next(make_loader(batch_size=3))
    assert batch["data"].shape == (3, 1, *PATCH) and batch["data"].dtype == torch.float32
    assert batch["target"].shape == (3, 1, *PATCH) and batch["target"].dtype == torch.int16
    assert isinstance(batch["keys"], np.ndarray) and set(batch["keys"]) <= {"case_0", "case_1"}


def test_deep_supervision_gives_a_target_per_resolution(make_loader):
    batch = next(make_loader(augment=True, scales=SCALES))
    assert [tuple(target.shape) for target in batch["target"]] == [(2, 1, 8, 10, 9), (2, 1, 4, 5, 4)]
    assert batch["target"][0].dtype == torch.int16
    assert batch["target"][0].min() >= 0


def test_3d_sizes_stay_arrays_that_subclasses_compute_with(make_loader):
    loader = make_loader(augment=True)
    assert isinstance(loader.patch_size, np.ndarray)
    assert (loader.patch_size - loader.final_patch_size).tolist() == loader.need_to_pad.tolist()
    lower, upper = loader.get_bbox((20, 20, 20), False, None)
    assert {type(corner) for corner in (*lower, *upper)} == {int}
    assert next(loader)["data"].shape == (2, 1, *PATCH)


def test_2d_patches_are_slices(make_loader):
    loader = make_loader(patch=(10, 9), augment=True, scales=[[1, 1], [0.5, 0.5]])
    batch = next(loader)
    assert loader.patch_size_was_2d and loader.final_patch_size == (1, 10, 9)
    assert batch["data"].shape == (2, 1, 10, 9)
    assert batch["target"][1].shape == (2, 1, 5, 4)


def test_regions_with_an_ignore_label_become_channels(make_loader):
    transforms = build_validation_transforms(None, regions=[(1, 2), 2], ignore_label=3)
    batch = next(make_loader(transforms=transforms))
    assert batch["target"].shape == (2, 3, *PATCH) and batch["target"].dtype == torch.bool


def test_a_cascade_gets_the_previous_stage_as_channels_of_the_image(make_loader, make_dataset):
    dataset = make_dataset(with_previous=True)
    transforms = build_validation_transforms(None, is_cascaded=True, foreground_labels=[1, 2])
    batch = next(make_loader(dataset=dataset, transforms=transforms))
    assert batch["data"].shape == (2, 3, *PATCH)
    assert torch.equal(batch["data"][:, 1] == 1, batch["target"][:, 0] == 1)


@pytest.mark.parametrize(
    ("batch_size", "forced"), [(1, 0), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2), (7, 2), (8, 3), (12, 4)]
)
def test_the_last_samples_of_a_batch_hold_foreground(make_loader, batch_size, forced):
    loader = make_loader(batch_size=batch_size, oversample_foreground_percent=0.33)
    decisions = [loader.get_do_oversample(number) for number in range(batch_size)]
    assert decisions == [False] * (batch_size - forced) + [True] * forced


def test_oversampling_by_chance_has_its_probability(make_loader):
    np.random.seed(1)
    loader = make_loader(oversample_foreground_percent=0.25, probabilistic_oversampling=True)
    assert 200 < sum(loader.get_do_oversample(0) for _ in range(1000)) < 300


def test_forced_patches_hold_foreground(make_loader):
    loader = make_loader(patch=(2, 2, 2), batch_size=8, oversample_foreground_percent=1.0)
    assert all((target > 0).any() for target in next(loader)["target"])


def test_sampling_probabilities_choose_the_cases(make_loader):
    loader = make_loader(batch_size=20, sampling_probabilities=[0, 1])
    assert set(next(loader)["keys"]) == {"case_1"}


def test_sides_are_padded_as_asked(make_loader):
    loader = make_loader(pad_sides=(2, 0, 4))
    assert list(loader.need_to_pad) == [2, 0, 4]
    assert list(make_loader(patch=(10, 9), pad_sides=(2, 4)).need_to_pad) == [0, 2, 4]
    assert make_loader(augment=True).need_to_pad.min() > 0


def test_random_patches_are_centred_on_annotated_voxels_if_some_are_ignored(make_loader, caplog):
    loader = make_loader(patch=(2, 2, 2), has_ignore=True)
    key = loader.annotated_classes_key
    assert key == (-1, 0, 1, 2)
    assert loader.get_bbox((20, 20, 20), False, {key: np.array([[0, 5, 6, 7]])}) == ([4, 5, 6], [6, 7, 8])
    with caplog.at_level(logging.WARNING):
        loader.get_bbox((20, 20, 20), False, {key: []})
    assert "no annotated voxels" in caplog.text


def test_foreground_patches_may_reach_far_beyond_the_end_unless_clamped(make_loader):
    loader = make_loader(patch=(8, 8, 8))
    locations = {1: np.array([[0, 19, 19, 19]])}
    assert loader.get_bbox((20, 20, 20), True, locations)[0] == [15, 15, 15]
    loader.clamp_foreground_patches = True
    assert loader.get_bbox((20, 20, 20), True, locations) == ([12, 12, 12], [20, 20, 20])


@pytest.mark.parametrize("patch", [PATCH, (10, 9), (3, 12, 10), (10, 13)])
def test_reading_only_what_the_transform_needs_changes_nothing(make_loader, monkeypatch, patch):
    loader = make_loader(patch=patch, augment=True, scales=None, oversample_foreground_percent=0.5)
    for seed in range(12):
        seed_all(seed)
        deferred = next(loader)
        with monkeypatch.context() as context:
            context.setattr(data_loader_module, "split_off_spatial", lambda transforms: None)
            seed_all(seed)
            whole = next(loader)
        assert list(deferred["keys"]) == list(whole["keys"])
        assert torch.equal(deferred["target"], whole["target"])
        assert torch.allclose(deferred["data"], whole["data"], atol=1e-5)


def test_a_patch_that_is_not_turned_is_read_alone(make_loader, make_dataset):
    dataset = make_dataset(shape=(30, 30, 30))
    loader = make_loader(dataset=dataset, patch=(10, 10, 10), batch_size=1, augment=True)
    spatial = loader.transforms.transforms[0]
    spatial.p_rotation = spatial.p_scaling = 0
    next(loader)
    assert 0 < dataset.voxels_read <= 10**3


def test_an_edited_pipeline_is_applied_as_it_is(make_loader):
    loader = make_loader(augment=True)
    loader.transforms.transforms.pop(0)
    assert next(loader)["data"].shape[2:] == tuple(loader.patch_size)


def test_a_seed_repeats_the_batches(make_loader):
    loader = make_loader(augment=True, scales=SCALES)
    seed_all(3)
    first = [next(loader) for _ in range(3)]
    seed_all(3)
    for batch, expected in zip(iter(loader), first):
        assert torch.equal(batch["data"], expected["data"])
        if batch is first[-1]:
            break


def test_a_seed_repeats_the_batches_with_any_number_of_workers(make_loader):
    expected = None
    for number in (0, 2):
        train, val = build_augmenters(
            make_loader(augment=True, scales=SCALES),
            make_loader(),
            num_processes=number,
            pin_memory=False,
            entropy=(3, 0),
        )
        batches = [next(train) for _ in range(4)] + [next(val)]
        for augmenter in (train, val):
            if number:
                augmenter._finish()
        expected = expected or batches
        for batch, wanted in zip(batches, expected):
            assert list(batch["keys"]) == list(wanted["keys"])
            assert torch.equal(batch["data"], wanted["data"])
            assert torch.equal(batch["target"][0], wanted["target"][0])


def test_patches_of_different_size_are_refused(make_loader):
    loader = make_loader(batch_size=2)
    sizes = iter([(1, 2, 2, 2), (1, 1, 2, 2)])
    loader.transforms = lambda **sample: {name: torch.zeros(size) for size in [next(sizes)] for name in sample}
    with pytest.raises(ValueError, match="patches of a batch differ"):
        next(loader)


def test_a_loader_can_be_pickled(make_loader):
    loader = pickle.loads(pickle.dumps(make_loader(augment=True, scales=SCALES)))
    assert next(loader)["data"].shape == (2, 1, *PATCH)


def test_an_error_names_the_case(make_loader, make_dataset):
    dataset = make_dataset(number=1)
    dataset.load_case = lambda identifier: 1 / 0
    with pytest.raises(RuntimeError, match="case case_0: ZeroDivisionError"):
        next(make_loader(dataset=dataset))


def test_a_dataset_without_cases_is_refused(make_loader, make_dataset):
    with pytest.raises(ValueError, match="no cases"):
        make_loader(dataset=make_dataset(number=0))


def test_hooks_of_a_subclass_are_used(make_dataset, make_labels):
    class Mine(nnUNetDataLoader):
        def get_indices(self):
            return ["case_1"]

        def get_do_oversample(self, sample_idx):
            return True

        def get_bbox(self, data_shape, force_fg, class_locations, overwrite_class=None, verbose=False):
            assert force_fg
            return np.array([0, 1, 2]), np.array([3, 4, 5])

    dataset = make_dataset()
    batch = next(Mine(dataset, 2, (3, 3, 3), (3, 3, 3), make_labels(), transforms=ComposeTransforms([])))
    assert list(batch["keys"]) == ["case_1"]
    assert np.array_equal(batch["data"][0], dataset.cases["case_1"][0][:, 0:3, 1:4, 2:5])


def test_data_loaders_keep_properties_and_plain_datasets_do_not(tmp_path, make_labels):
    save_pickle({"class_locations": {1: np.full((10, 4), 3)}}, str(tmp_path / "a.pkl"))
    dataset = nnUNetDatasetNumpy(str(tmp_path), ["a"])
    assert dataset.properties_cache is None
    assert dataset._load_properties("a")["class_locations"][1].dtype == np.int64
    nnUNetDataLoader(dataset, 1, (2, 2, 2), (2, 2, 2), make_labels())
    assert dataset._load_properties("a")["class_locations"][1].dtype == np.int32
