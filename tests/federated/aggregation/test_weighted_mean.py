"""The aggregate is the weighted mean, whatever the order of arrival, in the memory of one tensor."""

from __future__ import annotations

import itertools
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nnunetv2.federated.aggregation import weighted_mean
from nnunetv2.federated.aggregation.weighted_mean import Change, aggregate_documents, collect_from_owners, outliers
from nnunetv2.federated.errors import AggregationError
from nnunetv2.federated.protocol.document import TensorSpec, open_document, write_document
from nnunetv2.federated.protocol.messages import Aggregate, Update

MESSAGE = Aggregate(round=0, contributors={"A": 1})


def make_document(path, tensors):
    tensors = {name: np.asarray(values) for name, values in tensors.items()}
    write_document(path, Update(), {name: TensorSpec.of(values) for name, values in tensors.items()}, tensors.values())
    return open_document(path)


def make_documents(folder, **sites):
    return {site: make_document(folder / site, tensors) for site, tensors in sites.items()}


def average(values, weights):
    """Average arrays of as many sites."""
    sites = [f"s{index:04d}" for index in range(len(values))]
    with tempfile.TemporaryDirectory() as name:
        documents = make_documents(Path(name), **{site: {"w": value} for site, value in zip(sites, values)})
        result, _ = aggregate(Path(name), documents, dict(zip(sites, weights)))
        mean = result.read("w")
        for document in (result, *documents.values()):
            document.close()
    return mean


def aggregate(folder, documents, weights, **keywords):
    done = aggregate_documents(documents, weights, out_path=folder / "result", message=MESSAGE, **keywords)
    return open_document(folder / "result"), done.digest


@pytest.mark.parametrize(("weights", "expected"), [((1, 1), 2.0), ((3, 1), 1.0), ((1, 3), 3.0), ((0.5, 0.5), 2.0)])
def test_mean_counts_cases(tmp_path, weights, expected):
    documents = make_documents(tmp_path, A={"w": np.float32([0, 4])}, B={"w": np.float32([4, 0])})
    result, _ = aggregate(tmp_path, documents, dict(zip("AB", weights)))
    assert result.read("w").tolist() == [expected, 4 - expected]
    assert result.message == MESSAGE


def test_a_tensor_is_averaged_over_the_sites_that_have_it(tmp_path):
    documents = make_documents(
        tmp_path,
        A={"all": np.float32([3]), "two": np.float32([1])},
        B={"all": np.float32([6])},
        C={"two": np.float32([5]), "all": np.float32([9]), "one": np.float32([7])},
    )
    result, _ = aggregate(tmp_path, documents, {"A": 3, "B": 1, "C": 1, "absent": 9})
    means = {name: float(result.read(name)[0]) for name in result.specs}
    assert means == {"all": pytest.approx(4.8), "one": 7, "two": 2}


def test_a_tensor_that_no_site_sent_keeps_its_previous_value(tmp_path):
    documents = make_documents(tmp_path, A={"w": np.float32([1])})
    previous = make_document(tmp_path / "before", {"v": np.float32([8]), "w": np.float32([9])})
    result, _ = aggregate(tmp_path, documents, {"A": 1}, previous=previous)
    assert (result.read("v").tolist(), result.read("w").tolist()) == ([8], [1])


def test_any_order_of_arrival_gives_identical_bytes(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        site: {name: rng.normal(size=(5, 7)).astype(np.float32) * 10.0**index for name in "zyx"}
        for index, site in enumerate("ABCD")
    }
    documents = make_documents(tmp_path, **tensors)
    weights = {"A": 7, "B": 1, "C": 22, "D": 3}
    digests = {
        aggregate(tmp_path, {site: documents[site] for site in order}, weights)[1]
        for order in itertools.permutations("ABCD")
    }
    assert len(digests) == 1
    reordered = make_documents(tmp_path, **{site: dict(reversed(values.items())) for site, values in tensors.items()})
    assert aggregate(tmp_path, reordered, dict(reversed(weights.items())))[1] in digests


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([np.float32, np.float16]), number=st.integers(1, 5))
def test_mean_lies_between_the_extremes(data, dtype, number):
    width = 32 if dtype == np.float32 else 16
    elements = st.floats(width=width, allow_nan=False, allow_infinity=False)
    values = [data.draw(arrays(dtype, 6, elements=elements)) for _ in range(number)]
    weights = data.draw(st.lists(st.floats(1e-3, 1e6), min_size=number, max_size=number))
    mean = average(values, weights)
    assert mean.dtype == dtype
    assert (np.min(values, axis=0) <= mean).all() and (mean <= np.max(values, axis=0)).all()


@settings(max_examples=30, deadline=None)
@given(
    values=arrays(np.float32, 9, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=6),
)
def test_equal_updates_come_back_unchanged(values, weights):
    assert (average([values] * len(weights), weights) == values).all()


def test_sums_are_float64():
    # in float32 the small addends would be lost one by one
    values = [np.float32([2.0**24])] + [np.float32([1])] * 200
    assert average(values, [1] * 201)[0] == np.float32((2**24 + 200) / 201)


