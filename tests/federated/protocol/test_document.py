"""Documents survive the round trip, are proper safetensors files, and bad ones never get in."""

from __future__ import annotations

import hashlib
import io
import json
import math
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from nnunetv2.federated.errors import RefusedError, WireError
from nnunetv2.federated.protocol.api import FederationSettings, JoinRequest, Receipt, RunState
from nnunetv2.federated.protocol.document import (
    DTYPES,
    Limits,
    OutgoingDocument,
    TensorSpec,
    check_tensors,
    document_size,
    file_digest,
    open_document,
    write_document,
    write_subset,
)
from nnunetv2.federated.protocol.keys import InitialKey, PlansKey, RegistrationKey, RoundKey, run_name
from nnunetv2.federated.protocol.messages import (
    Aggregate,
    Census,
    CoarseSummary,
    FineSummary,
    Match,
    PlansAgreement,
    PlansReport,
    PooledCensus,
    PooledFingerprint,
    Registration,
    Update,
    WantedBins,
)
from nnunetv2.federated.protocol.strict_json import canonical_json, decode_json, encode_json, json_digest

TENSORS = {
    "encoder.stages.0.0.convs.0.conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "half": np.float16([1.5, -2, 65504]),
    "coarse.0": np.int64([0, 2**62, -5]),
    "scalar": np.float32(3.5),
    "empty": np.zeros((0, 4), np.float32),
}
MATCH = Match(
    rule="name",
    weighting="cases",
    weights={"A": 3, "B": 1},
    shared={"w": {"A": "w", "B": "v"}},
    initial_owner={"w": "B"},
    coverage={"A": (4, 5), "B": (4, 4)},
)
MESSAGES = [
    Census(num_cases=3, channel_names={"0": "CT"}, labels={"background": 0, "whole": [1, 2]}, regions_class_order=[1]),
    PooledCensus(num_cases=10),
    CoarseSummary(
        spacings=[(1, 2.5, 1)],
        shapes=[(6, 8, 10)],
        relative_sizes=[0.5],
        promotes_to_float64=False,
        moments=[{"count": 2, "mean": 1.5, "m2": 0.5}],
        extrema=[(1, 2)],
    ),
    WantedBins(bins=[[1, 2], []]),
    FineSummary(bins=[[1, 2]]),
    PooledFingerprint(num_cases=2, fingerprint={"spacings": [[1.0, 2.0, 3.0]]}),
    PlansReport(plans={"plans_name": "nnUNetPlans", "n": [1, None, True, {"a": 0.1}]}),
    PlansAgreement(digest="0" * 64),
    Registration(
        configuration="3d_fullres",
        fold="0",
        trainer="nnUNetTrainer",
        num_training_cases=4,
        plans={},
        dataset_json={"channel_names": {"0": "CT"}, "labels": {"background": 0}, "file_ending": ".nii.gz"},
        mirroring_axes=(0, 1, 2),
        requires_equal_plans=True,
        tensors=[{"name": "w", "dtype": "F32", "shape": [2, 3]}],
        aliases={"all_modules.0": "w"},
    ),
    MATCH,
    Update(metrics={"val_loss": -0.5, "dice_per_class": [0.5, None]}),
    Aggregate(round=0, contributors={"A": 3}, missing=["B"]),
]


def write(path, tensors, message=MESSAGES[-2]):
    """Write a document with `tensors`, and return its digest."""
    tensors = {name: np.asarray(values) for name, values in tensors.items()}
    return write_document(
        path, message, {name: TensorSpec.of(values) for name, values in tensors.items()}, tensors.values()
    )


