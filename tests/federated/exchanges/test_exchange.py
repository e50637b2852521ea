"""Rules of exchanges, as plain state."""

import itertools
import pickle
import sys
import threading

import pytest
from fake_federation import make_settings

from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.exchanges.exchange import (
    Contribution,
    Exchange,
    Policy,
    Verdict,
    close_with,
    due_at,
    judge,
    may_close,
    refuse_with,
    with_contribution,
)
from nnunetv2.federated.exchanges.registry import ExchangeRegistry, RunControl
from nnunetv2.federated.exchanges.steps import STEPS, fresh_exchange, keys_that_stop_with, parse_key, prerequisite
from nnunetv2.federated.protocol.keys import (
    AdmissionKey,
    CensusKey,
    CoarseKey,
    FineKey,
    FingerprintSumKey,
    FingerprintSumSurvivorsKey,
    FingerprintSumUploadKey,
    InitialKey,
    LateCensusKey,
    LatePlansKey,
    PlansKey,
    RegistrationKey,
    RoundKey,
    ShapeSumKey,
    ShapeSumSurvivorsKey,
    ShapeSumUploadKey,
    SurvivorsKey,
    UploadKey,
    ValidationKey,
)

D1, D2 = "1" * 64, "2" * 64


def exchange(key="runs/r/rounds/0", **settings) -> Exchange:
    return fresh_exchange(parse_key(key), make_settings(**settings))


def add(state: Exchange, site: str, digest=D1, now=0.0) -> Exchange:
    return with_contribution(state, site, Contribution(digest, 10, now))


def test_a_run_is_stopped_with_whatever_it_may_be_at():
    expected = {RegistrationKey("r"), InitialKey("r"), UploadKey("r", 3), SurvivorsKey("r", 3), RoundKey("r", 3)}
    assert set(keys_that_stop_with("r", 3)) == expected


@pytest.mark.parametrize(
    ("text", "key", "kind", "parts"),
    [
        ("fingerprint/census", CensusKey(), "census", {}),
        ("fingerprint/coarse", CoarseKey(), "coarse", {}),
        ("fingerprint/fine", FineKey(), "fine", {"again": 0}),
        ("fingerprint/fine/2", FineKey(2), "fine", {"again": 2}),
        ("plans/nnUNetPlans", PlansKey("nnUNetPlans"), "plans", {"plans": "nnUNetPlans"}),
        ("runs/a.fold_0.T/registration", RegistrationKey("a.fold_0.T"), "registration", {"run": "a.fold_0.T"}),
        ("runs/r/initial", InitialKey("r"), "initial", {"run": "r"}),
        ("runs/r/rounds/12", RoundKey("r", 12), "round", {"run": "r", "number": 12}),
        ("runs/r/validations/3", ValidationKey("r", 3), "validation", {"run": "r", "number": 3}),
        ("runs/r/admissions/C", AdmissionKey("r", "C"), "admission", {"run": "r", "site": "C"}),
        ("fingerprint/admissions/C", LateCensusKey("C"), "late_census", {"site": "C"}),
        ("plans/p/admissions/C", LatePlansKey("p", "C"), "late_plans", {"plans": "p", "site": "C"}),
        ("fingerprint/sums/2/uploads", FingerprintSumUploadKey(2), "fingerprint_upload", {"number": 2}),
        ("fingerprint/sums/2/survivors", FingerprintSumSurvivorsKey(2), "fingerprint_survivors", {"number": 2}),
        ("fingerprint/sums/2", FingerprintSumKey(2), "fingerprint_sum", {"number": 2}),
        ("plans/p/sums/0/uploads", ShapeSumUploadKey("p", 0), "shape_upload", {"plans": "p", "number": 0}),
        ("plans/p/sums/0/survivors", ShapeSumSurvivorsKey("p", 0), "shape_survivors", {"plans": "p", "number": 0}),
        ("plans/p/sums/0", ShapeSumKey("p", 0), "shape_sum", {"plans": "p", "number": 0}),
    ],
)
def test_keys_are_taken_apart(text, key, kind, parts):
    parsed = parse_key(text)
    assert (type(parsed), parsed, parsed.kind, vars(parsed)) == (type(key), text, kind, parts)
    assert (str(key), vars(key), pickle.loads(pickle.dumps(key))) == (text, parts, key)
    assert parse_key(parsed) is parsed


