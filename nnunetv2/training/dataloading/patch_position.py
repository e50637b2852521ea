"""Choose the position of a patch in an image.

All boxes are half-open and may reach beyond the image.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

ClassLocations = Mapping[Any, Sequence[Sequence[int]]]
"""Per label (region, ...) some of its voxels `[channel, *spatial]`. Labels that do not occur have none."""


def corner_range(
    shape: Sequence[int], patch_size: Sequence[int], need_to_pad: Sequence[int] | np.ndarray
) -> tuple[list[int], list[int]]:
    """Return the smallest and largest lower corner of a patch, inclusive.

    The image is thought of as padded by `need_to_pad` voxels per axis in total, or by more if the patch needs it; half
    of the padding, rounded up, may come before the image, and as much after it.
    """
    smallest, largest = [], []
    for length, patch, pad in zip(shape, patch_size, need_to_pad):
        pad = max(int(pad), patch - length)
        smallest.append(-((pad + 1) // 2))
        largest.append(length + (pad + 1) // 2 - patch)
    return smallest, largest


def draw_corner(smallest: Sequence[int], largest: Sequence[int]) -> list[int]:
    """Draw a lower corner uniformly, from numpy's global generator."""
    return [int(np.random.randint(low, high + 1)) for low, high in zip(smallest, largest)]


def draw_class(
    class_locations: ClassLocations, annotated_key: Hashable, overwrite_class: Hashable | None = None
) -> Hashable | None:
    """Draw a class that occurs, each with the same chance; None if none does.

    Args:
        annotated_key: The class of all annotated voxels. It is drawn only if it is the only one.
        overwrite_class: Taken instead of a random one if it occurs.

    Raises:
        KeyError: `overwrite_class` is no key of `class_locations`.
    """
    if overwrite_class is not None and len(class_locations[overwrite_class]) > 0:
        return overwrite_class
    occurring = [key for key, voxels in class_locations.items() if len(voxels) > 0]
    if len(occurring) > 1:
        occurring = [key for key in occurring if key != annotated_key]
    return occurring[np.random.choice(len(occurring))] if occurring else None


def draw_voxel(voxels: Sequence[Sequence[int]]) -> list[int]:
    """Draw one of the voxels `[channel, *spatial]`; return its spatial coordinates."""
    return [int(coordinate) for coordinate in voxels[np.random.choice(len(voxels))][1:]]


def corner_around(
    voxel: Sequence[int], patch_size: Sequence[int], smallest: Sequence[int], largest: Sequence[int] | None = None
) -> list[int]:
    """Return the corner of the patch centred on a voxel.

    Below the smallest corner it is moved up to it.

    Without `largest` the patch may reach any distance beyond the far end of the image, which is how nnU-Net has always
    drawn its foreground patches; with it, it is moved down to the largest corner.
    """
    corner = [max(low, center - size // 2) for low, center, size in zip(smallest, voxel, patch_size)]
    return corner if largest is None else [min(value, high) for value, high in zip(corner, largest)]
