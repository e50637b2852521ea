"""Properties are read once per process, as long as there is room for them."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest

from nnunetv2.preprocessed_data.properties_cache import PropertiesCache
from nnunetv2.utilities.restricted_pickle import load_pickle_safely, save_pickle


class CountingReader:
    def __init__(self):
        self.paths = []

    def __call__(self, path):
        self.paths.append(path.name)
        return load_pickle_safely(path)


@pytest.fixture
def write(tmp_path):
    def write(name, voxels=10):
        path = tmp_path / f"{name}.pkl"
        save_pickle({"spacing": [1.0], "class_locations": {1: np.full((voxels, 4), 3), (1, 2): []}}, str(path))
        return path

    return write


def test_a_file_is_read_once(write):
    reader = CountingReader()
    cache, path = PropertiesCache(read=reader), write("a")
    for _ in range(3):
        properties = cache.load(path)
        assert properties["class_locations"][1].tolist() == [[3] * 4] * 10
        assert properties["class_locations"][1].dtype == np.int32
        properties["class_locations"].clear()  # one's own copy
    assert reader.paths == ["a.pkl"]


def test_a_file_that_has_changed_is_read_again(write):
    cache, path = PropertiesCache(), write("a")
    cache.load(path)
    write("a", voxels=20)
    os.utime(path, ns=(1, 1))
    assert len(cache.load(path)["class_locations"][1]) == 20


def test_the_case_that_was_not_asked_for_longest_goes_first(write):
    reader = CountingReader()
    cache = PropertiesCache(max_bytes=40_000, read=reader)
    paths = [write(name, voxels=1000) for name in "abc"]  # 16 kB each
    for index in (0, 1, 0, 2, 0, 1):
        cache.load(paths[index])
    assert reader.paths == ["a.pkl", "b.pkl", "c.pkl", "b.pkl"]
    assert cache._bytes <= 40_000


def test_a_case_larger_than_the_cache_is_loaded_all_the_same(write):
    cache = PropertiesCache(max_bytes=10)
    assert len(cache.load(write("a", voxels=1000))["class_locations"][1]) == 1000


def test_a_cache_travels_empty_to_other_processes(write):
    cache = PropertiesCache(read=load_pickle_safely)
    cache.load(write("a"))
    assert pickle.loads(pickle.dumps(cache))._bytes == 0
