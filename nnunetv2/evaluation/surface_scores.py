"""Score the surfaces of classes, each inside its bounding box."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nnunetv2.evaluation.summary import LabelOrRegion, labels_of, plain_class
from nnunetv2.evaluation.surface_distances import compute_surface_metrics

Box = tuple[slice, ...]


def score_surfaces(
    reference: np.ndarray,
    prediction: np.ndarray,
    classes: Sequence[LabelOrRegion],
    spacing_mm: Sequence[float],
    tolerance_mm: float,
    ignore_label: int | None = None,
) -> dict[LabelOrRegion, dict[str, float]]:
    """Return HD95, ASSD and SurfaceDice per class.

    Args:
        reference: Label map of three axes; with one slice it is compared in 2D.
        prediction: Likewise, of the same shape.
        spacing_mm: Size of a voxel along each axis.
        ignore_label: Voxels that the reference gives this label belong to no class in either map.
    """
    if ignore_label is not None:
        prediction = np.where(reference == ignore_label, 0, prediction)
    reference, prediction, spacing_mm = _without_flat_axis(reference, prediction, spacing_mm)
    boxes = _boxes_of_labels(reference), _boxes_of_labels(prediction)
    scores = {}
    for which in classes:
        labels = labels_of(which)
        box = _union([found[int(label)] for found in boxes for label in labels if int(label) in found])
        box = box or (slice(0, 0),) * reference.ndim
        ours, theirs = (np.isin(labelled[box], labels) for labelled in (prediction, reference))
        scores[plain_class(which)] = compute_surface_metrics(theirs, ours, spacing_mm, tolerance_mm)
    return scores


def _without_flat_axis(
    reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Leave the first axis of length 1 out.

    A flat object has an outline, no surface.
    """
    if 1 not in reference.shape:
        return reference, prediction, list(spacing_mm)
    axis = reference.shape.index(1)
    return reference.squeeze(axis), prediction.squeeze(axis), [*spacing_mm[:axis], *spacing_mm[axis + 1 :]]


def _boxes_of_labels(labelled: np.ndarray) -> dict[int, Box]:
    from scipy.ndimage import find_objects

    labels = np.where(labelled > 0, labelled, 0).astype(np.int32)
    return {number: box for number, box in enumerate(find_objects(labels), start=1) if box is not None}


def _union(boxes: Sequence[Box]) -> Box | None:
    if not boxes:
        return None
    return tuple(slice(min(part.start for part in parts), max(part.stop for part in parts)) for parts in zip(*boxes))
