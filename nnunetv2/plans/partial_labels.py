"""Read from dataset.json the classes that a site of a federation annotates.

Sites may annotate different ones.

The dataset.json in nnUNet_preprocessed has the labels of all sites then, and two keys more:

    "annotated_labels": ["background", "anterior"]              those of this site
    "values_in_raw_data": {"background": 0, "anterior": 2}      their values in its own label files

A dataset.json without them is that of a site that annotates all its classes, under the values in its files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunetv2.errors import InvalidInputError

if TYPE_CHECKING:
    from nnunetv2.plans.label_manager import LabelManager

ANNOTATED, RAW_VALUES = "annotated_labels", "values_in_raw_data"
BACKGROUND, IGNORE = "background", "ignore"


def with_union(raw: Mapping[str, Any], labels: Mapping[str, int]) -> dict[str, Any]:
    """Return the dataset.json of a site with the labels of all sites.

    Args:
        raw: That of its raw data.
        labels: Name -> common number.
    """
    return {**raw, "labels": dict(labels), ANNOTATED: list(raw["labels"]), RAW_VALUES: dict(raw["labels"])}


def as_in_raw_data(dataset_json: Mapping[str, Any]) -> dict[str, Any]:
    """Return dataset.json as it is beside the raw data."""
    own = {key: value for key, value in dataset_json.items() if key not in (ANNOTATED, RAW_VALUES)}
    return {**own, "labels": dataset_json[RAW_VALUES]} if RAW_VALUES in dataset_json else own


def without_raw_values(dataset_json: Mapping[str, Any]) -> dict[str, Any]:
    """Return dataset.json for label maps that have the common numbers already."""
    return {key: value for key, value in dataset_json.items() if key != RAW_VALUES}


def unannotated_labels(dataset_json: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the foreground labels that are not annotated here, ascending."""
    annotated = dataset_json.get(ANNOTATED)
    if annotated is None:
        return ()
    labels = {name: value for name, value in dataset_json["labels"].items() if name not in (BACKGROUND, IGNORE)}
    return tuple(sorted(value for name, value in labels.items() if name not in annotated))


def scored_classes(label_manager: LabelManager, dataset_json: Mapping[str, Any]) -> list[Any]:
    """Return the classes or regions on which predictions are scored: the annotated ones."""
    if label_manager.has_regions:
        return label_manager.foreground_regions
    hidden = unannotated_labels(dataset_json)
    return [label for label in label_manager.foreground_labels if label not in hidden]


def common_numbers(dataset_json: Mapping[str, Any]) -> dict[int, int]:
    """Return value in the label files -> common number; empty where these are the same."""
    raw, labels = dataset_json.get(RAW_VALUES, {}), dataset_json.get("labels", {})
    numbers = {int(value): int(labels[name]) for name, value in raw.items()}
    return numbers if any(value != number for value, number in numbers.items()) else {}


def renumber(segmentation: np.ndarray, numbers: Mapping[int, int]) -> np.ndarray:
    """Return a label map with common numbers; unchanged where there are no others.

    Raises:
        InvalidInputError: It has a value that dataset.json does not name.
    """
    if not numbers:
        return segmentation
    result = np.zeros(
        segmentation.shape, np.promote_types(segmentation.dtype, np.min_scalar_type(max(numbers.values())))
    )
    found = 0
    for value, number in numbers.items():
        voxels = segmentation == value
        found += int(np.count_nonzero(voxels))
        result[voxels] = number
    if found < segmentation.size:
        unknown = np.setdiff1d(segmentation, list(numbers))
        raise InvalidInputError(
            f"the label map has the value {unknown[0]}, which 'labels' of dataset.json does not name: expected "
            f"{', '.join(map(str, sorted(numbers)))}"
        )
    return result
