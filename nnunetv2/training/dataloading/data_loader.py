"""Draw training batches: choose cases, choose patches, read them and transform them."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from batchgenerators.dataloading.data_loader import DataLoader
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from torch import Tensor

from nnunetv2.preprocessed_data.array_cache import ArrayCache
from nnunetv2.preprocessed_data.datasets import nnUNetBaseDataset
from nnunetv2.preprocessed_data.properties_cache import PropertiesCache
from nnunetv2.training.dataloading.deferred_crop import SpatialStep, read_and_transform, split_off_spatial
from nnunetv2.training.dataloading.patch_position import (
    ClassLocations,
    corner_around,
    corner_range,
    draw_class,
    draw_corner,
    draw_voxel,
)
from nnunetv2.training.dataloading.patch_reading import read_sample
from nnunetv2.utilities.legacy_names import names_from, origins

if TYPE_CHECKING:
    from nnunetv2.plans.label_manager import LabelManager

logger = logging.getLogger(__name__)

Target = Tensor | list[Tensor]

# Names that copies of the loader import from here.
_ORIGINS = origins(
    {
        "acvl_utils.cropping_and_padding.bounding_boxes": "crop_and_pad_nd",
        "batchgenerators.utilities.file_and_folder_operations": "join load_json",
        "nnunetv2.paths": "nnUNet_preprocessed",
        "nnunetv2.training.dataloading.nnunet_dataset": "nnUNetDatasetBlosc2",
        "nnunetv2.utilities.label_handling.label_handling": "LabelManager",
        "nnunetv2.utilities.plans_handling.plans_handler": "PlansManager",
        "threadpoolctl": "threadpool_limits",
        "typing": "List Tuple Union",
    },
    os="os",
    warnings="warnings",
)

__all__ = ["DataLoader", "nnUNetBaseDataset", "nnUNetDataLoader", "np", "torch", *_ORIGINS]
__getattr__ = names_from(_ORIGINS, __name__)


class nnUNetDataLoader(DataLoader):
    """An endless iterator of batches, drawn with numpy's and torch's global generators.

    Override `get_indices` to choose other cases, `get_do_oversample` and `get_bbox` to choose other patches,
    `generate_train_batch` for everything. Objects of this class can be pickled as long as their transforms can.

    Args:
        data: Where cases come from; all of its identifiers are drawn with the same chance, or with
            `sampling_probabilities`.
        patch_size: Size of the patches that are read, two or three axes; large enough for the transforms.
        final_patch_size: Size after the transforms, that of the network's input.
        label_manager: Tells whether parts of the images are not annotated (ignore label).
        oversample_foreground_percent: Share of the patches that hold a voxel of a class drawn at random.
        pad_sides: Voxels per axis that patches may reach beyond the image, in addition to those for rotation.
        probabilistic_oversampling: Toss a coin for each patch, instead of taking the last ones of each batch.
        transforms: Called with `image` and `segmentation`; also converts targets.
    """

    clamp_foreground_patches = False
    """Keep patches around a foreground voxel from reaching further beyond the far end of the image than random ones.
    nnU-Net has always let them; set to True in a subclass for patches with less padding."""

    def __init__(
        self,
        data: nnUNetBaseDataset,
        batch_size: int,
        patch_size: Sequence[int],
        final_patch_size: Sequence[int],
        label_manager: LabelManager,
        oversample_foreground_percent: float = 0.0,
        sampling_probabilities: Sequence[float] | None = None,
        pad_sides: Sequence[int] | None = None,
        probabilistic_oversampling: bool = False,
        transforms: BasicTransform | None = None,
    ) -> None:
        super().__init__(
            data,
            batch_size,
            num_threads_in_multithreaded=1,
            seed_for_shuffle=None,
            return_incomplete=True,
            shuffle=False,
            infinite=True,
            sampling_probabilities=sampling_probabilities,
        )
        if isinstance(data, nnUNetBaseDataset):
            data.properties_cache, data.array_cache = PropertiesCache(), ArrayCache()
        self.indices = data.identifiers
        if len(self.indices) == 0:
            raise ValueError(f"there are no cases to load in {getattr(data, 'source_folder', 'the dataset')}")
        self.patch_size_was_2d = len(patch_size) == 2
        self.patch_size = self._with_slice_axis(patch_size, 1)
        self.final_patch_size = self._with_slice_axis(final_patch_size, 1)
        self.pad_sides = None if pad_sides is None else self._with_slice_axis(pad_sides, 0)
        self.need_to_pad = np.subtract(self.patch_size, self.final_patch_size).astype(int)
        if self.pad_sides is not None:
            self.need_to_pad = self.need_to_pad + self.pad_sides
        self.num_channels = None
        self.oversample_foreground_percent = oversample_foreground_percent
        self.probabilistic_oversampling = probabilistic_oversampling
        self.annotated_classes_key = (-1, *label_manager.all_labels)
        self.has_ignore = label_manager.has_ignore_label
        self.transforms = transforms

    def _with_slice_axis(self, lengths: Sequence[int], slices: int) -> Sequence[int]:
        """Give 2D sizes a first axis, as cases always have three.

        Other sizes stay as they are, such as arrays.
        """
        return (slices, *lengths) if self.patch_size_was_2d else lengths

    def get_do_oversample(self, sample_idx: int) -> bool:
        """Tell whether the sample with this number in its batch must hold foreground.

        One of the two rules below decides, which a subclass may override one by one.
        """
        if self.probabilistic_oversampling:
            return self._probabilistic_oversampling(sample_idx)
        return self._oversample_last_XX_percent(sample_idx)

    def _oversample_last_XX_percent(self, sample_idx: int) -> bool:
        """Choose the last samples of each batch, as many as make up the share."""
        return sample_idx >= round(self.batch_size * (1 - self.oversample_foreground_percent))

    def _probabilistic_oversampling(self, sample_idx: int) -> bool:
        """Toss a coin for each sample."""
        return np.random.uniform() < self.oversample_foreground_percent

    def get_bbox(
        self,
        data_shape: Sequence[int],
        force_fg: bool,
        class_locations: ClassLocations | None,
        overwrite_class: Hashable | None = None,
        verbose: bool = False,
    ) -> tuple[list[int], list[int]]:
        """Choose a patch in a case: lower and upper corner, half-open, possibly beyond the image.

        Args:
            data_shape: Spatial shape of the case.
            force_fg: The patch must hold a voxel of some class, if there is any.
            class_locations: Voxels of each class; needed if `force_fg` or if there is an ignore label.
            overwrite_class: The class to take, if it occurs.
            verbose: Report the class that was chosen.
        """
        patch_size = [int(length) for length in self.patch_size]
        smallest, largest = corner_range(data_shape, patch_size, self.need_to_pad)
        chosen_class = self._choose_class(force_fg, class_locations, overwrite_class)
        if verbose:
            logger.info("patch around a voxel of class %s", chosen_class)
        if chosen_class is None:
            corner = draw_corner(smallest, largest)
        else:
            assert class_locations is not None  # or there would be no class
            voxel = draw_voxel(class_locations[chosen_class])
            limit = largest if self.clamp_foreground_patches else None
            corner = corner_around(voxel, patch_size, smallest, limit)
        return corner, [low + size for low, size in zip(corner, patch_size)]

    def _choose_class(
        self, force_fg: bool, class_locations: ClassLocations | None, overwrite_class: Hashable | None
    ) -> Hashable | None:
        """Return the class that the patch is centred on; None for a random patch."""
        if force_fg:
            if class_locations is None:
                raise ValueError("a patch with foreground needs class_locations")
            return draw_class(class_locations, self.annotated_classes_key, overwrite_class)
        if not self.has_ignore:
            return None
        # Most of a sparsely annotated image teaches nothing: random patches are centred on annotated voxels.
        if class_locations is not None and len(class_locations.get(self.annotated_classes_key, ())) > 0:
            return self.annotated_classes_key
        logger.warning("a case has no annotated voxels; its patch is drawn at random")
        return None

    def generate_train_batch(self) -> dict:
        """Return `data` `(b, c, *patch)`, `target` and the cases' `keys`.

        `target` is a list with deep supervision.
        """
        keys = self.get_indices()
        data: Any = None
        target: Any = None
        step = split_off_spatial(self.transforms)
        with torch.no_grad():
            for number, key in enumerate(keys):
                # Copied at once, while a sample is in the processor's cache and its memory can serve the next one.
                image, labels = self._load_sample(key, self.get_do_oversample(number), step)
                if data is None:
                    data, target = _allocate(image, len(keys)), _allocate(labels, len(keys))
                _write(data, number, image)
                _write(target, number, labels)
        return {"data": data, "target": target, "keys": np.asarray(keys)}

    def _load_sample(self, key: str, force_fg: bool, step: SpatialStep | None) -> tuple[Tensor, Target]:
        """Read and transform a patch of one case."""
        try:
            data, seg, seg_prev, properties = self._data.load_case(key)
            shape = data.shape[1:]
            lower, upper = self.get_bbox(shape, force_fg, properties.get("class_locations"))
            read = partial(self._read, data, seg, seg_prev)
            if step is not None:
                sample = read_and_transform(step, read, lower, upper, shape)
            else:
                image, labels = read(lower, upper)
                sample = {"image": image, "segmentation": labels}
                if self.transforms is not None:
                    sample = self.transforms(**sample)
        except Exception as error:  # whatever it is, only here the case is known
            raise RuntimeError(f"case {key}: {type(error).__name__}: {error}") from error
        return sample["image"], sample["segmentation"]

    def _read(
        self, data: np.ndarray, seg: np.ndarray, seg_prev: np.ndarray | None, lower: Sequence[int], upper: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        image, labels = read_sample(data, seg, seg_prev, lower, upper)
        return (image[:, 0], labels[:, 0]) if self.patch_size_was_2d else (image, labels)


def _allocate(sample: Any, batch_size: int) -> Any:
    """Return room for a batch of tensors like this one, or a list of them where it is a list."""
    if isinstance(sample, (list, tuple)):
        return [_allocate(entry, batch_size) for entry in sample]
    return torch.empty((batch_size, *sample.shape), dtype=sample.dtype)


def _write(batch: Any, number: int, sample: Any) -> None:
    """Copy a sample to its place in a batch."""
    if isinstance(sample, (list, tuple)):
        for batch_entry, entry in zip(batch, sample):
            _write(batch_entry, number, entry)
    elif sample.shape != batch.shape[1:]:  # assignment would broadcast
        raise ValueError(f"patches of a batch differ: {tuple(sample.shape)} and {tuple(batch.shape[1:])}")
    else:
        batch[number] = sample
