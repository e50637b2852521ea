"""Interpret the labels of a dataset: classes, regions, the ignore label.

Turn network outputs into label maps.

Network outputs are `(c, *spatial)` with one channel per class (background first) or per region.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nnunetv2.utilities.device import has_torch
from nnunetv2.utilities.helpers import softmax_helper_dim0
from nnunetv2.utilities.trusted_names import find_class

if TYPE_CHECKING:
    import torch

    ArrayOrTensor = np.ndarray | torch.Tensor

logger = logging.getLogger(__name__)

LabelOrRegion = int | tuple[int, ...]


def sigmoid(logits: torch.Tensor) -> torch.Tensor:
    """Apply the logistic function; torch.sigmoid without importing torch here."""
    return logits.sigmoid()


class LabelManager:
    """The labels of a dataset.

    Args:
        label_dict: `labels` of dataset.json: name -> int, or name -> several ints, a region.
        regions_class_order: For datasets with regions: the label that each region other than background gets in a
            label map, in the order in which they are written, later ones over earlier ones.
        force_use_labels: Treat a dataset with regions as one with plain labels.
        inference_nonlin: The function from logits to probabilities, if not softmax (labels) or the logistic function
            (regions).

    Raises:
        RuntimeError: There is no background, or it is a list.
        AssertionError: Background is not 0, the ignore label is not the highest label plus one, or regions_class_order
            does not fit the regions.
    """

    def __init__(
        self,
        label_dict: Mapping[str, int | Sequence[int]],
        regions_class_order: Sequence[int] | None,
        force_use_labels: bool = False,
        inference_nonlin: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.label_dict = label_dict
        self.regions_class_order = regions_class_order
        self._force_use_labels = force_use_labels
        self._sanity_check()
        self._has_regions = not force_use_labels and any(
            _is_collection(value) and len(value) > 1 for value in label_dict.values()
        )
        self._ignore_label = self._determine_ignore_label()
        self._all_labels = self._get_all_labels()
        self._regions = self._get_regions()
        self._check_ignore_label()
        if inference_nonlin is None:
            inference_nonlin = sigmoid if self.has_regions else softmax_helper_dim0
        self.inference_nonlin = inference_nonlin

    def _sanity_check(self) -> None:
        if "background" not in self.label_dict:
            raise RuntimeError(
                f"dataset.json: 'labels' must contain 'background': 0; it has {', '.join(map(str, self.label_dict))}"
            )
        background = self.label_dict["background"]
        if _is_collection(background):
            raise RuntimeError(f"dataset.json: background must be the number 0, not the list {background}")
        assert int(background) == 0, f"dataset.json: background must be 0, not {background}"

    def _determine_ignore_label(self) -> int | None:
        label = self.label_dict.get("ignore")
        assert label is None or isinstance(label, int), (
            f"dataset.json: the ignore label must be a whole number, not {label!r}"
        )
        return label

    def _get_all_labels(self) -> list[int]:
        labels = [
            int(label)
            for name, value in self.label_dict.items()
            if name != "ignore"
            for label in (value if _is_collection(value) else [value])
        ]
        return list(np.unique(labels))

    def _get_regions(self) -> list[LabelOrRegion] | None:
        if not self.has_regions:
            return None
        values = [
            tuple(int(label) for label in value) if _is_collection(value) else int(value)
            for name, value in self.label_dict.items()
            if name != "ignore"
        ]
        regions = self.filter_background(values)
        assert self.regions_class_order is not None, (
            "dataset.json: labels that are lists of numbers (regions) need 'regions_class_order'"
        )
        assert len(self.regions_class_order) == len(regions), (
            f"dataset.json: regions_class_order has {len(self.regions_class_order)} entries, but there are "
            f"{len(regions)} regions besides background"
        )
        return regions

    def _check_ignore_label(self) -> None:
        if self.has_ignore_label:
            expected = max(self._all_labels) + 1
            assert self._ignore_label == expected, (
                f"dataset.json: the ignore label must be the highest label plus one, {expected}; "
                f"it is {self._ignore_label}"
            )

    @property
    def has_regions(self) -> bool:
        """Whether some class is the union of several labels."""
        return self._has_regions

    @property
    def has_ignore_label(self) -> bool:
        """Whether some voxels are not annotated and carry the ignore label."""
        return self._ignore_label is not None

    @property
    def ignore_label(self) -> int | None:
        """The label of voxels that are not annotated."""
        return self._ignore_label

    @property
    def all_labels(self) -> list[int]:
        """All labels but the ignore label, ascending, as NumPy integers. A new list each time."""
        return list(self._all_labels)

    @property
    def all_regions(self) -> list[LabelOrRegion] | None:
        """All regions but background in the order of dataset.json; None without regions."""
        return None if self._regions is None else list(self._regions)

    @property
    def foreground_labels(self) -> list[int]:
        """All labels but background and the ignore label, ascending."""
        return self.filter_background(self._all_labels)

    @property
    def foreground_regions(self) -> list[LabelOrRegion]:
        """All regions but background.

        Raises:
            TypeError: The dataset has no regions.
        """
        if self._regions is None:
            raise TypeError("this dataset has no regions; use foreground_labels")
        return self.filter_background(self._regions)

    @property
    def num_segmentation_heads(self) -> int:
        """Channels of the network's output: one per region, or one per label with background."""
        return len(self.foreground_regions) if self.has_regions else len(self._all_labels)

    @staticmethod
    def filter_background(classes_or_regions: Iterable[LabelOrRegion | Sequence[int]]) -> list:
        """Return the entries without 0 and without collections of nothing but 0."""
        return [entry for entry in classes_or_regions if not _is_background(entry)]

    def apply_inference_nonlin(self, logits: ArrayOrTensor) -> ArrayOrTensor:
        """Turn logits `(c, ...)` into float32 probabilities of the same shape.

        They are a tensor, or an array where torch is not installed.

        Raises:
            RuntimeError: Torch is not installed, and the function is another one than softmax and logistic.
        """
        if not has_torch():
            return self._apply_without_torch(logits)
        import torch

        if isinstance(logits, np.ndarray):
            logits = torch.from_numpy(logits)
        with torch.no_grad():
            # half precision would round probabilities near 1 to 1
            return self.inference_nonlin(logits.float())

    def _apply_without_torch(self, logits: np.ndarray) -> np.ndarray:
        from scipy.special import expit, softmax

        logits = logits.astype(np.float32, copy=False)
        if self.inference_nonlin is sigmoid:
            return expit(logits)
        if self.inference_nonlin is softmax_helper_dim0:
            return softmax(logits, axis=0)
        raise RuntimeError(
            f"{self.inference_nonlin} turns logits into probabilities with torch, which is not installed"
        )

    def convert_probabilities_to_segmentation(self, predicted_probabilities: ArrayOrTensor) -> ArrayOrTensor:
        """Turn probabilities `(c, *spatial)` into a label map `(*spatial)`.

        Labels: the most probable class, the first one of equals, as int64. Regions: each region writes its label where
        it is more probable than not, in the order of regions_class_order, as uint16 (array) or int16 (tensor).

        Raises:
            RuntimeError: Neither an array nor a tensor.
            AssertionError: The number of channels is not `num_segmentation_heads`.
        """
        probabilities = predicted_probabilities
        if not isinstance(probabilities, np.ndarray) and not _is_tensor(probabilities):
            raise RuntimeError(f"probabilities must be a NumPy array or a tensor, not {type(probabilities)}")
        assert probabilities.shape[0] == self.num_segmentation_heads, (
            f"there must be one channel per segmentation head ({self.num_segmentation_heads}), "
            f"but the shape is {tuple(probabilities.shape)}"
        )
        if self.has_regions:
            return self._paint_regions(probabilities)
        return _argmax(probabilities)

    def _paint_regions(self, probabilities: ArrayOrTensor) -> ArrayOrTensor:
        if isinstance(probabilities, np.ndarray):
            segmentation = np.zeros(probabilities.shape[1:], dtype=np.uint16)
        else:
            import torch

            segmentation = torch.zeros(probabilities.shape[1:], dtype=torch.int16, device=probabilities.device)
        for probability, label in zip(probabilities, self.regions_class_order):
            segmentation[probability > 0.5] = label
        return segmentation

    def convert_logits_to_segmentation(self, predicted_logits: ArrayOrTensor) -> ArrayOrTensor:
        """Turn logits `(c, *spatial)` into a label map `(*spatial)`; arrays give arrays, tensors give tensors."""
        if not self.has_regions:
            # the largest logit is the largest probability
            return self.convert_probabilities_to_segmentation(predicted_logits)
        probabilities = self.apply_inference_nonlin(predicted_logits)
        if isinstance(predicted_logits, np.ndarray) and not isinstance(probabilities, np.ndarray):
            probabilities = probabilities.cpu().numpy()
        return self.convert_probabilities_to_segmentation(probabilities)

    def revert_cropping_on_probabilities(
        self, predicted_probabilities: ArrayOrTensor, bbox: Sequence[Sequence[int]], original_shape: Sequence[int]
    ) -> ArrayOrTensor:
        """Put probabilities `(c, *cropped)` back into the uncropped image, which is background outside.

        Args:
            predicted_probabilities: Array or tensor.
            bbox: One half-open interval per spatial axis.
            original_shape: Spatial shape before cropping.

        Returns:
            `(c, *original_shape)` of the same dtype. Without regions, background has probability 1 outside.
        """
        shape = (predicted_probabilities.shape[0], *original_shape)
        if isinstance(predicted_probabilities, np.ndarray):
            full = np.zeros(shape, dtype=predicted_probabilities.dtype)
        else:
            full = predicted_probabilities.new_zeros(shape)
        if not self.has_regions:
            full[0] = 1
        full[(slice(None), *(slice(start, end) for start, end in bbox))] = predicted_probabilities
        return full