def test_shape_and_blocks_do_not_show():
    values = np.random.default_rng(1).normal(size=(3, 50_001)).astype(np.float32)
    expected = ((values.astype(np.float64) * 2 + values[::-1].astype(np.float64) * 5) / 7).astype(np.float32)
    np.testing.assert_array_equal(average([values, values[::-1]], [2, 5]), expected)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ({}, "no update"),
        ({"A": {"w": np.float32([1])}, "X": {"w": np.float32([1])}}, "site X has no weight"),
        ({"A": {"w": np.float32([1])}, "B": {"w": np.float32([1, 2])}}, r"w is F32\[2\] at site B, F32\[1\] at site A"),
        ({"A": {"w": np.float32([1])}, "B": {"w": np.float16([1])}}, r"tensor w is F16\[1\] at site B"),
        ({"A": {"n": np.int64([1])}}, r"tensor n is I64\[1\]: integers are not averaged"),
        ({"A": {"w": np.float32([np.nan])}, "B": {"w": np.float32([1])}}, "tensor w: the mean is not finite"),
        ({"C": {"w": np.float32([1])}}, "tensor w: a weight must be positive"),
    ],
)
def test_what_cannot_be_averaged_is_refused_by_name(tmp_path, sites, message):
    with pytest.raises(AggregationError, match=message):
        aggregate(tmp_path, make_documents(tmp_path, **sites), {"A": 1, "B": 1, "C": 0})
    assert not (tmp_path / "result").exists()


def test_initial_values_are_those_of_the_owners(tmp_path):
    documents = make_documents(tmp_path, A={"v": np.float32([1])}, B={"w": np.float32([2]), "v": np.float32([3])}, C={})
    digests = set()
    for order in itertools.permutations("ABC"):
        digests.add(
            collect_from_owners(
                {site: documents[site] for site in order},
                {"w": "B", "v": "A"},
                out_path=tmp_path / "result",
                message=MESSAGE,
            )
        )
    result = open_document(tmp_path / "result")
    assert {name: result.read(name).tolist() for name in result.specs} == {"v": [1], "w": [2]}
    assert len(digests) == 1


@pytest.mark.parametrize("owners", [{"v": "B"}, {"v": "nobody"}, {"u": "A"}])
def test_an_owner_that_does_not_deliver_is_named(tmp_path, owners):
    documents = make_documents(tmp_path, A={"v": np.float32([1])}, B={})
    with pytest.raises(AggregationError, match=f"site {next(iter(owners.values()))} has not contributed tensor"):
        collect_from_owners(documents, owners, out_path=tmp_path / "result", message=MESSAGE)


@pytest.mark.slow
def test_memory_does_not_grow_with_sites_or_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(weighted_mean, "_THREADS", 2)
    size, tensors = 500_000, 8

    def peak_with(sites):
        documents = {}
        for site in range(sites):
            specs = {f"w{index}": TensorSpec("F32", (size,)) for index in range(tensors)}
            values = (np.full(size, site, np.float32) for _ in range(tensors))
            write_document(tmp_path / f"s{site}", Update(), specs, values)
            documents[f"s{site}"] = open_document(tmp_path / f"s{site}")
        tracemalloc.start()
        aggregate(tmp_path, documents, dict.fromkeys(documents, 1), previous=documents["s0"])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak_with(2) < 3.2 * 4 * size + 4e6  # a tensor of 2 MB per thread, one that is written, and blocks
    assert peak_with(16) < 3.2 * 4 * size + 4e6


def test_the_change_of_every_site_is_measured_in_the_same_pass(tmp_path):
    before = make_document(tmp_path / "before", {"v": np.float32([1, 1]), "w": np.float32([0, 0, 0])})
    documents = make_documents(
        tmp_path,
        A={"v": np.float32([4, 5]), "w": np.float32([0, 0, 0])},
        B={"v": np.float32([1, 1])},
        C={"w": np.float32([-12, 0, 0]), "v": np.float32([1, 6])},
    )
    done = aggregate_documents(
        documents, dict.fromkeys("ABC", 1), out_path=tmp_path / "result", message=MESSAGE, previous=before
    )
    assert done.changes == {"A": Change(5.0, 5), "B": Change(0.0, 2), "C": Change(13.0, 5)}


def test_changes_are_float64_over_many_blocks_and_do_not_depend_on_threads(tmp_path, monkeypatch):
    rng = np.random.default_rng(2)
    values = {f"t{index}": rng.normal(size=100_001).astype(np.float32) for index in range(5)}
    documents = make_documents(tmp_path, A=values)
    before = make_document(tmp_path / "before", {name: np.zeros_like(one) for name, one in values.items()})
    found = set()
    for threads in (1, 2, 3):
        monkeypatch.setattr(weighted_mean, "_THREADS", threads)
        done = aggregate_documents(documents, {"A": 1}, out_path=tmp_path / "result", message=MESSAGE, previous=before)
        found.add((done.digest, done.changes["A"].norm))
    ((_, norm),) = found
    assert norm == pytest.approx(
        np.sqrt(sum((one.astype(np.float64) ** 2).sum() for one in values.values())), rel=1e-13
    )


@pytest.mark.parametrize(
    ("distances", "expected"),
    [
        ({"A": 1, "B": 100}, []),  # of two, nobody knows which is the odd one
        ({"A": 1, "B": 1, "C": 3}, []),
        ({"A": 1, "B": 1, "C": 3.1}, ["C"]),
        ({"A": 1, "B": 2, "C": 1.5, "D": 20, "E": 30}, ["D", "E"]),
        ({"A": 0, "B": 0, "C": 0.1}, ["C"]),
        ({"A": 0, "B": 0, "C": 0}, []),
    ],
)
def test_a_conspicuous_change_is_one_far_beyond_the_median_of_the_others(distances, expected):
    assert outliers({site: Change(float(value), 1) for site, value in distances.items()}) == expected


def test_sites_that_share_less_are_compared_per_element():
    assert outliers({"A": Change(10.0, 100), "B": Change(10.0, 100), "C": Change(10.0, 4)}) == ["C"]
    assert outliers({"A": Change(10.0, 100), "B": Change(10.0, 100), "C": Change(2.0, 4)}) == []
