"""Compare a label map with a prediction: distance per class, and regions that differ.

Distances are in millimetres: the volume on which two masks disagree, divided by the mean area of their surfaces. For
two nearby surfaces that is about the mean distance between them, for a structure that one of the two lacks about two
thirds of its radius. So one scale holds for boundaries and for missing and superfluous structures, and specks count for
little.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MISSING, EXTRA, SWAPPED, SHIFTED, BOUNDARY = "missing", "extra", "swapped", "shifted", "boundary"
"""Kinds of regions: only in the prediction, only in the label, labelled as another class, moved, or with another
boundary."""

_SAME_STRUCTURE = 0.1
"""From this share of common voxels on, two components are one structure."""
_EXPLAINED = 0.6
"""A shift is the explanation if it leaves no more than this share of the distance."""

Classes = Mapping[str, tuple[int, ...]]
"""Name of a class -> the labels that make it up."""
Box = tuple[slice, ...]


@dataclass(frozen=True)
class Region:
    """A connected part of a case in which label and prediction disagree."""

    kind: str
    class_name: str
    distance_mm: float
    volume_mm3: float
    """Of the voxels on which they disagree."""
    centre: tuple[int, ...]
    """Voxel `(z, y, x)`."""
    description: str
    """The suggestion of the prediction, in words."""


@dataclass(frozen=True)
class Figures:
    """Distance and offset of a class in one case."""

    distance_mm: float
    offset_mm: float
    """Mean offset of the boundary: above 0, the label is too small; below 0, too large."""


@dataclass(frozen=True)
class Disagreement:
    """Figures and regions of one case."""

    figures: dict[str, Figures]
    """Per class; classes that are in neither are left out."""
    regions: list[Region]
    """Farthest apart first."""


def compare(
    label: np.ndarray,
    prediction: np.ndarray,
    *,
    spacing: Sequence[float],
    classes: Classes,
    ignore_label: int | None = None,
) -> Disagreement:
    """Compare a label map with a prediction.

    Args:
        label: `(z, y, x)`; axes may have length 1.
        prediction: Of the same shape.
        spacing: Millimetres along each axis.
        classes: Those to compare.
        ignore_label: Voxels that carry it in the label map do not count.

    Raises:
        ValueError: Shapes differ.
    """
    if label.shape != prediction.shape:
        raise ValueError(f"the label map has shape {label.shape}, the prediction {prediction.shape}")
    if ignore_label is not None:
        counted = label != ignore_label
        label, prediction = np.where(counted, label, 0), np.where(counted, prediction, 0)
    boxes = [*_boxes_of_labels(label), *_boxes_of_labels(prediction)]
    figures: dict[str, Figures] = {}
    regions: list[Region] = []
    for name, labels in classes.items():
        box = _join([one for value, one in boxes if value in labels])
        if box is not None:
            labelled, predicted = np.isin(label[box], labels), np.isin(prediction[box], labels)
            figures[name] = Figures(distance_mm(labelled, predicted, spacing), offset_mm(labelled, predicted, spacing))
            others = {other: set(values) for other, values in classes.items() if not set(values) & set(labels)}
            finder = _RegionFinder(
                name, label[box], prediction[box], spacing, others, offset=[side.start for side in box]
            )
            regions += finder.find(labelled, predicted)
    return Disagreement(figures, sorted(regions, key=lambda region: -region.distance_mm))


def distance_mm(one: np.ndarray, other: np.ndarray, spacing: Sequence[float]) -> float:
    """Return the volume on which two masks disagree over the mean area of their surfaces."""
    return _over_surface(int(np.count_nonzero(one != other)), one, other, spacing)


def offset_mm(label: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]) -> float:
    """Return how much larger the prediction is, as the mean offset of the boundary."""
    return _over_surface(int(np.count_nonzero(prediction) - np.count_nonzero(label)), label, prediction, spacing)


def _over_surface(voxels: int, one: np.ndarray, other: np.ndarray, spacing: Sequence[float]) -> float:
    volume = voxels * math.prod(spacing)
    if volume == 0:
        return 0.0
    area = (surface_mm2(one, spacing) + surface_mm2(other, spacing)) / 2
    # Masks without a surface fill the whole image, or are empty.
    return float(volume / area) if area else math.copysign(abs(volume) ** (1 / one.ndim), volume)


def surface_mm2(mask: np.ndarray, spacing: Sequence[float]) -> float:
    """Return the area of a mask's surface, made of faces between voxels.

    The border of the image is no surface.
    """
    voxel = math.prod(spacing)
    faces = (np.count_nonzero(np.diff(mask.view(np.int8), axis=axis)) for axis in range(mask.ndim))
    return float(sum(number * voxel / size for number, size in zip(faces, spacing)))


class _RegionFinder:
    """Find the regions of one class of a case."""

    def __init__(
        self,
        name: str,
        label: np.ndarray,
        prediction: np.ndarray,
        spacing: Sequence[float],
        others: Mapping[str, set[int]],
        offset: Sequence[int],
    ) -> None:
        self.name, self.label, self.prediction, self.spacing = name, label, prediction, spacing
        self.others, self.offset = others, offset

    def find(self, labelled: np.ndarray, predicted: np.ndarray) -> Iterator[Region]:
        """Yield the regions of the class: structures of one map alone first, then those that both have."""
        labelled, predicted = labelled.copy(), predicted.copy()
        for box, structure in list(_components(labelled)):
            other = self._mostly(self.prediction[box], structure)
            if other is not None:
                yield self._region(SWAPPED, box, structure, f"labelled {self.name}, looks like {other}")
                labelled[box] &= ~structure
            elif _share(structure, predicted[box]) < _SAME_STRUCTURE:
                yield self._region(EXTRA, box, structure, f"labelled {self.name}, looks like background")
                labelled[box] &= ~structure
        for box, structure in list(_components(predicted)):
            if _share(structure, labelled[box]) < _SAME_STRUCTURE:
                if self._mostly(self.label[box], structure) is None:  # else the label of that class tells of it
                    yield self._region(MISSING, box, structure, f"looks like {self.name}, not labelled")
                predicted[box] &= ~structure
        for box, structure in _components(labelled | predicted):
            yield from self._compare_structure(box, labelled[box] & structure, predicted[box] & structure)

    def _compare_structure(self, box: Box, labelled: np.ndarray, predicted: np.ndarray) -> Iterator[Region]:
        """Yield the region of a structure that both have, unless they agree."""
        differing = labelled != predicted
        if not differing.any() or not labelled.any() or not predicted.any():
            return
        distance = distance_mm(labelled, predicted, self.spacing)
        steps = [round(float(step)) for step in _centre(predicted) - _centre(labelled)]
        if (
            any(steps)
            and distance_mm(_move(labelled, steps), _pad(predicted, steps), self.spacing) < _EXPLAINED * distance
        ):
            moved = ", ".join(f"{step * size:+.1f}" for step, size in zip(steps, self.spacing))
            yield self._region(SHIFTED, box, differing, f"the label fits better moved by ({moved}) mm", distance)
            return
        offset = offset_mm(labelled, predicted, self.spacing)
        direction = "small" if offset > 0 else "large"
        yield self._region(
            BOUNDARY,
            box,
            differing,
            f"{distance:.1f} mm apart, the label {abs(offset):.1f} mm too {direction}",
            distance,
        )

    def _region(
        self, kind: str, box: Box, where: np.ndarray, description: str, distance: float | None = None
    ) -> Region:
        centre = [float(one) + side.start for one, side in zip(_centre(where), box)]
        return Region(
            kind,
            self.name,
            distance_mm(where, np.zeros_like(where), self.spacing) if distance is None else distance,
            float(np.count_nonzero(where) * math.prod(self.spacing)),
            tuple(round(one + start) for one, start in zip(centre, self.offset)),
            description,
        )

    def _mostly(self, labels: np.ndarray, structure: np.ndarray) -> str | None:
        """Return the other class that more than half of a structure has there; None if there is no such class."""
        found, counts = np.unique(labels[structure], return_counts=True)
        for name, values in self.others.items():
            if sum(count for one, count in zip(found, counts) if int(one) in values) > structure.sum() / 2:
                return name
        return None


def _components(mask: np.ndarray) -> Iterator[tuple[Box, np.ndarray]]:
    """Yield the connected components of a mask: a box with a margin of one voxel, and the component's mask in it.

    Voxels that share a corner are connected, as everywhere in nnU-Net.
    """
    from scipy import ndimage

    numbers, _ = ndimage.label(mask, structure=np.ones((3,) * mask.ndim))
    for number, box in enumerate(ndimage.find_objects(numbers), start=1):
        wide = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in box)
        yield wide, numbers[wide] == number


def _boxes_of_labels(labels: np.ndarray) -> list[tuple[int, Box]]:
    """Return the labels above 0 that occur, with their boxes."""
    from scipy import ndimage

    boxes = ndimage.find_objects(labels.astype(np.int32))
    return [(label, box) for label, box in enumerate(boxes, start=1) if box is not None]


def _join(boxes: Sequence[Box]) -> Box | None:
    """Return the box around some boxes, with a margin of one voxel where there is room; None without boxes."""
    if not boxes:
        return None
    return tuple(
        slice(max(0, min(s.start for s in sides) - 1), max(s.stop for s in sides) + 1) for sides in zip(*boxes)
    )


def _share(structure: np.ndarray, mask: np.ndarray) -> float:
    return np.count_nonzero(structure & mask) / np.count_nonzero(structure)


def _centre(mask: np.ndarray) -> np.ndarray:
    return np.array([indices.mean() for indices in np.nonzero(mask)])


def _pad(mask: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    """Make room for a movement in both directions."""
    return np.pad(mask, [(abs(step), abs(step)) for step in steps])


def _move(mask: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    return np.roll(_pad(mask, steps), steps, axis=tuple(range(mask.ndim)))
