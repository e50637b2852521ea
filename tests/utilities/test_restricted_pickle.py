"""Pickles are data here, never programs."""

import contextlib
import os
import pickle
import tracemalloc
from _codecs import encode
from collections import OrderedDict

import numpy as np
import pytest

from nnunetv2.utilities.restricted_pickle import load_pickle_safely, save_pickle

RECONSTRUCT, SCALAR = np.zeros(1).__reduce__()[0], np.float64(1).__reduce__()[0]


class Exploit:
    def __reduce__(self):
        return os.system, ("touch exploited",)


PROPERTIES = {
    "spacing": [np.float64(3.3), 2.0],
    "shape": (1, 2, 3),
    "class_locations": {1: np.arange(12).reshape(3, 4), (1, 2): [], 2: np.zeros((0, 4), np.int64)},
    "text": "é",
    "bytes": b"x",
    "no bytes": b"",
    "bytearray": bytearray(b"xy"),
    "many": {*range(5000)},
    "frozen": frozenset([1]),
    "slice": slice(1, None),
    "time": np.array(["2020-01-02"], "M8[D]"),
    "structured": np.array([(1, 2.0)], "i4,f4"),
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


class Call:
    """Ask for a call when it is unpickled, and for what `__setstate__` is to get."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments, *([] if state is None else [state]))

    def __reduce__(self):
        return self.call


MUCH = 10**10
EMPTY_ARRAY = (np.ndarray, (0,), b"b")
HELD = b"x" * 30_000


def dtype_of(itemsize: int) -> Call:
    return Call(np.dtype, f"V{itemsize}", False, True)


@pytest.mark.parametrize(
    ("payload", "complaint"),
    [
        (Call(set, range(MUCH)), "refers to builtins.range"),
        (Call(list, [0]), "refers to builtins.list"),
        (Call(str, [0]), "refers to builtins.str"),
        (Call(bytes, MUCH), "takes 1 positional argument"),
        (Call(bytearray, MUCH), "makes bytes of a int"),
        (Call(set, "ab"), "makes a container of a str"),
        ([Call(bytearray, HELD) for _ in range(1000)], "far more memory"),
        (Call(encode, "a", "utf-32"), "encodes text as utf-32"),
        (Call(np.ndarray, (MUCH,), "f8"), "calls <class 'numpy.ndarray'>"),
        (Call(RECONSTRUCT, np.ndarray, (MUCH,), b"b"), "array of shape .* without values"),
        (Call(RECONSTRUCT, *EMPTY_ARRAY, state=(1, (MUCH,), np.dtype(object), False, [])), "without its values"),
        (Call(RECONSTRUCT, *EMPTY_ARRAY, state=(1, (MUCH,), dtype_of(0), False, b"")), "far more memory"),
        (Call(SCALAR, dtype_of(2**30)), "missing 1 required positional argument"),
        (Call(np.dtype, "f8," * 1000), "a dtype without a code"),
    ],
)
def test_a_few_bytes_do_not_ask_for_much_memory(tmp_path, payload, complaint):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(payload))
    with pytest.raises(pickle.UnpicklingError, match=rf"a\.pkl: .*{complaint}"):
        load_pickle_safely(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02]r\xff\xff\xff\xff.",
        *(b"\x80\x05" + code + MUCH.to_bytes(8, "little") for code in (b"\x8d", b"\x8e", b"\x96")),
    ],
    ids=["reference", "text", "bytes", "bytearray"],
)
def test_no_opcode_asks_for_much_memory(tmp_path, content):
    (tmp_path / "a.pkl").write_bytes(content)
    tracemalloc.start()
    try:
        with contextlib.suppress(pickle.UnpicklingError):
            load_pickle_safely(tmp_path / "a.pkl")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_an_admitted_function_is_named_but_not_called_and_not_changed(tmp_path):
    admitted = {("builtins", "eval"): max}
    for payload in (Call(eval, [1]), Call(set, [], state={"a": 1})):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(payload))
        with pytest.raises(pickle.UnpicklingError, match="it calls|it changes"):
            load_pickle_safely(tmp_path / "a.pkl", admitted)


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
