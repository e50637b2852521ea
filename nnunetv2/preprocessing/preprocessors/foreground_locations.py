"""Draw voxels of each class, so that training can centre patches on them without searching the segmentation."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil

import numpy as np

Region = Sequence[int]
Locations = Mapping["int | tuple[int, ...]", "np.ndarray | list"]


def sample_foreground_locations(seg: np.ndarray, classes_or_regions: Sequence[int | Region], *, seed: int = 1234,
                                min_num_samples: int = 10000, min_percent_coverage: float = 0.01) -> Locations:
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
    flat = np.ascontiguousarray(seg).reshape(-1)
    locations = {}
    for entry in classes_or_regions:
        is_region = isinstance(entry, (list, tuple, np.ndarray))
        key = tuple(int(label) for label in entry) if is_region else int(entry)
        # Few classes share labels, so nothing is gained by keeping these.
        candidates = np.concatenate([np.flatnonzero(flat == label) for label in (key if is_region else (key,))])
        total = len(candidates)
        if total == 0:
            locations[key] = []
            continue
        count = max(min(min_num_samples, total), ceil(min_percent_coverage * total))
        drawn = candidates[random_state.choice(total, count, replace=False)]
        locations[key] = np.stack(np.unravel_index(drawn, seg.shape), axis=1)
    return locations
