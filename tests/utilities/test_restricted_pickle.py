"""Pickles are data here, never programs."""

import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest

from nnunetv2.utilities.restricted_pickle import load_pickle_safely, save_pickle


class Exploit:
    def __reduce__(self):
        return os.system, ("touch exploited",)


PROPERTIES = {
    "spacing": [np.float64(3.3), 2.0],
    "shape": (1, 2, 3),
    "class_locations": {1: np.arange(12).reshape(3, 4), (1, 2): [], 2: np.zeros((0, 4), np.int64)},
    "text": "é",
    "bytes": b"x",
    "flag": np.bool_(True),
    "none": None,
    "set": {1},
    "ordered": OrderedDict(a=1),
    "affine": np.asfortranarray(np.eye(4, dtype=np.float32)),
    "names": np.array(["a", "bc"]),
    "objects": np.array([{"a": 1}, None], dtype=object),
    "complex": 1j,
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_properties_of_cases_are_read(tmp_path, protocol):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(PROPERTIES, protocol=protocol))
    np.testing.assert_equal(load_pickle_safely(tmp_path / "a.pkl"), PROPERTIES)


def test_names_of_numpy_1_are_read(tmp_path):
    stream = pickle.dumps(PROPERTIES, protocol=2).replace(b"cnumpy._core.", b"cnumpy.core.")
    (tmp_path / "a.pkl").write_bytes(stream)
    np.testing.assert_equal(load_pickle_safely(tmp_path / "a.pkl"), PROPERTIES)


@pytest.mark.parametrize(
    "payload",
    [
        Exploit(),
        [Exploit()],
        {"a": np.array([Exploit()], dtype=object)},
        os.system,
        eval,
        getattr,
        np.load,
        pickle.loads,
    ],
)
def test_everything_else_is_refused(tmp_path, payload, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(payload))
    with pytest.raises(pickle.UnpicklingError, match=r"a\.pkl.*refers to"):
        load_pickle_safely(tmp_path / "a.pkl")
    assert not (tmp_path / "exploited").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps(PROPERTIES)[:-20]])
def test_damaged_files_are_named(tmp_path, content):
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(pickle.UnpicklingError, match=r"a\.pkl"):
        load_pickle_safely(tmp_path / "a.pkl")


def test_round_trip(tmp_path):
    save_pickle(PROPERTIES, tmp_path / "a.pkl")
    np.testing.assert_equal(load_pickle_safely(str(tmp_path / "a.pkl")), PROPERTIES)


def test_what_nobody_could_read_is_not_written(tmp_path):
    path = tmp_path / "case.pkl"
    save_pickle({"spacing": [1.0]}, path)
    with pytest.raises(ValueError, match="case.pkl is not written: it refers to pathlib.* as text or numbers"):
        save_pickle({"spacing": [1.0], "source": tmp_path}, path)
    assert load_pickle_safely(path) == {"spacing": [1.0]}
