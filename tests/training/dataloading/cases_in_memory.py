"""Cases in memory, in place of preprocessed files."""

from __future__ import annotations

import numpy as np


class CasesInMemory:
    """Stands in for a dataset; counts the voxels that are read."""

    source_folder = "memory"

    def __init__(self, cases: dict[str, tuple]):
        self.cases = cases
        self.identifiers = sorted(cases)
        self.voxels_read = 0

    def load_case(self, identifier):
        data, seg, seg_prev, properties = self.cases[identifier]
        return CountingArray(data, self), seg, seg_prev, properties


class CountingArray:
    def __init__(self, array, counter):
        self.array, self.counter, self.shape = array, counter, array.shape

    def __getitem__(self, index):
        part = self.array[index]
        self.counter.voxels_read += part.size
        return part


def make_case(shape=(12, 14, 16), channels=1, with_previous=False, seed=0) -> tuple:
    """Return an image, labels 0 to 2 (-1 in the first slice), those of a previous stage, and properties."""
    rng = np.random.default_rng(seed)
    data = rng.normal(size=(channels, *shape)).astype(np.float32)
    seg = np.zeros((1, *shape), np.int8)
    seg[0, :, 3:9, 4:12] = 1
    seg[0, 2:-2, 5:7, 6:9] = 2
    seg[0, 0] = -1
    locations = {label: np.argwhere(seg == label) for label in (1, 2)}
    return data, seg, seg[0].copy() if with_previous else None, {"class_locations": locations}
