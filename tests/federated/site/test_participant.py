"""A site's way through a run, with a coordinator of a few lines."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import pytest
from fake_federation import RUN, in_threads, make_registration, make_settings, make_weights, served

from nnunetv2.federated.errors import CoordinatorUnreachable, FederationError, NonFiniteError, RefusedError
from nnunetv2.federated.protocol import keys, messages
from nnunetv2.federated.protocol.api import SettingsChange
from nnunetv2.federated.protocol.rounds import Rounds
from nnunetv2.federated.site.participant import Participant

SHARED = {"w": {"a": "w.local", "b": "w"}, "v": {"a": "v", "b": "v"}, "x": {"b": "x", "c": "x"}}


class FakeTransport:
    """Answers from a dict; remembers what was sent."""

    def __init__(self, state: dict, results: dict) -> None:
        self.state, self.results, self.sent = state, results, {}

    def exchange(self, key, message, tensors=None):
        self.sent[key] = dict(tensors or {})
        return self.results[key]

    def result(self, key):
        return self.results[key]

    def run_state(self, run, *, plans=None):
        return SimpleNamespace(
            **{
                "run": run,
                "open_round": None,
                "num_rounds": 4,
                "closed": False,
                "registered": ("a", "b"),
                "rounds_closed": 0,
                "left": (),
                **self.state,
            }
        )


def document(message=messages.Aggregate(round=None, contributors={}), **tensors):  # noqa: B008
    return SimpleNamespace(message=message, specs=tensors, read=tensors.__getitem__)


def make_session(state, results, site="a") -> Participant:
    session = Participant(FakeTransport(state, results), site=site, run="run")
    owners = {"w": "a", "v": "b", "x": "b"}
    session.match = messages.Match.model_construct(shared=SHARED, initial_owner=owners, coverage={}, received={})
    return session


def test_a_site_sends_only_the_initial_weights_it_owns_and_takes_the_rest():
    answer = document(w=np.ones(2), v=np.zeros(3), x=np.ones(1))
    session = make_session({}, {"runs/run/initial": answer})
    position = session.start(0, {"w.local": np.full(2, 7.0), "v": np.full(3, 7.0), "own": np.ones(1)})
    assert session.transport.sent["runs/run/initial"].keys() == {"w"}
    assert position.epoch == 0
    assert position.weights.keys() == {"w.local", "v"}
    np.testing.assert_array_equal(position.weights["w.local"], 1)


def test_weights_travel_under_canonical_names_and_return_under_local_ones():
    said = messages.Aggregate(round=1, contributors={"a": 1.0})
    answer = document(said, w=np.zeros(2), v=np.ones(3))
    session = make_session({"open_round": 1}, {"runs/run/rounds/1": answer})
    weights, message = session.exchange(
        1, {"w.local": np.ones(2), "v": np.ones(3), "own": np.ones(1)}, messages.Update(metrics={"loss": 1.0})
    )
    assert session.transport.sent["runs/run/rounds/1"].keys() == {"w", "v"}
    assert weights.keys() == {"w.local", "v"}
    assert message is said


@pytest.mark.parametrize(
    ("epoch", "state", "expected"),
    [
        (0, {"open_round": 2}, (2, "runs/run/rounds/1")),
        (3, {"open_round": 2}, (2, "runs/run/rounds/1")),
        (2, {"open_round": 2}, (2, "runs/run/rounds/1")),
        (1, {"open_round": None, "closed": True, "rounds_closed": 4}, (4, "runs/run/rounds/3")),
        (0, {"open_round": 0}, (0, "runs/run/initial")),
    ],
)
def test_a_returning_site_goes_on_where_the_others_are(epoch, state, expected):
    results = {expected[1]: document(w=np.ones(2), v=np.ones(3))}
    assert make_session(state, results).start(epoch, {}).epoch == expected[0]


@pytest.mark.parametrize(
    ("epoch", "state", "expected"),
    [
        (4, {"open_round": 1}, (4, "runs/run/rounds/0")),  # within the open round: on from its own weights
        (5, {"open_round": 1}, (5, "runs/run/rounds/0")),
        (3, {"open_round": 1}, (3, "runs/run/rounds/0")),
        (1, {"open_round": 1}, (3, "runs/run/rounds/0")),  # late
        (6, {"open_round": 1}, (3, "runs/run/rounds/0")),  # saved before an exchange that did not come about
        (1, {"open_round": 0}, (1, "runs/run/initial")),
        (10, {"open_round": 3}, (9, "runs/run/rounds/2")),  # the last round has one epoch: it is sent once more
        (4, {"open_round": None, "closed": True, "rounds_closed": 1}, (3, "runs/run/rounds/0")),
    ],
)
def test_a_site_goes_on_within_a_round_of_several_epochs(epoch, state, expected):
    own = {"w.local": np.full(2, 7.0), "v": np.full(3, 7.0), "own": np.ones(1)}
    results = {expected[1]: document(w=np.ones(2), v=np.ones(3))}
    position = make_session(state, results).start(epoch, own, rounds=Rounds(3), num_epochs=10)
    assert position.epoch == expected[0]
    assert position.is_within == (expected[0] % 3 != 0)
    assert position.weights.keys() == {"w.local", "v"}
    np.testing.assert_array_equal(position.weights["w.local"], 1)


def test_a_site_that_trains_on_during_an_exchange_begins_the_open_round_again():
    session = make_session({"open_round": 1}, {"runs/run/rounds/0": document(w=np.ones(2), v=np.ones(3))})
    assert session.start(7, {}, staleness=1, rounds=Rounds(3)).epoch == 3


def test_a_checkpoint_that_is_two_rounds_ahead_is_of_another_federation():
    with pytest.raises(FederationError, match="at round 1, this site's checkpoint at epoch 7"):
        make_session({"open_round": 1}, {}).start(7, {}, rounds=Rounds(3))


def test_a_stopped_run_ends_with_its_last_round():
    state = {"open_round": None, "closed": True, "rounds_closed": 2}
    position = make_session(state, {"runs/run/rounds/1": document(w=np.ones(2), v=np.ones(3))}).start(1, {})
    assert (position.epoch, position.is_over) == (2, True)


def test_a_run_that_was_stopped_before_its_first_round_cannot_be_joined():
    with pytest.raises(FederationError, match="before its first round"):
        make_session({"closed": True}, {}).start(0, {})


def test_a_newcomer_waits_for_initial_weights_and_gives_none():
    session = make_session({"registered": ("b", "c")}, {"runs/run/initial": document(w=np.ones(2), v=np.ones(3))})
    assert session.start(0, {}).weights.keys() == {"w.local", "v"}
    assert session.transport.sent == {}


def test_a_site_that_trains_on_during_an_exchange_may_be_two_ahead():
    session = make_session({"open_round": 2}, {"runs/run/rounds/1": document(w=np.ones(2), v=np.ones(3))})
    assert session.start(4, {}, staleness=1).epoch == 2


def test_weights_that_are_not_finite_never_leave():
    session = make_session({"open_round": 1}, {})
    with pytest.raises(NonFiniteError, match="tensor v holds NaN or infinity .1 of 2"):
        session.exchange(1, {"w.local": np.ones(2), "v": np.array([1, np.nan, 1])}, messages.Update())
    assert session.transport.sent == {}


def aggregate(number, *sites):
    return messages.Aggregate(round=number, contributors=dict.fromkeys(sites, 1.0))


@pytest.mark.parametrize(
    ("every", "number", "is_last", "expected"),
    [(1, 0, False, True), (2, 0, False, False), (2, 1, False, True), (2, 2, True, True), (0, 2, True, False)],
)
def test_the_operator_says_which_aggregates_are_validated(every, number, is_last, expected):
    session = make_session({}, {})
    session.transport.settings = lambda patience_s: SimpleNamespace(validate_every=every)
    assert session.wants_validation(aggregate(number, "a", "b"), is_last=is_last) is expected
    assert not session.wants_validation(aggregate(number, "b", "c"), is_last=is_last)  # it did not take part


def test_no_training_ends_because_a_validation_is_not_taken():
    def refuse(*_, **__):
        raise CoordinatorUnreachable("nobody there")

    session = make_session({}, {})
    session.transport.settings = session.transport.contribute = refuse
    assert not session.wants_validation(aggregate(0, "a", "b"), is_last=True)
    found = messages.Validation(tp=(1,), fp=(1,), fn=(1,))
    assert session.send_validation(aggregate(0, "a", "b"), found) == "nobody there"


def test_a_site_that_has_left_is_told_how_to_return():
    def refuse(*_):
        raise RefusedError("site a does not take part", code="not_expected")

    session = make_session({"left": ("a",)}, {})
    session.transport.exchange = refuse
    with pytest.raises(FederationError, match="has left run run.* --c returns"):
        session.exchange(1, {"w.local": np.ones(2), "v": np.ones(3)}, messages.Update())


def test_a_checkpoint_ahead_of_the_run_is_refused():
    with pytest.raises(FederationError, match="another federation"):
        make_session({"open_round": 2}, {}).start(4, {})


def test_an_aggregate_that_lacks_a_tensor_is_refused():
    session = make_session({"open_round": 0}, {"runs/run/initial": document(w=np.ones(2))})
    with pytest.raises(FederationError, match="lacks tensor v"):
        session.start(0, {})


def test_what_is_shared_is_unknown_before_registration():
    session = Participant(FakeTransport({}, {}), site="a", run="run")
    with pytest.raises(FederationError, match="register first"):
        session.exchange(0, {}, messages.Update())


def test_run_names_reject_what_cannot_be_part_of_a_key():
    with pytest.raises(ValueError, match="3d/../x"):
        keys.run_name("3d/../x", 0, "t")


@pytest.mark.slow
def test_a_late_update_is_carried_and_the_site_goes_on_where_it_counted(tmp_path):
    settings = make_settings(sites=("A", "B", "C"), quorum=2, deadline_s=0.1, late_updates="carry", num_epochs=5)
    with served(tmp_path / "federation", settings) as federation, ExitStack() as stack:
        sessions = {
            site: Participant(stack.enter_context(federation.client(site)), site=site, run=RUN)
            for site in settings.sites
        }

        def begin(session):
            session.register(make_registration(1))
            return session.start(0, make_weights(0)).epoch

        def exchange(site, number):
            return sessions[site].exchange(number, make_weights(number), messages.Update())[1]

        assert in_threads(*(lambda one=one: begin(one) for one in sessions.values())) == [0, 0, 0]
        rounds = in_threads(lambda: exchange("A", 0), lambda: exchange("B", 0))
        assert [one.missing for one in rounds] == [("C",), ("C",)]
        federation.coordinator.change_settings(SettingsChange(deadline_s=1e6), by="boss")  # the next one waits for C
        late, *others = in_threads(lambda: exchange("C", 0), lambda: exchange("A", 1), lambda: exchange("B", 1))
        assert late.round == 1 and late == others[0] == others[1]
        assert late.contributors.keys() == {"A", "B", "C"}


def test_what_a_site_has_trained_alone_does_not_become_the_first_weights_of_all():
    with pytest.raises(FederationError, match="has not begun, and .* checkpoint is at epoch 1: .* without --c"):
        make_session({}, {}).start(1, {"w.local": np.ones(2), "v": np.ones(3)})
    answer = document(w=np.ones(2), v=np.zeros(3), x=np.ones(1))
    assert make_session({}, {"runs/run/initial": answer}, site="c").start(1, {}).weights.keys() == {"x"}  # it owns none
