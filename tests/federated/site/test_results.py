"""What a site takes from a coordinator: results of the right kind and size, and weights that are its network's."""

from __future__ import annotations

import numpy as np
import pytest
from fake_federation import RUN, SHAPES, make_client, make_registration, make_weights
from hostile_coordinator import Endless, hostile, send

from nnunetv2.federated.errors import RefusedError, WireError
from nnunetv2.federated.exchanges.steps import STEPS, step_of
from nnunetv2.federated.exchanges.steps.base import MESSAGE_ALLOWANCE
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.document import TensorSpec, open_document, write_document
from nnunetv2.federated.protocol.keys import (
    AdmissionKey,
    CensusKey,
    CoarseKey,
    FineKey,
    InitialKey,
    LateCensusKey,
    LatePlansKey,
    PlansKey,
    RegistrationKey,
    RoundKey,
    ValidationKey,
)
from nnunetv2.federated.site import results
from nnunetv2.federated.site.participant import Participant
from nnunetv2.federated.site.transports.http_requests import NoAnswerError

ALL_KEYS = {
    CensusKey(): messages.PooledCensus(num_cases=3),
    CoarseKey(): messages.WantedBins(bins=((1,),)),
    FineKey(): messages.PooledFingerprint(num_cases=1, fingerprint={}),
    PlansKey("p"): messages.PlansAgreement(digest="0" * 64),
    LatePlansKey("p", "A"): messages.PlansAgreement(digest="0" * 64),
    LateCensusKey("A"): messages.PooledCensus(num_cases=3),
    InitialKey(RUN): messages.Aggregate(round=None, contributors={"A": 1.0}),
    RoundKey(RUN, 3): messages.Aggregate(round=3, contributors={"A": 1.0}),
    ValidationKey(RUN, 3): messages.PooledValidation(
        round=3,
        dice=(),
        mean_dice=None,
        ema_dice=None,
        best_round=None,
        best_ema_dice=None,
        dice_of_site={},
        loss_of_site={},
    ),
}


def make_match(**changes) -> messages.Match:
    names = {f"c.{name}": {"A": name, "B": name} for name in SHAPES}
    return messages.Match(
        **{
            "rule": "name",
            "weighting": "cases",
            "weights": {"A": 1.0, "B": 1.0},
            "shared": names,
            "initial_owner": dict.fromkeys(names, "A"),
            "coverage": {"A": (24, 24), "B": (24, 24)},
            **changes,
        }
    )


# ------------------------------------------------------------------------------------------------------- kinds and keys
@pytest.mark.parametrize("key", ALL_KEYS)
def test_a_result_is_of_the_kind_of_its_gathering(key):
    step_of(key).check_result(key, ALL_KEYS[key])
    allowed = step_of(key).results
    for other in ALL_KEYS.values():
        if not isinstance(other, allowed):
            with pytest.raises(WireError, match="with a message of kind"):
                step_of(key).check_result(key, other)


def test_a_registration_is_answered_with_a_match():
    step_of(RegistrationKey(RUN)).check_result(RegistrationKey(RUN), make_match())
    with pytest.raises(WireError, match="kind pooled_census, expected match"):
        step_of(RegistrationKey(RUN)).check_result(RegistrationKey(RUN), messages.PooledCensus(num_cases=1))


@pytest.mark.parametrize(("key", "number"), [(InitialKey(RUN), 0), (RoundKey(RUN, 1), None), (RoundKey(RUN, 1), 10**7)])
def test_an_aggregate_is_of_a_round_that_can_be(key, number):
    with pytest.raises(WireError, match="round"):
        step_of(key).check_result(key, messages.Aggregate(round=number, contributors={}))


def test_every_kind_of_gathering_has_a_result_of_its_own():
    assert all(step.results for step in STEPS)
    assert {type(key) for key in ALL_KEYS} | {RegistrationKey, AdmissionKey} <= {step.key for step in STEPS}


def test_a_late_update_counts_in_another_round_of_its_run_and_nowhere_else():
    sent = RoundKey(RUN, 1)
    assert results.check_receipt(sent, "") == results.check_receipt(sent, sent) == sent
    assert results.check_receipt(sent, RoundKey(RUN, 2)) == RoundKey(RUN, 2)
    for other in (RoundKey("other", 2), InitialKey(RUN), CensusKey()):
        with pytest.raises(WireError, match="counts what was sent"):
            results.check_receipt(sent, other)
    with pytest.raises(RefusedError, match="there is no gathering"):
        results.check_receipt(sent, "../settings")


# --------------------------------------------------------------------------------------------------------------- sizes
def test_weights_may_be_as_large_as_those_that_were_registered():
    registered = results.weights_bytes(make_registration())
    assert registered == 4 * (4 * 3 + 4 + 2 * 4)
    assert step_of(RoundKey(RUN, 0)).largest_result(registered) == registered + MESSAGE_ALLOWANCE
    assert step_of(CensusKey()).largest_result(0) < step_of(FineKey()).largest_result(0)


