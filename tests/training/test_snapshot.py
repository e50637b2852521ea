import collections

import numpy as np
import torch

from nnunetv2.training.snapshot import SnapshotTaker


def make_state():
    weight = torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    return {
        "network_weights": collections.OrderedDict(first=weight, alias=weight, other=torch.ones(2)),
        "curves": [1.0, np.arange(3)],
        "axes": (0, 1),
        "name": "x",
        "nothing": None,
        "empty": torch.zeros(0),
    }


def test_a_snapshot_equals_the_state_and_keeps_its_values():
    state = make_state()
    taken = SnapshotTaker().take(state)
    expected = state["network_weights"]["first"].clone()
    state["network_weights"]["first"].zero_()
    state["curves"][1][:] = 7
    state["curves"].append("later")
    weights = taken.state["network_weights"]
    assert type(weights) is collections.OrderedDict and torch.equal(weights["first"], expected)
    assert taken.state["curves"][0] == 1.0 and taken.state["curves"][1].tolist() == [0, 1, 2]
    assert len(taken.state["curves"]) == 2 and taken.state["axes"] == (0, 1) and taken.state["nothing"] is None


def test_names_of_one_tensor_share_memory_and_tensors_are_contiguous():
    weights = SnapshotTaker().take(make_state()).state["network_weights"]
    assert weights["first"].data_ptr() == weights["alias"].data_ptr() != weights["other"].data_ptr()
    assert weights["first"].is_contiguous()


def test_tensors_of_equal_kind_do_not_share_a_buffer():
    state = {"a": torch.zeros(3), "b": torch.ones(3)}
    taken = SnapshotTaker().take(state).state
    assert taken["a"].tolist() == [0, 0, 0] and taken["b"].tolist() == [1, 1, 1]


def test_memory_is_used_again_only_when_nobody_holds_the_snapshot():
    taker, state = SnapshotTaker(), {"a": torch.zeros(3)}
    first = taker.take(state)
    second = taker.take({"a": torch.ones(3)})
    assert first.state["a"].tolist() == [0, 0, 0] and second.state["a"].tolist() == [1, 1, 1]
    place = first.state["a"].data_ptr()
    del first
    assert taker.take(state).state["a"].data_ptr() == place
