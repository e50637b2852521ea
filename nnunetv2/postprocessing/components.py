"""Find and remove voxels outside the largest connected component of a class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LabelOrRegion = int | Sequence[int]

# Voxels that share a corner are neighbours, as they are where nnU-Net counts components.
_FULL_CONNECTIVITY = {2: 8, 3: 26}


def remove_all_but_largest_component_from_segmentation(
    segmentation: np.ndarray, labels_or_regions: LabelOrRegion | list[LabelOrRegion], background_label: int = 0
) -> np.ndarray:
    """Keep the largest connected component of some labels, taken together.

    Returns the changed label map.

    Voxels that share a corner are connected. Components that tie for the largest all stay.

    Args:
        segmentation: Label map; not changed.
        labels_or_regions: A label, a tuple of labels, or a list of both. Their union is one mask.
        background_label: The label that removed voxels get.
    """
    entries = labels_or_regions if isinstance(labels_or_regions, list) else [labels_or_regions]
    labels = [label for entry in entries for label in ([entry] if np.ndim(entry) == 0 else entry)]
    mask = np.isin(segmentation, np.array(labels, dtype=np.int64))
    result = np.copy(segmentation)
    result[find_smaller_components(mask.view(np.uint8))] = background_label
    return result


# The name that postprocessing.pkl holds, which the release looks up.
remove_all_but_largest_component_from_segmentation.__module__ = "nnunetv2.postprocessing.remove_connected_components"


def find_smaller_components(groups: np.ndarray) -> np.ndarray:
    """Find the voxels outside the largest connected component of their group.

    Args:
        groups: Whole numbers, 2D or 3D besides axes of length 1. 0 belongs to no group. All groups are handled at once.

    Returns:
        Booleans of the same shape. Of components that tie for the largest none is marked.

    Raises:
        ValueError: There are more than three axes longer than 1.
    """
    smaller = np.zeros(groups.shape, dtype=bool)
    box = bounding_box(groups)
    if box is not None:
        smaller[box] = _mark_smaller(groups[box])
    return smaller


def bounding_box(array: np.ndarray) -> tuple[slice, ...] | None:
    """Return the smallest box around all values other than 0.

    None if there are none.
    """
    if not array.any():
        return None
    ranges = []
    for axis in range(array.ndim):
        occupied = np.flatnonzero(array.any(axis=tuple(other for other in range(array.ndim) if other != axis)))
        ranges.append(slice(int(occupied[0]), int(occupied[-1]) + 1))
    return tuple(ranges)


def _mark_smaller(groups: np.ndarray) -> np.ndarray:
    components, count = _label_components(groups)
    inside = groups > 0
    numbers, group_of_voxel = components[inside], groups[inside]
    sizes = np.bincount(numbers, minlength=count + 1)
    group_of = np.zeros(count + 1, dtype=np.intp)
    group_of[numbers] = group_of_voxel
    largest = np.zeros(int(group_of.max()) + 1, dtype=sizes.dtype)
    np.maximum.at(largest, group_of[1:], sizes[1:])
    is_smaller = sizes < largest[group_of]
    is_smaller[0] = False  # voxels of no group
    return is_smaller[components]


def _label_components(groups: np.ndarray) -> tuple[np.ndarray, int]:
    """Number the connected components of equal values, from 1 on; 0 stays 0. Return them and how many there are."""
    import cc3d

    squeezed = np.ascontiguousarray(np.squeeze(groups))
    if squeezed.ndim < 2:
        squeezed = squeezed.reshape(1, -1)
    if squeezed.ndim not in _FULL_CONNECTIVITY:
        raise ValueError(f"components are found in 2D and 3D label maps, not in one of shape {groups.shape}")
    components, count = cc3d.connected_components(
        squeezed, connectivity=_FULL_CONNECTIVITY[squeezed.ndim], return_N=True
    )
    return components.reshape(groups.shape), count