@pytest.mark.parametrize("announced", [1 << 50, 100 << 20, None], ids=["a pebibyte", "100 MiB", "nothing"])
@pytest.mark.parametrize("key", [RoundKey(RUN, 1), CensusKey()])
def test_a_result_without_end_takes_no_disk(announced, key, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    answer = Endless(announced)
    with hostile(answer) as credential, make_client(credential, give_up_after_s=5.0) as client:
        with pytest.raises(WireError, match="is refused: it has .* at most 4194304 are taken"):
            client.result(key)
        assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) == 0
    assert answer.sent < answer.most


def test_a_model_without_end_takes_no_disk(tmp_path):
    for announced in (1 << 50, None):
        with (
            hostile(Endless(announced)) as credential,
            make_client(credential) as client,
            pytest.raises(WireError, match="is refused"),
        ):
            client.fetch_model(RUN, tmp_path / "model.zip", largest=1 << 20)
        assert list(tmp_path.iterdir()) == []


def test_a_part_that_is_larger_than_the_whole_takes_no_disk(tmp_path, monkeypatch):
    """The rest of a result is announced as small, and is not."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    asked = []

    def answer(handler):
        asked.append(handler.headers.get("Range"))
        handler.send_response(206 if asked[-1] else 200)
        handler.send_header("X-Content-SHA256", "0" * 64)
        if asked[-1]:
            handler.send_header("Content-Range", f"bytes {asked[-1][6:-1]}-1999999/2000000")
        handler.send_header("Content-Length", str(64 << 20) if asked[-1] else "2000000")
        handler.end_headers()
        for _ in range(64 if asked[-1] else 1):
            handler.wfile.write(bytes(1 << 20))
        handler.close_connection = True

    with hostile(answer) as credential, make_client(credential, give_up_after_s=20.0) as client:
        with pytest.raises((WireError, NoAnswerError), match="at most 4194304 are taken"):
            client.result(RoundKey(RUN, 1))
        assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) == 0
    assert len(asked) == 2


def test_a_document_of_another_kind_is_refused_by_the_client(tmp_path):
    write_document(tmp_path / "d", messages.PooledCensus(num_cases=3), {}, [])
    with (
        hostile(lambda handler: send(handler, (tmp_path / "d").read_bytes())) as credential,
        make_client(credential) as client,
    ):
        assert client.result(CensusKey()).message.num_cases == 3
        with pytest.raises(WireError, match="with a message of kind pooled_census, expected aggregate"):
            client.result(RoundKey(RUN, 1))


# ------------------------------------------------------------------------------------------------------------- weights
class OneAnswer:
    """A transport that answers everything with one document."""

    def __init__(self, match, path=None):
        self.match, self.path = match, path

    def run_state(self, run, *, plans=None):
        from nnunetv2.federated.protocol.api import RunState

        return RunState(run=run, open_round=1, rounds_closed=1)

    def exchange(self, key, message, tensors=None):
        from types import SimpleNamespace

        return SimpleNamespace(message=self.match) if self.path is None else open_document(self.path)

    def result(self, key):
        return open_document(self.path)


def registered_session(tmp_path, tensors, **changes) -> Participant:
    """Return a session that has registered, and gets an aggregate of these tensors."""
    transport = OneAnswer(make_match(**changes))
    session = Participant(transport, site="A", run=RUN)
    session.register(make_registration())
    transport.path = tmp_path / "aggregate"
    write_document(
        transport.path,
        messages.Aggregate(round=0, contributors={"A": 1.0}),
        {name: TensorSpec.of(values) for name, values in tensors.items()},
        tensors.values(),
    )
    return session


def aggregate(**changes) -> dict[str, np.ndarray]:
    tensors = {f"c.{name}": values for name, values in make_weights(1).items()}
    return {**tensors, **{name.replace("_", "."): values for name, values in changes.items()}}


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        (aggregate(c_encoder_weight=np.ones(1, np.float32)), r"is F32\[1\], expected F32\[4, 3\]"),
        (aggregate(c_encoder_weight=np.ones((3, 4), np.float32)), r"is F32\[3, 4\], expected F32\[4, 3\]"),
        (aggregate(c_encoder_bias=np.ones((), np.float32)), r"is F32\[\], expected F32\[4\]"),
        (aggregate(c_encoder_bias=np.ones((1, 4), np.float32)), r"is F32\[1, 4\], expected F32\[4\]"),
        (aggregate(c_encoder_bias=np.ones(4, np.int64)), "is of int64"),
        (aggregate(c_encoder_bias=np.ones(4, np.float16)), r"is F16\[4\], expected F32\[4\]"),
        (aggregate(c_encoder_bias=np.array([1, 2, np.nan, 3], np.float32)), "holds NaN or infinity"),
        (aggregate(c_head_weight=np.full((2, 4), -np.inf, np.float32)), "holds NaN or infinity"),
        (aggregate(c_more=np.ones(4, np.float32)), "holds tensor c.more, which is not shared"),
        ({"c.head.weight": np.ones((2, 4), np.float32)}, "lacks tensor c.encoder.bias .2 in all"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_aggregate_that_is_not_the_network_of_the_site_is_refused(tensors, problem, tmp_path):
    session = registered_session(tmp_path, tensors)
    with pytest.raises(WireError, match=problem):
        session.exchange(0, make_weights(0), messages.Update())
    with pytest.raises(WireError, match=problem):
        session.start(1, make_weights(0))


def test_an_aggregate_that_is_the_network_of_the_site_is_taken(tmp_path):
    weights, _ = registered_session(tmp_path, aggregate()).exchange(0, make_weights(0), messages.Update())
    assert {name: values.shape for name, values in weights.items()} == SHAPES


def test_weights_in_half_precision_are_taken_where_they_travel_so(tmp_path):
    halves = {name: values.astype(np.float16) for name, values in aggregate().items()}
    session = registered_session(tmp_path, halves, precision="float16")
    assert session.exchange(0, make_weights(0), messages.Update())[0].keys() == SHAPES.keys()
    with pytest.raises(WireError, match=r"is F32\[4, 3\], expected F16\[4, 3\]"):
        registered_session(tmp_path, aggregate(), precision="float16").exchange(0, make_weights(0), messages.Update())


@pytest.mark.parametrize(
    "shared",
    [{"x": {"A": "not.mine", "B": "x"}}, {"x": {"A": "encoder.bias", "B": "x"}, "y": {"A": "encoder.bias", "B": "y"}}],
)
def test_a_match_of_other_tensors_than_those_of_the_site_is_refused(shared, tmp_path):
    with pytest.raises(WireError, match="the coordinator takes"):
        registered_session(tmp_path, aggregate(), shared=shared, initial_owner=dict.fromkeys(shared, "A"))


def test_a_run_that_is_at_no_possible_round_is_refused(tmp_path):
    session = registered_session(tmp_path, aggregate())
    session.transport.run_state = lambda run: messages_state(run, 2**60)
    with pytest.raises(WireError, match="no run has more"):
        session.start(1, make_weights(0))


def messages_state(run: str, number: int):
    from nnunetv2.federated.protocol.api import RunState

    return RunState(run=run, open_round=number, rounds_closed=number)


# -------------------------------------------------------------------------------------------------- planning together
CHANNEL = {
    "mean": 1.0,
    "std": 1.0,
    "min": 0.0,
    "max": 9.0,
    "median": 1.0,
    "percentile_00_5": 0.0,
    "percentile_99_5": 8.0,
}
FINGERPRINT = {
    "spacings": [[1.0, 1.0, 2.0]],
    "shapes_after_crop": [[4, 5, 6]],
    "median_relative_size_after_cropping": 0.5,
    "foreground_intensity_properties_per_channel": {"0": CHANNEL},
}


def pooled(num_cases=1, **changes) -> messages.PooledFingerprint:
    return messages.PooledFingerprint(num_cases=num_cases, fingerprint={**FINGERPRINT, **changes})


def test_a_pooled_fingerprint_describes_its_cases_and_channels():
    results.check_fingerprint(pooled(), 1)


@pytest.mark.parametrize(
    ("fingerprint", "channels"),
    [
        (pooled(), 2),
        (pooled(num_cases=2), 1),
        (pooled(spacings=[[1.0, 1.0]]), 1),
        (pooled(spacings=[[1.0, 0.0, 1.0]]), 1),
        (pooled(spacings=[]), 1),
        (pooled(shapes_after_crop=[[4, 5, 6], [1, 2, 3]]), 1),
        (pooled(shapes_after_crop="x"), 1),
        (pooled(shapes_after_crop=[[4, 5, 0]]), 1),
        (pooled(median_relative_size_after_cropping=-1.0), 1),
        (pooled(foreground_intensity_properties_per_channel={"1": CHANNEL}), 1),
        (pooled(foreground_intensity_properties_per_channel={"0": {**CHANNEL, "std": -1.0}}), 1),
        (pooled(foreground_intensity_properties_per_channel={"0": {"mean": 1.0}}), 1),
        (pooled(foreground_intensity_properties_per_channel=None), 1),
    ],
)
def test_a_pooled_fingerprint_that_planning_cannot_use_is_refused(fingerprint, channels):
    with pytest.raises(WireError, match="the pooled fingerprint"):
        results.check_fingerprint(fingerprint, channels)


def test_bins_are_asked_for_once_and_for_the_channels_that_there_are():
    results.check_bins(messages.WantedBins(bins=((1, 5), (2,))), 2)
    for bins in (((1,),), ((5, 1), (2,)), ((1, 1), (2,))):
        with pytest.raises(WireError, match="the coordinator asks for bins"):
            results.check_bins(messages.WantedBins(bins=bins), 2)
