"""Place tiles on an image and weigh their voxels, in NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from math import ceil
from typing import Any

import numpy as np

Slicer = tuple[slice | int, ...]
"""Selects a tile of an image `(c, *spatial)`; an integer picks one slice of a volume."""


def compute_steps_for_sliding_window(
    image_size: Sequence[int], tile_size: Sequence[int], tile_step_size: float
) -> list[list[int]]:
    """Return the starts of tiles along each axis, evenly spread.

    They reach from the first voxel to the last.

    Neighbouring tiles start at most `tile_step_size * tile_size` voxels apart: an image of 110 and tiles of 64 voxels
    with step 0.5 give [0, 23, 46].

    Raises:
        ValueError: The image is smaller than a tile.
        AssertionError: The step is not above 0 and at most 1.
    """
    assert 0 < tile_step_size <= 1, f"tile_step_size must be above 0 and at most 1, got {tile_step_size}"
    if any(image < tile for image, tile in zip(image_size, tile_size)):
        raise ValueError(f"an image of {tuple(image_size)} voxels is smaller than a tile of {tuple(tile_size)}; pad it")
    return [_starts(image, tile, tile_step_size) for image, tile in zip(image_size, tile_size)]


def _starts(image: int, tile: int, tile_step_size: float) -> list[int]:
    room = image - tile
    count = ceil(room / (tile * tile_step_size)) + 1
    distance = room / (count - 1) if count > 1 else 0
    return [int(np.round(distance * i)) for i in range(count)]


def compute_tile_slicers(image_size: Sequence[int], tile_size: Sequence[int], tile_step_size: float) -> list[Slicer]:
    """Return the slicers of all tiles, last axis fastest.

    Tiles of two axes cover a volume slice by slice.

    Raises:
        AssertionError: The tile has neither as many axes as the image nor one fewer.
    """
    missing = len(image_size) - len(tile_size)
    assert missing in (0, 1), f"tiles of size {tuple(tile_size)} do not fit an image of size {tuple(image_size)}"
    steps = compute_steps_for_sliding_window(image_size[missing:], tile_size, tile_step_size)
    slices: list[Any] = [[slice(start, start + size) for start in starts] for starts, size in zip(steps, tile_size)]
    planes = [range(image_size[0])] if missing else []
    return [(slice(None), *tile) for tile in product(*planes, *slices)]


def gaussian_bump(tile_size: Sequence[int], sigma_scale: float = 1.0 / 8, largest: float = 1) -> np.ndarray:
    """Return a Gaussian over a tile, float64; it may be 0 at the rim.

    Args:
        sigma_scale: Standard deviation as a fraction of the tile's side.
        largest: The value in the middle.
    """
    from scipy.ndimage import gaussian_filter

    peak = np.zeros(tile_size)
    peak[tuple(side // 2 for side in tile_size)] = 1
    bump = gaussian_filter(peak, [side * sigma_scale for side in tile_size], 0, mode="constant", cval=0)
    return bump / (bump.max() / largest)


def mirror_combinations(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """Return all subsets of axes, smallest first.

    For axes (0, 1): (), (0,), (1,), (0, 1).
    """
    return [subset for size in range(len(axes) + 1) for subset in combinations(axes, size)]


def extent(index: slice | int, length: int) -> tuple[int, int]:
    """Return the half-open range that an index selects of an axis."""
    if isinstance(index, slice):
        first, last, _ = index.indices(length)
        return first, last
    return int(index), int(index) + 1


def shifted(place: Slicer, first: int) -> Slicer:
    """Return the place of a tile within sums that begin at plane `first`."""
    along, *across = place
    along = slice(along.start - first, along.stop - first) if isinstance(along, slice) else along - first
    return (along, *across)