def write_raw(path, header, data=b""):
    """Write a file with any header: a value to be dumped, or bytes."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def make_header(message='{"protocol":1,"kind":"update"}', **entries):
    return {"__metadata__": {"message": message}, **entries}


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# ------------------------------------------------------------------------------------------------------- round trip
@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.kind)
def test_every_message_comes_back_as_it_was(tmp_path, message):
    write(tmp_path / "d", {}, message)
    assert open_document(tmp_path / "d").message == message


def test_tensors_come_back_as_they_were(tmp_path):
    digest = write(tmp_path / "d", TENSORS)
    assert digest == hashlib.sha256((tmp_path / "d").read_bytes()).hexdigest() == file_digest(tmp_path / "d")
    with open_document(tmp_path / "d") as document:
        assert list(document.specs) == list(TENSORS)
        for name, values in TENSORS.items():
            assert document.read(name).dtype == values.dtype
            np.testing.assert_array_equal(document.read(name), values)
    check_tensors(open_document(tmp_path / "d"), document.specs)


def test_the_safetensors_library_reads_our_documents(tmp_path):
    write(tmp_path / "d", TENSORS)
    loaded = safetensors.numpy.load_file(tmp_path / "d")
    assert loaded.keys() == TENSORS.keys()
    for name, values in TENSORS.items():
        np.testing.assert_array_equal(loaded[name], values)
    with safetensors.safe_open(tmp_path / "d", "numpy") as file:
        assert json.loads(file.metadata()["message"])["kind"] == "update"


def test_we_read_documents_of_the_safetensors_library(tmp_path):
    tensors = {name: np.atleast_1d(values) for name, values in TENSORS.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "d", {"message": MESSAGES[1].model_dump_json()})
    document = open_document(tmp_path / "d")
    assert document.message == MESSAGES[1]
    for name, values in tensors.items():
        np.testing.assert_array_equal(document.read(name), values)


def test_arrays_outlive_their_document_and_the_file(tmp_path):
    write(tmp_path / "d", TENSORS)
    with open_document(tmp_path / "d") as document:
        values = document.read("half")
    (tmp_path / "d").unlink()
    assert values.tolist() == [1.5, -2, 65504]
    assert not values.flags.writeable
    with pytest.raises(ValueError, match="closed"):
        document.read("half")


def test_a_document_stays_itself_when_its_file_is_replaced(tmp_path):
    write(tmp_path / "d", {"w": np.zeros(3, np.float32)})
    document = open_document(tmp_path / "d")
    write(tmp_path / "d", {})
    assert document.read("w").tolist() == [0, 0, 0]


def test_subset_copies_some_tensors_and_the_message(tmp_path):
    write(tmp_path / "d", TENSORS)
    digest = write_subset(open_document(tmp_path / "d"), tmp_path / "s", ["coarse.0", "half"])
    subset = open_document(tmp_path / "s")
    assert digest == file_digest(tmp_path / "s") == write(tmp_path / "t", {n: TENSORS[n] for n in ("half", "coarse.0")})
    assert subset.message == open_document(tmp_path / "d").message
    np.testing.assert_array_equal(subset.read("coarse.0"), TENSORS["coarse.0"])


def test_subset_of_an_unknown_tensor_is_refused(tmp_path):
    write(tmp_path / "d", TENSORS)
    with pytest.raises(WireError, match="no tensor 'x'"):
        write_subset(open_document(tmp_path / "d"), tmp_path / "s", ["x"])


def test_size_is_known_before_writing(tmp_path):
    write(tmp_path / "d", TENSORS)
    document = open_document(tmp_path / "d")
    assert document_size(document.message, document.specs) == (tmp_path / "d").stat().st_size


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    specs=st.dictionaries(
        st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.#-]{0,20}", fullmatch=True),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=4)),
        max_size=5,
    )
)
def test_any_set_of_tensors_survives(tmp_path, specs):
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.integers(-99, 99, shape).astype(DTYPES[dtype])
        for name, (dtype, shape) in specs.items()
        if name != "__metadata__"
    }
    write(tmp_path / "d", tensors)
    document = open_document(tmp_path / "d")
    assert document.specs == {name: TensorSpec.of(values) for name, values in tensors.items()}
    for name, values in tensors.items():
        assert document.read(name).tobytes() == values.tobytes()


def test_writing_and_reading_hold_one_tensor_at_a_time(tmp_path):
    specs = {f"w{index}": TensorSpec("F32", (250_000,)) for index in range(12)}
    tracemalloc.start()
    write_document(tmp_path / "d", MESSAGES[1], specs, (np.full(250_000, index, np.float32) for index in range(12)))
    document = open_document(tmp_path / "d")
    assert sum(float(document.read(name)[0]) for name in specs) == 66
    write_subset(document, tmp_path / "s", specs)
    check_tensors(document, specs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6  # 12 MB travel


# ---------------------------------------------------------------------------------------------------------- writing
@pytest.mark.parametrize(
    ("specs", "tensors", "message"),
    [
        ({"w": TensorSpec("F32", (2,))}, [], "w is announced but not there"),
        ({}, [np.zeros(2, np.float32)], "more tensors than announced"),
        ({"w": TensorSpec("F32", (2,))}, [np.zeros(3, np.float32)], r"w is F32\[3\], expected F32\[2\]"),
        ({"w": TensorSpec("F32", (2,))}, [np.zeros(2, np.float16)], r"w is F16\[2\], expected F32\[2\]"),
        ({"w": TensorSpec("F32", (2,))}, [np.zeros(2, np.float64)], "float64 does not travel"),
        ({"../w": TensorSpec("F32", (2,))}, [np.zeros(2, np.float32)], "is no name for a tensor"),
        ({"__metadata__": TensorSpec("F32", (2,))}, [np.zeros(2, np.float32)], "is no name for a tensor"),
        ({"w" * 300: TensorSpec("F32", (2,))}, [np.zeros(2, np.float32)], "is no name for a tensor"),
    ],
)
def test_the_writer_checks_what_it_is_given_and_leaves_nothing_behind(tmp_path, specs, tensors, message):
    with pytest.raises(WireError, match=message):
        write_document(tmp_path / "d", MESSAGES[1], specs, tensors)
    assert list(tmp_path.iterdir()) == []


def test_what_is_sent_from_memory_is_what_would_have_been_written(tmp_path):
    tensors = {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "none": np.zeros((0, 3), np.float32),
        "v": np.asfortranarray(np.arange(8, dtype=np.int64).reshape(2, 4)),
    }
    digest, content = write(tmp_path / "d", tensors), (tmp_path / "d").read_bytes()
    specs = {name: TensorSpec.of(values) for name, values in tensors.items()}
    document = OutgoingDocument(MESSAGES[-2], specs, tensors)
    assert (document.digest, document.size) == (digest, len(content))
    for begin in (0, 5, len(content) - 70, len(content) - 1, len(content)):
        document.seek(begin)
        assert b"".join(iter(lambda: document.read(7), b"")) == content[begin:]
    assert document.seek(-3, io.SEEK_END) == len(content) - 3 and document.read() == content[-3:]


def test_arrays_in_any_order_in_memory_are_written_in_c_order(tmp_path):
    values = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    write(tmp_path / "d", {"w": values, "v": values.astype(">f4").astype(np.float32)[:, ::2]})
    np.testing.assert_array_equal(open_document(tmp_path / "d").read("w"), values)
    np.testing.assert_array_equal(open_document(tmp_path / "d").read("v"), values[:, ::2])


# ------------------------------------------------------------------------------------------------- malformed headers
@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"", b"", "not proper JSON"),
        (b"[]", b"", "not a JSON object"),
        (b'{"a": NaN}', b"", "not proper JSON"),
        (b'{"a": 1e999}', b"", "too large"),
        (b'{"a": 1, "a": 2}', b"", "repeated"),
        (b"[" * 100_000, b"", "not proper JSON"),
        (b"\xff\xfe", b"", "not proper JSON"),
        ({}, b"", "one text named message"),
        ({"__metadata__": {"message": "{}", "more": ""}}, b"", "one text named message"),
        (make_header(message="no"), b"", "message is not proper JSON"),
        (make_header(message='{"kind":"update"}'), b"", "protocol None"),
        (make_header(message='{"protocol":2,"kind":"update"}'), b"", "speaks 1"),
        (make_header(message='{"protocol":1,"kind":"pickle"}'), b"", "not valid"),
        (make_header(message='{"protocol":1,"kind":"update","more":1}'), b"", "not valid: update.more"),
        (make_header(message='{"protocol":1,"kind":"update","metrics":{"\\ud800":1}}'), b"", "not valid"),
        (make_header(message='{"protocol":1,"kind":"update","metrics":{"\ud800":1}}'), b"", "not proper JSON"),
        (make_header(w=1), b"", "expected dtype"),
        (make_header(w={**entry(), "more": 1}), b"\0" * 8, "expected dtype"),
        (make_header(w=entry(dtype="F64", offsets=(0, 16))), b"\0" * 16, "tensor w: dtype 'F64' does not travel"),
        (make_header(w=entry(shape=(-2,))), b"\0" * 8, "malformed"),
        (make_header(w=entry(shape=(True, 2))), b"\0" * 8, "malformed"),
        (make_header(w=entry(shape=(2.0,))), b"\0" * 8, "malformed"),
        (make_header(w=entry(shape=(1,) * 9)), b"\0" * 8, "malformed"),
        (make_header(w=entry(shape=(2**50,))), b"\0" * 8, "not allowed"),
        (make_header(w=entry(shape=(3,))), b"\0" * 8, "needs 12 bytes"),
        (make_header(w=entry(offsets=(0, 8, 16))), b"\0" * 16, "malformed"),
        (make_header(w=entry(offsets=(8, 0))), b"\0" * 8, "needs 8 bytes"),
        (make_header(w=entry(offsets=(4, 12))), b"\0" * 12, "begins at byte 4"),
        (make_header(w=entry(), v=entry(offsets=(4, 12))), b"\0" * 12, "begins at byte 4"),
        (make_header(w=entry(), v=entry()), b"\0" * 8, "begins at byte 0"),
        (make_header(w=entry()), b"\0" * 7, "need 8 bytes, the document holds 7"),
        (make_header(w=entry()), b"\0" * 9, "need 8 bytes, the document holds 9"),
        ({**make_header(), "a/../b": entry()}, b"\0" * 8, "is no name for a tensor"),
        ({**make_header(), "": entry()}, b"\0" * 8, "is no name for a tensor"),
        ({**make_header(), "w\n": entry()}, b"\0" * 8, "is no name for a tensor"),
    ],
)
def test_malformed_documents_are_refused(tmp_path, header, data, message):
    with pytest.raises(WireError, match=message):
        open_document(write_raw(tmp_path / "d", header, data))


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 8, b"\x10" + b"\0" * 7 + b"{}"])
def test_cut_off_files_are_refused(tmp_path, content):
    (tmp_path / "d").write_bytes(content)
    with pytest.raises(WireError):
        open_document(tmp_path / "d")


def test_limits_hold(tmp_path):
    write(tmp_path / "d", TENSORS)
    for limits, message in (
        (Limits(file_bytes=100), "at most 100"),
        (Limits(header_bytes=16), "at most 16"),
        (Limits(tensors=4), "at most 4"),
    ):
        with pytest.raises(WireError, match=message):
            open_document(tmp_path / "d", limits=limits)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=4), st.integers(0, 3)), min_size=1, max_size=4
    )
)
def test_bytes_changed_at_random_give_a_document_or_a_wire_error(tmp_path, edits):
    if not (tmp_path / "good").exists():
        write(tmp_path / "good", TENSORS, MATCH)
    content = bytearray((tmp_path / "good").read_bytes())
    for place, replacement, removed in edits:
        begin = int(place * len(content))
        content[begin : begin + removed] = replacement
    (tmp_path / "d").write_bytes(content)
    try:
        document = open_document(tmp_path / "d")
    except WireError:
        return
    for name, spec in document.specs.items():
        assert document.read(name).shape == spec.shape


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["F32", "I64"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "message", "__metadata__", "w", "protocol", "kind"]),
            inner,
        )
    ),
    max_leaves=10,
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.dictionaries(st.sampled_from(["w", "v", "__metadata__", "x y"]), JSON_VALUES),
    message=JSON_VALUES,
    keeps_message=st.booleans(),
)
def test_invented_headers_give_a_document_or_a_wire_error(tmp_path, header, message, keeps_message):
    if keeps_message:
        header["__metadata__"] = {"message": json.dumps(message)}
    write_raw(tmp_path / "d", header, b"\0" * 8)
    with pytest.raises(WireError):
        open_document(tmp_path / "d")


# --------------------------------------------------------------------------------------------------- checked tensors
@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": np.zeros(2, np.float32)}, "tensor b is missing"),
        (
            {"a": np.zeros(2, np.float32), "b": np.zeros(1, np.float32), "c": np.zeros(1, np.float32)},
            "c is not expected",
        ),
        ({"a": np.zeros(3, np.float32), "b": np.zeros(1, np.float32)}, r"a is F32\[3\], expected F32\[2\]"),
        ({"a": np.zeros(2, np.float16), "b": np.zeros(1, np.float32)}, r"a is F16\[2\], expected F32\[2\]"),
        ({"a": np.zeros(2, np.float32), "b": np.float32([np.nan])}, "tensor b holds NaN"),
        ({"a": np.float32([0, -np.inf]), "b": np.zeros(1, np.float32)}, "tensor a holds NaN"),
    ],
)
def test_tensors_that_are_not_as_agreed_are_refused_by_name(tmp_path, tensors, message):
    write(tmp_path / "d", tensors)
    with pytest.raises(WireError, match=message):
        check_tensors(open_document(tmp_path / "d"), {"a": TensorSpec("F32", (2,)), "b": TensorSpec("F32", (1,))})


# --------------------------------------------------------------------------------------------------------- messages
def test_metrics_that_are_not_finite_become_null():
    update = Update(metrics={"loss": math.nan, "dice": [np.float32(0.5), math.inf], "steps": np.int64(3)})
    assert update.metrics == {"loss": None, "dice": [0.5, None], "steps": 3.0}
    assert "NaN" not in encode_json(update).decode()


@pytest.mark.parametrize(
    "build",
    [
        lambda: Census(num_cases=0, channel_names={"0": "CT"}, labels={"background": 0}),
        lambda: Census(num_cases=1, channel_names={}, labels={"background": 0}),
        lambda: Update(metrics={"a": [0.0] * 1001}),
        lambda: PlansReport(plans={"a": math.nan}),
        lambda: WantedBins(bins=[[65536]]),
        lambda: WantedBins(bins=[list(range(7))]),
        lambda: Aggregate(round=-1, contributors={}),
        lambda: Aggregate(round=1, contributors={"no good": 1}),
        lambda: Aggregate(round=1, contributors={"A": 0}),
        lambda: Aggregate(round=1, contributors={"A": 1}, missing=["B", "B"]),
        lambda: MATCH.model_validate({**MATCH.model_dump(), "initial_owner": {}}),
        lambda: MATCH.model_validate({**MATCH.model_dump(), "initial_owner": {"w": "C"}}),
        lambda: MESSAGES[2].model_validate({**MESSAGES[2].model_dump(), "shapes": []}),
        lambda: MESSAGES[2].model_validate({**MESSAGES[2].model_dump(), "extrema": []}),
        lambda: MESSAGES[2].model_validate({**MESSAGES[2].model_dump(), "spacings": [(0, 1, math.inf)]}),
        lambda: MESSAGES[8].model_validate({**MESSAGES[8].model_dump(), "aliases": {"a": "nowhere"}}),
        lambda: MESSAGES[8].model_validate({**MESSAGES[8].model_dump(), "tensors": MESSAGES[8].tensors * 2}),
    ],
)
def test_nonsense_is_refused_at_the_door(build):
    with pytest.raises(ValidationError):
        build()


def test_messages_are_frozen():
    with pytest.raises(ValidationError):
        MESSAGES[0].num_cases = 4


def test_order_of_labels_survives():
    census = Census(num_cases=1, channel_names={"1": "b", "0": "a"}, labels={"z": 2, "background": 0})
    assert list(decode_json(Census, encode_json(census)).labels) == ["z", "background"]


@pytest.mark.parametrize(
    "body",
    [
        FederationSettings(federation="F", sites=["A", "B"], num_epochs=2, deadline_s=30),
        JoinRequest(invitation="i", token="t" * 32),
        Receipt(digest="a" * 64, waiting_for=["B"]),
        RunState(run="r", registered=["A"], open_round=3, num_rounds=10),
    ],
)
def test_bodies_survive_the_round_trip(body):
    assert decode_json(type(body), encode_json(body)) == body


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'{"digest": 1}', b'{"digest": "x"}', b"\xff"])
def test_bad_bodies_are_wire_errors(data):
    with pytest.raises(WireError):
        decode_json(Receipt, data)


def test_digest_of_plans_does_not_depend_on_the_order_of_keys():
    assert json_digest({"a": 1, "b": {"c": [1.5], "d": None}}) == json_digest({"b": {"d": None, "c": [1.5]}, "a": 1})
    assert json_digest({"a": [1, 2]}) != json_digest({"a": [2, 1]})
    assert canonical_json({"b": 1, "a": "ä"}) == b'{"a":"\\u00e4","b":1}'


def test_keys_of_gatherings():
    run = run_name("3d_fullres", 0, "nnUNetTrainerAsymFedAvg")
    assert run == "3d_fullres.fold_0.nnUNetTrainerAsymFedAvg"
    assert RoundKey(run, 7) == f"runs/{run}/rounds/7"
    assert (RegistrationKey(run), InitialKey(run)) == (f"runs/{run}/registration", f"runs/{run}/initial")
    assert PlansKey("nnUNetPlans") == "plans/nnUNetPlans"
    for bad in ("", "..", "a/b", "a b", "a" * 200):
        with pytest.raises(ValueError, match="part of a key"):
            PlansKey(bad)


def test_refusals_keep_their_parts_when_pickled():
    import pickle

    error = pickle.loads(pickle.dumps(RefusedError("No", "Ask again.", code="closed")))
    assert (error.message, error.remedy, error.code, str(error)) == ("No", "Ask again.", "closed", "No. Ask again.")
