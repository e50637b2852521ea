"""Rules of gatherings, as plain state."""
import pytest
from fake_federation import make_settings

from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.rounds import (
    Contribution,
    Gathering,
    RoundBook,
    Verdict,
    closed,
    due_at,
    fresh_gathering,
    judge,
    may_close,
    parse_key,
    prerequisite,
    refused,
    with_contribution,
)

D1, D2 = "1" * 64, "2" * 64


def gathering(key="runs/r/rounds/0", **settings) -> Gathering:
    return fresh_gathering(parse_key(key), make_settings(**settings))


def add(state: Gathering, site: str, digest=D1, now=0.0) -> Gathering:
    return with_contribution(state, site, Contribution(digest, 10, now))


@pytest.mark.parametrize(("key", "kind", "run", "number"), [
    ("fingerprint/census", "census", None, None),
    ("fingerprint/coarse", "coarse", None, None),
    ("fingerprint/fine", "fine", None, None),
    ("plans/nnUNetPlans", "plans", None, None),
    ("runs/3d_fullres.fold_0.T/registration", "registration", "3d_fullres.fold_0.T", None),
    ("runs/r/initial", "initial", "r", None),
    ("runs/r/rounds/12", "round", "r", 12),
])
def test_keys_are_taken_apart(key, kind, run, number):
    parsed = parse_key(key)
    assert (str(parsed), parsed.kind, parsed.run, parsed.number) == (key, kind, run, number)


@pytest.mark.parametrize("key", [
    "", "fingerprint", "fingerprint/other", "plans/", "plans/..", "plans/../x", "plans/a/b", "runs/../registration",
    "runs/r/rounds/-1", "runs/r/rounds/01", "runs/r/rounds/1x", "runs/r/rounds/", "runs/r/rounds/1\n", "runs//initial",
    "runs/r/../initial", "runs/r\0/initial", "RUNS/r/initial", "/fingerprint/census", "runs/.hidden/initial",
])
def test_other_keys_are_refused(key):
    with pytest.raises(RefusedError) as info:
        parse_key(key)
    assert info.value.code == "unknown_gathering"


@pytest.mark.parametrize(("key", "before"), [
    ("fingerprint/census", None), ("fingerprint/coarse", "fingerprint/census"),
    ("fingerprint/fine", "fingerprint/coarse"), ("plans/p", None), ("runs/r/registration", None),
    ("runs/r/initial", "runs/r/registration"), ("runs/r/rounds/0", "runs/r/initial"),
    ("runs/r/rounds/7", "runs/r/rounds/6"),
])
def test_every_gathering_knows_what_comes_before(key, before):
    found = prerequisite(parse_key(key))
    assert (found and str(found)) == before


def test_waits_for_everybody_without_a_deadline():
    state = add(gathering(), "A")
    assert state.waiting_for == ("B",)
    assert not may_close(state, now=1e9)
    assert due_at(state) is None
    assert may_close(add(state, "B"), now=0)


def test_closes_at_the_deadline_with_its_quorum():
    state = gathering(sites=("A", "B", "C"), quorum=2, deadline_s=10)
    state = add(state, "C", now=100)
    assert not may_close(state, now=1000)  # one of two
    state = add(state, "A", now=105)
    assert due_at(state) == 110
    assert not may_close(state, now=109.9)
    assert may_close(state, now=110)
    outcome = closed(state, now=110).outcome
    assert (outcome.contributors, outcome.missing) == (("A", "C"), ("B",))


def test_a_quorum_after_the_deadline_closes_at_once():
    state = add(gathering(sites=("A", "B", "C"), quorum=2, deadline_s=10), "C", now=100)
    assert may_close(add(state, "B", now=150), now=150)


def test_initial_weights_wait_for_their_owners():
    state = fresh_gathering(parse_key("runs/r/initial"), make_settings(sites=("A", "B", "C"), quorum=1, deadline_s=10),
                            required=("B",))
    state = add(state, "A", now=0)
    assert not may_close(state, now=1000)
    assert may_close(add(state, "B", now=5), now=10)


