"""Draw voxels of each class.

Training centres patches on them without searching the segmentation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np

from nnunetv2.errors import InvalidInputError

Region = Sequence[int]
Locations = Mapping["int | tuple[int, ...]", "np.ndarray | list"]

# Voxels looked at together: few enough for the caches, and for short lists to sort.
_SLAB_VOXELS = 2**20


def sample_foreground_locations(
    seg: np.ndarray,
    classes_or_regions: Sequence[int | Region],
    *,
    seed: int = 1234,
    min_num_samples: int = 10000,
    min_percent_coverage: float = 0.01,
) -> Locations:
    """Draw voxels of each class or region without replacement.

    Args:
        seg: Labels `(1, x, y, z)`.
        classes_or_regions: Labels, or collections of labels that count as one class.
        min_num_samples: Voxels to draw from a class, at most all it has.
        min_percent_coverage: The part (not percent) of a class to draw where that is more.

    Returns:
        Label, or tuple of labels -> int64 array `(n, 4)` of voxel indices including the channel axis. An empty list
        for a class that is absent.
    """
    random_state = np.random.RandomState(seed)
    members = {_key(entry): _members(entry) for entry in classes_or_regions}
    voxels = find_voxels(seg, {label for labels in members.values() for label in labels})
    locations: dict[Any, Any] = {}
    for key, labels in members.items():
        candidates = [voxels[label] for label in labels]
        total = sum(map(len, candidates))
        if total == 0:
            locations[key] = []
            continue
        count = max(min(min_num_samples, total), ceil(min_percent_coverage * total))
        # As the legacy generator permutes: other ways to draw give other voxels than release 2.8.1.
        drawn = np.concatenate(candidates)[random_state.choice(total, count, replace=False)]
        locations[key] = np.stack(np.unravel_index(drawn, seg.shape), axis=1)
    return locations


def find_voxels(seg: np.ndarray, labels: Iterable[int]) -> dict[int, np.ndarray]:
    """Return the flat indices (C order) of the voxels of each label.

    Found in one pass over small integers.
    """
    flat = np.ascontiguousarray(seg).reshape(-1)
    index = np.uint32 if flat.size < 2**32 else np.int64
    labels = [int(label) for label in labels]
    if flat.dtype.kind not in "iu" or flat.dtype.itemsize > 2:
        return {label: np.flatnonzero(flat == label).astype(index) for label in labels}
    is_wanted = _table(flat.dtype, labels)
    parts: dict[int, list[np.ndarray]] = {label: [] for label in labels}
    for start in range(0, flat.size, _SLAB_VOXELS):
        slab = flat[start : start + _SLAB_VOXELS]
        found = np.flatnonzero(is_wanted[slab])  # negative labels index from the end, where the table has them
        of_found = slab[found]
        order = np.argsort(of_found, kind="stable")  # a radix sort for integers this small
        ends = np.flatnonzero(np.diff(of_found[order])) + 1
        for group in np.split(order, ends):
            if len(group):
                parts[int(of_found[group[0]])].append((found[group] + start).astype(index))
    return {label: np.concatenate(of_label) if of_label else np.empty(0, index) for label, of_label in parts.items()}


def as_small_integers(seg: np.ndarray) -> np.ndarray:
    """Return labels as int8 or int16, the smaller that holds them.

    Those with fractions, or too large, as they are.

    Raises:
        InvalidInputError: A label is NaN or infinite.
    """
    lowest, highest = np.min(seg), np.max(seg)
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        raise InvalidInputError("the segmentation has voxels that are NaN or infinite; labels must be whole numbers")
    for dtype in (np.int8, np.int16):
        limits = np.iinfo(dtype)
        if limits.min <= lowest and highest <= limits.max:
            small = seg.astype(dtype, copy=False)
            return small if small is seg or np.array_equal(small, seg) else seg
    return seg


def _table(dtype: np.dtype, labels: Iterable[int]) -> np.ndarray:
    limits = np.iinfo(dtype)
    table = np.zeros(2 ** (8 * dtype.itemsize), bool)
    table[[label for label in labels if limits.min <= label <= limits.max]] = True
    return table


def _key(entry: int | Region) -> int | tuple[int, ...]:
    return tuple(int(label) for label in entry) if isinstance(entry, (list, tuple, np.ndarray)) else int(entry)


def _members(entry: int | Region) -> tuple[int, ...]:
    key = _key(entry)
    return key if isinstance(key, tuple) else (key,)