def test_every_step_has_a_key_and_follows_its_policy():
    assert len({step.key for step in STEPS}) == len({step.key.pattern for step in STEPS}) == len(STEPS)
    names = {name: {step.key.kind for step in STEPS if getattr(step.policy, name)} for name in Policy.__annotations__}
    weights = {"initial", "round", "upload"}
    masked = {"survivors", "validation_upload", "validation_survivors"}
    planning = {"census", "coarse", "fine"}
    of_planning = {f"{what}_{step}" for what in ("fingerprint", "shape") for step in ("upload", "survivors", "sum")}
    assert names == {
        "pooled": planning | weights | {"registration", "fingerprint_upload", "shape_upload"},
        "by_quorum": weights | {"validation", "validation_upload"},
        "first_stays": weights | masked | {"validation"} | of_planning,
        "compared": {"census", "plans", "registration", "admission"},
        "repeatable": {"late_census", "late_plans"},
        "missable": planning | {"plans", "registration"} | of_planning,
        "carries_weights": weights,
        "settles_members": {"registration", "admission"},
        "pauses_with_run": weights,
        "stops_with_run": weights | {"registration", "survivors"},
        "recurs": {"round"},
        "closes_first": {"validation", "validation_upload", "validation_survivors"},
    }


@pytest.mark.parametrize(
    "key",
    [
        "",
        "fingerprint",
        "fingerprint/other",
        "plans/",
        "plans/..",
        "plans/../x",
        "plans/a/b",
        "runs/../registration",
        "runs/r/rounds/-1",
        "runs/r/rounds/01",
        "runs/r/rounds/1x",
        "runs/r/rounds/",
        "runs/r/rounds/1\n",
        "runs//initial",
        "runs/r/../initial",
        "runs/r\0/initial",
        "RUNS/r/initial",
        "/fingerprint/census",
        "runs/.hidden/initial",
        "fingerprint/admissions/",
        "fingerprint/admissions/.C",
        "plans/admissions/C",
        "plans/p/admissions/C/D",
    ],
)
def test_other_keys_are_refused(key):
    with pytest.raises(RefusedError) as info:
        parse_key(key)
    assert info.value.code == "unknown_gathering"


@pytest.mark.parametrize(
    ("key", "before"),
    [
        ("fingerprint/census", None),
        ("fingerprint/coarse", "fingerprint/census"),
        ("fingerprint/fine", "fingerprint/coarse"),
        ("plans/p", None),
        ("runs/r/registration", None),
        ("runs/r/initial", "runs/r/registration"),
        ("runs/r/rounds/0", "runs/r/initial"),
        ("runs/r/rounds/7", "runs/r/rounds/6"),
        ("runs/r/validations/7", "runs/r/rounds/7"),
        ("runs/r/admissions/C", "runs/r/registration"),
        ("fingerprint/admissions/C", "fingerprint/census"),
        ("plans/p/admissions/C", "plans/p"),
    ],
)
def test_every_gathering_knows_what_comes_before(key, before):
    found = prerequisite(parse_key(key))
    assert (found and str(found)) == before


def test_waits_for_everybody_without_a_deadline():
    state = add(exchange(), "A")
    assert state.waiting_for == ("B",)
    assert not may_close(state, now=1e9)
    assert due_at(state) is None
    assert may_close(add(state, "B"), now=0)


def test_closes_at_the_deadline_with_its_quorum():
    state = exchange(sites=("A", "B", "C"), quorum=2, deadline_s=10)
    state = add(state, "C", now=100)
    assert not may_close(state, now=1000)  # one of two
    state = add(state, "A", now=105)
    assert due_at(state) == 110
    assert not may_close(state, now=109.9)
    assert may_close(state, now=110)
    outcome = close_with(state, now=110).outcome
    assert (outcome.contributors, outcome.missing) == (("A", "C"), ("B",))


def test_a_quorum_after_the_deadline_closes_at_once():
    state = add(exchange(sites=("A", "B", "C"), quorum=2, deadline_s=10), "C", now=100)
    assert may_close(add(state, "B", now=150), now=150)


def test_initial_weights_wait_for_their_owners():
    state = fresh_exchange(
        parse_key("runs/r/initial"), make_settings(sites=("A", "B", "C"), quorum=1, deadline_s=10), required=("B",)
    )
    state = add(state, "A", now=0)
    assert not may_close(state, now=1000)
    assert may_close(add(state, "B", now=5), now=10)


@pytest.mark.parametrize("key", ["fingerprint/census", "fingerprint/fine", "plans/p", "runs/r/registration"])
def test_statistics_plans_and_matches_never_close_without_everybody(key):
    state = add(exchange(key, sites=("A", "B", "C"), quorum=1, deadline_s=1), "A")
    assert not may_close(state, now=1e9)


def test_the_same_again_changes_nothing():
    state = add(exchange(), "A")
    assert judge(state, "A", D1) is Verdict.SAME
    assert judge(close_with(add(state, "B"), 0), "A", D1) is Verdict.SAME