def get_labelmanager_class_from_plans(plans: Mapping) -> type[LabelManager]:
    """Return the label manager class that plans name, or LabelManager if they name none.

    Raises:
        RuntimeError: There is no class of this name.
        UntrustedNameError: The name means something else.
    """
    if "label_manager" not in plans:
        logger.info("the plans name no label_manager; using LabelManager")
        return LabelManager
    folder = str(Path(__file__).parents[1] / "utilities" / "label_handling")  # users add theirs there
    found = find_class(
        plans["label_manager"],
        field="label_manager in the plans",
        folder=folder,
        package="nnunetv2.utilities.label_handling",
        base=LabelManager,
    )
    if found is None:
        raise RuntimeError(f"no label manager named {plans['label_manager']!r} found in {folder}")
    return found


def convert_labelmap_to_one_hot(
    segmentation: ArrayOrTensor, all_labels: Sequence[int], output_dtype: np.dtype | torch.dtype | None = None
) -> ArrayOrTensor:
    """Turn a label map `(*spatial)` into one mask per label.

    Shape `(len(all_labels), *spatial)`, 1 where the map has the label, else 0.

    Arrays give arrays, tensors give tensors. The default dtype is uint8, and for labels from 255 on uint16 (tensors:
    int16).
    """
    is_array = isinstance(segmentation, np.ndarray)
    shape = (len(all_labels), *segmentation.shape)
    has_many = max(all_labels) >= 255
    if is_array:
        one_hot = np.zeros(shape, dtype=output_dtype or (np.uint16 if has_many else np.uint8))
    else:
        import torch

        one_hot = segmentation.new_zeros(shape, dtype=output_dtype or (torch.int16 if has_many else torch.uint8))
    for channel, label in zip(one_hot, all_labels):
        channel[segmentation == int(label)] = 1
    return one_hot


def _is_collection(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _is_background(entry: LabelOrRegion | Sequence[int]) -> bool:
    if np.ndim(entry) == 0:
        return entry == 0
    return {int(label) for label in entry} == {0}


def _argmax(values: ArrayOrTensor) -> ArrayOrTensor:
    """Return the index of the first maximum along axis 0, as int64."""
    if isinstance(values, np.ndarray):
        return values.argmax(0)
    import torch

    if values.device.type != "cpu" or values.dtype not in (torch.float16, torch.float32, torch.float64):
        return values.argmax(0)
    # along the first axis, NumPy is three to four times as fast as torch on a CPU
    return torch.from_numpy(values.detach().numpy().argmax(0))


def _is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor)
