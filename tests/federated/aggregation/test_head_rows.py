"""Rows of segmentation heads are tensors of their own, and become heads again."""

from __future__ import annotations

import numpy as np
import pytest
from fake_federation import make_registration

from nnunetv2.federated.aggregation import head_rows, matching
from nnunetv2.federated.aggregation.late_join import admit, with_site
from nnunetv2.federated.errors import MatchingError
from nnunetv2.federated.protocol.messages import Match, TensorEntry

WEIGHT, BIAS = "decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias"
SHAPES = {"encoder.weight": (4, 3), WEIGHT: (3, 4, 1, 1), BIAS: (3,)}


def entries(shapes=SHAPES):
    return [TensorEntry(name=name, dtype="F32", shape=shape) for name, shape in shapes.items()]


def manifest(*trained: int):
    return head_rows.split_entries(entries(), {}, (WEIGHT, BIAS), {0, *trained})[0]


def test_rows_become_the_heads_that_they_were():
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    split = head_rows.split_weights(weights, (WEIGHT, BIAS))
    assert split["decoder.seg_layers.0.row2.weight"].shape == (1, 4, 1, 1)
    assert len(split) == 7
    joined = head_rows.join_weights(split, {name: np.zeros(SHAPES[name], np.float32) for name in (WEIGHT, BIAS)})
    assert joined.keys() == weights.keys()
    for name, values in weights.items():
        np.testing.assert_array_equal(joined[name], values)


def test_rows_that_did_not_come_stay():
    present = {BIAS: np.array([1, 2, 3], np.float32)}
    joined = head_rows.join_weights({"decoder.seg_layers.0.row1.bias": np.array([9], np.float32)}, present)
    assert joined[BIAS].tolist() == [1, 9, 3]
    assert present[BIAS].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("decoder.seg_layers.3.row12.weight", ("decoder.seg_layers.3.weight", 12)),
        ("seg_layers.row0.bias", ("seg_layers.bias", 0)),
        ("decoder.seg_layers.0.weight", None),
        ("decoder.row1.weight", None),
    ],
)
def test_rows_are_known_by_their_names(name, row):
    assert head_rows.row_of(name) == row
    if row is not None:
        assert head_rows.row_name(*row) == name


def test_a_network_without_heads_is_refused():
    with pytest.raises(MatchingError, match="no tensor below 'seg_layers' with a row for each of its 4 outputs"):
        head_rows.find_heads(entries(), 4)
    assert head_rows.find_heads(entries(), 3) == (WEIGHT, BIAS)


def test_further_names_of_a_head_are_those_of_its_rows():
    _, aliases = head_rows.split_entries(entries(), {"head.weight": WEIGHT, "e": "encoder.weight"}, (WEIGHT, BIAS), {0})
    assert aliases["e"] == "encoder.weight"
    assert aliases["head.row1.weight"] == "decoder.seg_layers.0.row1.weight"


@pytest.mark.parametrize("rule", ["name", "resolution"])
def test_sites_that_do_not_train_a_row_receive_it_and_do_not_count(rule):
    found = matching.match_tensors({"A": manifest(1), "B": manifest(1, 2), "C": manifest(2)}, rule=rule)
    stage = "0" if rule == "name" else "r0"
    row1, row2 = (f"decoder.seg_layers.{stage}.row{row}.weight" for row in (1, 2))
    assert [*found.shared[row1]] == ["A", "B"] and [*found.received[row1]] == ["C"]
    assert [*found.shared[row2]] == ["B", "C"] and [*found.received[row2]] == ["A"]
    assert all(shared == total for shared, total in found.coverage.values())


def test_a_row_of_too_few_sites_is_nobodys_to_give():
    found = matching.match_tensors({"A": manifest(1), "B": manifest(1, 2), "C": manifest(1)}, rule="name")
    assert not any("row2" in name for name in (*found.shared, *found.received))


def test_names_of_a_model_are_whole_again():
    names = {entry.name: f"canonical {entry.name}" for entry in manifest(1, 2)}
    joined = head_rows.join_names(names)
    assert [*joined] == [*SHAPES]
    assert joined[BIAS] == tuple(f"canonical decoder.seg_layers.0.row{row}.bias" for row in range(3))


def test_a_site_that_comes_late_gives_and_gets_what_it_should():
    manifests = {"A": manifest(1), "B": manifest(1, 2), "C": manifest(2)}
    found = matching.match_tensors(manifests, rule="name")
    match = Match(
        rule="name",
        weighting="cases",
        weights=dict.fromkeys("ABC", 1.0),
        shared=found.shared,
        received=found.received,
        annotated={"A": (1,), "B": (1, 2), "C": (2,)},
        initial_owner=matching.choose_owners(found.shared, dict.fromkeys("ABC", 1.0)),
        coverage=found.coverage,
    )
    registered = {site: make_registration().model_copy(update={"tensors": one}) for site, one in manifests.items()}
    data = registered["A"].dataset_json.model_copy(
        update={"labels": {"background": 0, "x": 1, "y": 2}, "annotated_labels": ("background", "y")}
    )
    late = registered["A"].model_copy(update={"tensors": manifest(2), "dataset_json": data})
    admitted = admit("D", late, match, registered)
    for one in (admitted, with_site(match, admitted, "D")):
        assert "D" in one.shared["decoder.seg_layers.0.row2.bias"]
        assert "D" not in one.shared["decoder.seg_layers.0.row1.bias"]
        assert one.received["decoder.seg_layers.0.row1.bias"]["D"] == "decoder.seg_layers.0.row1.bias"
        assert one.annotated["D"] == (2,)
        assert one.coverage["D"] == found.coverage["C"]
        Match.model_validate(one.model_dump())