def test_the_first_weights_stay():
    state = add(exchange(), "A")
    assert judge(state, "A", D2) is Verdict.KEEP_FIRST
    assert judge(close_with(add(state, "B"), 0), "A", D2) is Verdict.KEEP_FIRST


def test_weights_that_come_too_late_do_not_count():
    state = close_with(add(exchange(), "A"), 0)
    assert judge(state, "B", D2) is Verdict.KEEP_FIRST


def test_statistics_may_be_corrected_until_they_are_closed():
    state = add(exchange("fingerprint/coarse"), "A")
    assert judge(state, "A", D2) is Verdict.STORE
    with pytest.raises(RefusedError, match="closed.*differs"):
        judge(close_with(add(state, "B"), 0), "A", D2)
    census = close_with(add(add(exchange("fingerprint/census"), "A"), "B"), 0)
    assert judge(census, "A", D2) is Verdict.COMPARE, "it is small: what differs can be named"


def test_a_refused_gathering_opens_again_with_a_correction():
    state = refuse_with(
        add(add(exchange("fingerprint/census"), "A"), "B"), RefusedError("labels differ", "fix it"), now=1
    )
    assert not may_close(state, now=2)
    assert judge(state, "A", D1) is Verdict.SAME
    assert judge(state, "A", D2) is Verdict.STORE
    corrected = add(state, "A", D2)
    assert corrected.outcome is None
    assert may_close(corrected, now=2)


def test_of_a_refused_gathering_the_first_weights_do_not_stay():
    state = refuse_with(add(add(exchange(), "A"), "B"), RefusedError("they differ"), now=1)
    assert judge(state, "A", D1) is Verdict.SAME
    assert judge(state, "A", D2) is Verdict.STORE


def test_strangers_are_refused():
    with pytest.raises(RefusedError, match="site X does not take part"):
        judge(exchange(), "X", D1)


def finish(book: ExchangeRegistry, key: str) -> None:
    state = book.begin(parse_key(key))
    for site in state.expected:
        state = add(state, site)
    book.put(close_with(state, 0))


def test_gatherings_begin_in_order():
    book = ExchangeRegistry(make_settings())
    with pytest.raises(RefusedError, match="cannot begin before runs/r/registration is closed"):
        book.begin(parse_key("runs/r/initial"))
    finish(book, "runs/r/registration")
    book.begin(parse_key("runs/r/initial"))


def test_a_run_counts_its_rounds():
    book = ExchangeRegistry(make_settings(num_epochs=2))
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
    book = ExchangeRegistry(make_settings(sites=("A", "B", "C"), quorum=2, deadline_s=10))
    finish(book, "runs/r/registration")
    finish(book, "runs/r/initial")
    book.put(add(add(exchange(sites=("A", "B", "C"), quorum=2, deadline_s=10), "A", now=100), "B", now=101))
    assert book.next_due() == 110
    book.restarted(now=5000)
    assert book.next_due() == 5010
    assert not book.ready(now=5009)
    assert [str(ready.key) for ready in book.ready(now=5010)] == ["runs/r/rounds/0"]


def started_book(*sites: str, **settings) -> ExchangeRegistry:
    book = ExchangeRegistry(make_settings(sites=sites, **settings))
    finish(book, "runs/r/registration")
    finish(book, "runs/r/initial")
    return book


def contribute(book: ExchangeRegistry, key: str, site: str, now=0.0) -> None:
    book.put(add(book.begin(parse_key(key)), site, now=now))


def ready(book: ExchangeRegistry, now=0.0) -> list[str]:
    return [str(one.key) for one in book.ready(now)]


def test_a_site_that_has_left_is_not_waited_for():
    book = started_book("A", "B", "C")
    contribute(book, "runs/r/rounds/0", "A")
    contribute(book, "runs/r/rounds/0", "B")
    assert not ready(book)
    book.controls["r"] = RunControl(left=frozenset("C"))
    assert ready(book) == ["runs/r/rounds/0"]
    assert book.run_state("r").members == ("A", "B")
    book.controls["r"] = RunControl()
    assert not ready(book)


def test_a_revoked_site_does_not_count_any_more():
    book = started_book("A", "B", "C")
    for site in "AC":
        contribute(book, "runs/r/rounds/0", site)
    book.settings = make_settings(sites=("A", "B"))
    assert book.get("runs/r/rounds/0").waiting_for == ("B",)
    contribute(book, "runs/r/rounds/0", "B")
    assert close_with(book.get("runs/r/rounds/0"), 1.0).outcome.contributors == ("A", "B")