@pytest.mark.parametrize("key", ["fingerprint/census", "fingerprint/fine", "plans/p", "runs/r/registration"])
def test_statistics_plans_and_matches_never_close_without_everybody(key):
    state = add(gathering(key, sites=("A", "B", "C"), quorum=1, deadline_s=1), "A")
    assert not may_close(state, now=1e9)


def test_the_same_again_changes_nothing():
    state = add(gathering(), "A")
    assert judge(state, "A", D1) is Verdict.SAME
    assert judge(closed(add(state, "B"), 0), "A", D1) is Verdict.SAME


def test_the_first_weights_stay():
    state = add(gathering(), "A")
    assert judge(state, "A", D2) is Verdict.KEEP_FIRST
    assert judge(closed(add(state, "B"), 0), "A", D2) is Verdict.KEEP_FIRST


def test_weights_that_come_too_late_do_not_count():
    state = closed(add(gathering(), "A"), 0)
    assert judge(state, "B", D2) is Verdict.KEEP_FIRST


def test_statistics_may_be_corrected_until_they_are_closed():
    state = add(gathering("fingerprint/census"), "A")
    assert judge(state, "A", D2) is Verdict.STORE
    with pytest.raises(RefusedError, match="closed.*differs"):
        judge(closed(add(state, "B"), 0), "A", D2)


def test_a_refused_gathering_opens_again_with_a_correction():
    state = refused(add(add(gathering("fingerprint/census"), "A"), "B"), RefusedError("labels differ", "fix it"), now=1)
    assert not may_close(state, now=2)
    assert judge(state, "A", D1) is Verdict.SAME
    assert judge(state, "A", D2) is Verdict.STORE
    corrected = add(state, "A", D2)
    assert corrected.outcome is None
    assert may_close(corrected, now=2)


def test_strangers_are_refused():
    with pytest.raises(RefusedError, match="site X does not take part"):
        judge(gathering(), "X", D1)


def finish(book: RoundBook, key: str) -> None:
    state = book.begin(parse_key(key))
    for site in state.expected:
        state = add(state, site)
    book.put(closed(state, 0))


def test_gatherings_begin_in_order():
    book = RoundBook(make_settings())
    with pytest.raises(RefusedError, match="cannot begin before runs/r/registration is closed"):
        book.begin(parse_key("runs/r/initial"))
    finish(book, "runs/r/registration")
    book.begin(parse_key("runs/r/initial"))


def test_a_run_counts_its_rounds():
    book = RoundBook(make_settings(num_epochs=2))
    state = book.run_state("r")
    assert (state.registered, state.open_round, state.closed) == ((), None, False)
    finish(book, "runs/r/registration")
    assert book.run_state("r").registered == ("A", "B")
    assert book.run_state("r").open_round is None
    finish(book, "runs/r/initial")
    assert book.run_state("r").open_round == 0
    finish(book, "runs/r/rounds/0")
    assert book.run_state("r").open_round == 1
    finish(book, "runs/r/rounds/1")
    state = book.run_state("r")
    assert (state.open_round, state.num_rounds, state.closed) == (None, 2, True)
    with pytest.raises(RefusedError, match="has 2 rounds"):
        book.begin(parse_key("runs/r/rounds/2"))


def test_the_coordinators_absence_does_not_count_against_the_deadline():
    book = RoundBook(make_settings(sites=("A", "B", "C"), quorum=2, deadline_s=10))
    book.put(add(add(gathering(sites=("A", "B", "C"), quorum=2, deadline_s=10), "A", now=100), "B", now=101))
    assert book.next_due() == 110
    book.restarted(now=5000)
    assert book.next_due() == 5010
    assert not book.ready(now=5009)
    assert [str(ready.key) for ready in book.ready(now=5010)] == ["runs/r/rounds/0"]
