"""Build and end the batch streams of a trainer."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar, cast

from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter

from nnunetv2.training.data_augmentation.augmenters import WorkerAugmenter, build_augmenters
from nnunetv2.training.seeding import seed_from_environment

if TYPE_CHECKING:
    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


Loader = TypeVar("Loader", bound="nnUNetDataLoader")


def build_loaders(
    trainer: nnUNetTrainer, *, training_class: type[Loader], validation_class: type[nnUNetDataLoader]
) -> tuple[Loader, nnUNetDataLoader]:
    """Return the loaders of training and of validation data, with the transforms of a trainer."""
    patch_size = trainer.configuration_manager.patch_size
    scales = trainer._get_deep_supervision_scales()
    rotation, dummy_2d, initial_patch_size, mirror_axes = (
        trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    )
    labels = trainer.label_manager
    shared: dict[str, Any] = {
        "is_cascaded": trainer.is_cascaded,
        "foreground_labels": labels.foreground_labels,
        "regions": labels.foreground_regions if labels.has_regions else None,
        "ignore_label": labels.ignore_label,
    }
    train_transforms = trainer.get_training_transforms(
        patch_size,
        rotation,
        scales,
        mirror_axes,
        dummy_2d,
        use_mask_for_norm=trainer.configuration_manager.use_mask_for_norm,
        **shared,
    )
    val_transforms = trainer.get_validation_transforms(scales, **shared)
    train_set, val_set = trainer.get_tr_and_val_datasets()
    training, validation = (
        loader_class(
            dataset,
            trainer.batch_size,
            size,
            patch_size,
            labels,
            oversample_foreground_percent=trainer.oversample_foreground_percent,
            sampling_probabilities=None,
            pad_sides=None,
            transforms=transforms,
            probabilistic_oversampling=trainer.probabilistic_oversampling,
        )
        for loader_class, dataset, size, transforms in (
            (training_class, train_set, initial_patch_size, train_transforms),
            (validation_class, val_set, patch_size, val_transforms),
        )
    )
    return cast("Loader", training), validation


def start_augmenters(
    trainer: nnUNetTrainer, *, loader_class: type[nnUNetDataLoader], num_processes: int
) -> tuple[Iterator[dict], Iterator[dict]]:
    """Return endless training and validation batches, whose workers are running already.

    Nobody waits for their first batches: until the first step there is more to do.
    """
    loaders = build_loaders(trainer, training_class=loader_class, validation_class=loader_class)
    seed, epoch = seed_from_environment(), trainer.current_epoch
    augmenters = build_augmenters(
        *loaders,
        num_processes=num_processes,
        pin_memory=trainer.device.type == "cuda",
        entropy=None if seed is None else (seed, trainer.local_rank),
        first_batches=(epoch * trainer.num_iterations_per_epoch, epoch * trainer.num_val_iterations_per_epoch),
    )
    for augmenter in augmenters:
        if isinstance(augmenter, WorkerAugmenter):
            augmenter.start()
    return augmenters


def stop_augmenters(*augmenters: object) -> None:
    """End the workers of augmenters, quietly; other iterators are left alone."""
    with contextlib.redirect_stdout(io.StringIO()):
        for augmenter in augmenters:
            if isinstance(augmenter, (NonDetMultiThreadedAugmenter, MultiThreadedAugmenter)):
                augmenter._finish()