def test_a_refusal_is_about_the_sites_that_count():
    book = started_book("A", "B", "C")
    for site in "ABC":
        contribute(book, "runs/r/rounds/0", site)
    refused = refuse_with(book.get("runs/r/rounds/0"), RefusedError("C differs"), now=1.0)
    book.put(refused)
    assert not ready(book) and book.get("runs/r/rounds/0").refusal
    book.controls["r"] = RunControl(left=frozenset("C"))
    assert ready(book) == ["runs/r/rounds/0"] and not book.get("runs/r/rounds/0").refusal
    book.controls["r"] = RunControl()
    assert book.get("runs/r/rounds/0") == refused, "it is about the same contributions again"
    book.settings = make_settings(sites=("A", "B"))
    assert ready(book) == ["runs/r/rounds/0"]


def test_a_failed_site_is_dropped_out_where_a_quorum_allows_it():
    for quorum, expected in ((None, []), (2, ["runs/r/rounds/0"])):
        book = started_book("A", "B", "C", quorum=quorum, deadline_s=None if quorum is None else 1e6)
        contribute(book, "runs/r/rounds/0", "A")
        contribute(book, "runs/r/rounds/0", "B")
        book.controls["r"] = RunControl(failed={"C": 0})
        assert ready(book) == expected


def test_nothing_closes_in_a_paused_run():
    book = started_book("A", "B")
    for site in "AB":
        contribute(book, "runs/r/rounds/0", site)
    book.controls["r"] = RunControl(state="paused")
    assert not ready(book) and book.next_due() is None
    book.controls["r"] = RunControl()
    assert ready(book) == ["runs/r/rounds/0"]


def test_a_stopped_run_takes_no_more_rounds():
    book = started_book("A", "B", num_epochs=9)
    book.controls["r"] = RunControl(state="stopped")
    state = book.run_state("r")
    assert (state.state, state.closed, state.open_round) == ("stopped", True, None)


def test_a_validation_is_overtaken_by_the_next_round():
    book = started_book("A", "B")
    finish(book, "runs/r/rounds/0")
    contribute(book, "runs/r/validations/0", "A")
    assert not ready(book)
    finish(book, "runs/r/rounds/1")
    assert ready(book) == ["runs/r/validations/0"]
    assert judge(book.begin(parse_key("runs/r/validations/0")), "B", D1) is Verdict.KEEP_FIRST


def test_validations_are_closed_before_rounds_and_in_order():
    book = started_book("A", "B")
    finish(book, "runs/r/rounds/0")
    for key in ("runs/r/rounds/1", "runs/r/validations/0"):
        for site in "AB":
            contribute(book, key, site)
    assert ready(book) == ["runs/r/validations/0", "runs/r/rounds/1"]


def test_an_admitted_site_is_expected_in_the_open_round():
    book = started_book("A", "B")
    book.settings = make_settings(sites=("A", "B", "C"))
    contribute(book, "runs/r/rounds/0", "A")
    assert book.get("runs/r/rounds/0").waiting_for == ("B",)
    finish(book, "runs/r/admissions/C")
    assert book.get("runs/r/rounds/0").waiting_for == ("B", "C")
    assert book.get("runs/r/initial").expected == {"A", "B"}


def test_a_run_without_rounds_can_be_forgotten():
    book = started_book("A", "B")
    book.forget_run("r")
    assert book.runs() == [] and book.run_state("r").registered == ()


def test_a_run_is_forgotten_while_others_go_on():
    book = ExchangeRegistry(make_settings(), [exchange(f"runs/other/rounds/{number}") for number in range(1000)])
    begun = [exchange(f"runs/r{number}/registration") for number in range(50)]
    is_over, before = threading.Event(), sys.getswitchinterval()

    def go_on() -> None:
        for one in itertools.cycle(begun):
            if is_over.is_set():
                return
            book.put(one)

    thread = threading.Thread(target=go_on)
    thread.start()
    sys.setswitchinterval(1e-4)
    try:
        for number in range(300):
            book.forget_run(f"r{number % 50}")
    finally:
        is_over.set()
        sys.setswitchinterval(before)
        thread.join()


def test_a_site_that_missed_the_first_statistics_is_not_waited_for_in_the_second():
    book = ExchangeRegistry(make_settings(sites=("A", "B", "C")))
    finish(book, "fingerprint/census")
    book.settings = make_settings(sites=("A", "B"))  # C is revoked, and invited again
    finish(book, "fingerprint/coarse")
    book.settings = make_settings(sites=("A", "B", "C"))
    assert book.begin(parse_key("fingerprint/fine")).expected == {"A", "B"}
    with pytest.raises(RefusedError, match="fingerprint/coarse was closed before site C came") as info:
        judge(book.get("fingerprint/coarse"), "C", D1)
    assert info.value.code == "closed_without"
