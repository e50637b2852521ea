"""Cases in memory, in place of preprocessed files."""
from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest


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


@pytest.fixture
def make_dataset():
    """Build a dataset of cases in memory."""

    def build(number=2, **options) -> CasesInMemory:
        return CasesInMemory({f"case_{i}": make_case(seed=i, **options) for i in range(number)})

    return build


@pytest.fixture
def make_labels():
    """Build what a loader asks of a label manager."""

    def build(has_ignore=False) -> SimpleNamespace:
        return SimpleNamespace(all_labels=[np.int64(label) for label in range(3)], has_ignore_label=has_ignore)

    return build
