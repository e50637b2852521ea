"""The forms in which weights travel, seen through the seam that sites and coordinator use."""

import numpy as np
import pytest

from nnunetv2.federated.aggregation.codecs import CODECS, codec_of
from nnunetv2.federated.protocol.document import TensorSpec, open_document, write_document
from nnunetv2.federated.protocol.messages import Aggregate, Update

WEIGHTS = {"v": np.float32([[0.5, -2.0]]), "w": np.float32([1.0, 2.0, 4.0])}  # exact in half precision too
SPECS = {name: TensorSpec.of(values) for name, values in WEIGHTS.items()}


def write(path, message, weights):
    write_document(path, message, {name: TensorSpec.of(values) for name, values in weights.items()}, weights.values())
    return open_document(path)


# Changes of eight bits have tests of their own.
VALUES = [name for name, codec in CODECS.items() if not codec.is_relative]


@pytest.mark.parametrize("precision", VALUES)
def test_what_a_site_encodes_is_what_the_coordinator_expects(precision):
    codec = codec_of(precision)
    sent = codec.encode(WEIGHTS)
    codec.settle()
    assert {name: TensorSpec.of(values) for name, values in sent.items()} == codec.specs(SPECS)
    assert {name: values.tolist() for name, values in sent.items()} == {n: v.tolist() for n, v in WEIGHTS.items()}


@pytest.mark.parametrize("precision", VALUES)
def test_an_aggregate_is_kept_in_float32_and_travels_as_updates_do(precision, tmp_path):
    codec = codec_of(precision)
    begun = Aggregate(round=None, contributors={"A": 1.0, "B": 1.0})
    with (
        write(tmp_path / "before", begun, WEIGHTS) as before,
        write(tmp_path / "A", Update(), codec.encode(WEIGHTS)) as a,
        write(tmp_path / "B", Update(), codec.encode({name: 3 * values for name, values in WEIGHTS.items()})) as b,
    ):
        done = codec.combine(
            {"A": a, "B": b},
            {"A": 1.0, "B": 3.0},
            out_path=tmp_path / "after",
            message=begun.model_copy(update={"round": 0}),
            previous=before,
            min_sites=1,
        )
    with open_document(tmp_path / "after") as after:
        assert after.specs == SPECS and done.kept == ()
        assert after.read("w").tolist() == [2.5, 5.0, 10.0]
        digest = codec.write_for_site(after, tmp_path / "for site", ["w"], whole=False)
    with open_document(tmp_path / "for site") as received:
        assert received.specs == codec.specs({"w": SPECS["w"]}) and received.message.round == 0
        assert received.read("w").tolist() == [2.5, 5.0, 10.0] and len(digest) == 64
