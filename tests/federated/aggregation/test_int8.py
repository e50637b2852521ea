"""In eight bits, a quarter of the bytes travels, and what rounding takes from a round comes with the next one."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
from fake_federation import (
    RUN,
    in_threads,
    make_client,
    make_plans,
    make_registration,
    make_settings,
    make_weights,
    served,
    wait_until,
)
from frozen_federation import OPERATOR, Federation
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from patience import PATIENCE_S

from benchmarks.byte_counter import ByteCounter
from nnunetv2.federated.aggregation.codecs.int8 import (
    BLOCK,
    CHANGE,
    REST,
    Int8WithErrorFeedback,
    check_packed,
    pack,
    packed_size,
    unpack,
)
from nnunetv2.federated.commands import manifest
from nnunetv2.federated.coordinator.storage.store import Store
from nnunetv2.federated.errors import AggregationError, PrecisionError, WireError
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.api import RunAction
from nnunetv2.federated.protocol.document import TensorSpec, file_digest, open_document, write_document
from nnunetv2.federated.protocol.keys import AdmissionKey, InitialKey, RoundKey
from nnunetv2.federated.protocol.rounds import Rounds
from nnunetv2.federated.site.participant import Participant
from nnunetv2.federated.site.planned_documents import training_documents

LARGE = {"encoder.weight": (512, 300), "encoder.bias": (512,), "head.weight": (40, 512)}
NO_METRICS = messages.Update()


# --------------------------------------------------------------------------------------------------------- arithmetic
@given(arrays(np.float32, st.integers(0, 40), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False)))
@settings(max_examples=50)
def test_values_come_back_within_half_a_step(values):
    found = unpack(pack(values), values.shape)
    largest = np.abs(values).max(initial=0)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, values, rtol=0, atol=float(largest) / 127 / 2 * 1.001 + 1e-36)
    np.testing.assert_allclose(unpack(pack(found), found.shape), found, rtol=1e-6, atol=1e-36)  # nothing more is lost


def test_each_block_has_a_step_of_its_own():
    values = np.concatenate([np.full(BLOCK, 1e-6), np.full(BLOCK, 1e3), [-5e-3]]).astype(np.float32).reshape(1, -1)
    assert pack(values).size == packed_size(values.size) == values.size + 3 * 4
    np.testing.assert_allclose(unpack(pack(values), values.shape), values, rtol=1e-6)


@pytest.mark.parametrize("values", [np.zeros(5, np.float32), np.float32([1e-45, 0]), np.empty((2, 0), np.float32)])
def test_nothing_is_nothing(values):
    np.testing.assert_array_equal(unpack(pack(values), values.shape), np.zeros(values.shape))


def test_what_is_not_finite_does_not_travel():
    codec = Int8WithErrorFeedback()
    codec.receive({"w": np.float32([-3e38])})
    with np.errstate(over="ignore"), pytest.raises(PrecisionError, match="tensor w: a change of infinite size"):
        codec.encode({"w": np.float32([3e38])})


LARGEST = np.finfo(np.float32).max


def of_step(step, *steps) -> np.ndarray:
    """Return one block as a stranger may send it."""
    return np.concatenate([np.array([step], "<f4").view(np.int8), np.int8(steps)])


@pytest.mark.parametrize("step", [np.nan, np.inf, -1.0, 3e38, LARGEST / np.float32(127)])
def test_steps_of_a_stranger_are_checked(step):
    with pytest.raises(WireError, match="tensor w has a step of"):
        check_packed("w", of_step(step, 1, 2))


def test_what_passes_the_check_is_finite_and_the_largest_values_do():
    packed = pack(np.float32([LARGEST, -LARGEST]))
    check_packed("w", packed)
    np.testing.assert_allclose(unpack(packed, (2,)), [LARGEST, -LARGEST], rtol=1e-6)
    with pytest.raises(WireError, match="tensor w has a value of -128 steps"):
        check_packed("w", of_step(1, 0, -128))


def test_an_average_does_not_become_infinite_and_the_one_before_stays():
    codec, change = Int8WithErrorFeedback(), pack(np.full(3, LARGEST))
    codec.receive({"v": np.zeros(3, np.float32), "w": np.full(3, LARGEST)})
    with pytest.raises(WireError, match="tensor w of the coordinator's aggregate changes to infinity"):
        codec.receive({"v": change, "w": change})
    assert not codec.receive({"v": pack(np.zeros(3, np.float32))})["v"].any()


def test_the_site_that_moves_furthest_is_named_where_a_mean_becomes_infinite(tmp_path):
    before = write(tmp_path / "before", messages.Aggregate(round=0, contributors={}), {"w": np.float32([LARGEST])})
    paths = {
        site: write(tmp_path / site, NO_METRICS, {"w": pack(np.float32([size]))})
        for site, size in (("A", 1), ("B", 1e38))
    }
    with pytest.raises(AggregationError, match="tensor w: the mean is not finite; the update of site B moves furthest"):
        combine(paths, before, tmp_path / "result")


def test_small_steps_add_up_at_the_site_and_at_the_coordinator(tmp_path):
    """One weight moves by 1, the other by an eighth of a step of that: after 50 rounds it has moved 50 times."""
    sites = [Int8WithErrorFeedback() for _ in "AB"]
    step = np.float32([1, 1e-3])
    weights = np.zeros(2, np.float32)
    last = write(tmp_path / "initial", messages.Aggregate(round=None, contributors={}), {"w": weights})
    for codec in sites:
        codec.receive({"w": weights})
    for number in range(50):
        paths = {}
        for name, codec in zip("AB", sites):
            paths[name] = write(tmp_path / name, NO_METRICS, codec.encode({"w": weights + step}))
            codec.settle()
        result = tmp_path / f"result_{number}"
        combine(paths, last, result)
        last = result
        weights = download(result, sites)
    # one step of rounding at most is due on each way
    np.testing.assert_allclose(weights, 50 * step, rtol=0, atol=1.1 / 127)
    assert weights[1] > 0.04


def write(path, message, tensors):
    write_document(path, message, {name: TensorSpec.of(values) for name, values in tensors.items()}, tensors.values())
    return path


def combine(paths, last, result, min_sites=1):
    with open_document(last) as previous, open_document(paths["A"]) as a, open_document(paths["B"]) as b:
        message = messages.Aggregate(round=0, contributors={"A": 1.0, "B": 1.0})
        return Int8WithErrorFeedback().combine(
            {"B": b, "A": a},
            {"A": 1.0, "B": 1.0},
            out_path=result,
            message=message,
            previous=previous,
            min_sites=min_sites,
        )


def download(result, codecs):
    """Return what all sites have, from changes, and check that it is what a site downloads whole."""
    with open_document(result) as kept:
        received = [codec.receive(sent_of(kept, whole=False))["w"] for codec in codecs]
        whole = sent_of(kept, whole=True)["w"]
    assert whole.dtype == np.float32 and all(np.array_equal(whole, one) for one in received)
    return whole


def sent_of(kept, *, whole: bool):
    path = kept.path.with_name("sent")
    Int8WithErrorFeedback().write_for_site(kept, path, ["w"], whole=whole)
    with open_document(path) as sent:
        assert sent.specs.keys() == {"w"} and sent.spec("w").dtype == ("F32" if whole else "I8")
        return {"w": np.array(sent.read("w"))}


def test_a_tensor_of_too_few_sites_keeps_its_value_and_what_is_due(tmp_path):
    before = write(
        tmp_path / "before",
        messages.Aggregate(round=0, contributors={}),
        {"v": np.float32([4]), f"v{CHANGE}": pack(np.float32([1])), f"v{REST}": np.float32([0.25])},
    )
    paths = {site: write(tmp_path / site, NO_METRICS, {"v": pack(np.float32([1]))}) for site in "AB"}
    done = combine(paths, before, tmp_path / "result", min_sites=3)
    with open_document(tmp_path / "result") as result:
        assert done.kept == ("v",) and result.read("v").tolist() == [4]
        assert result.read(f"v{REST}").tolist() == [0.25]
        assert unpack(result.read(f"v{CHANGE}"), (1,)).tolist() == [0]


def test_a_change_of_what_a_site_has_not_got_is_refused():
    with pytest.raises(WireError, match="which this site has not got"):
        Int8WithErrorFeedback().receive({"w": pack(np.float32([1]))})


# --------------------------------------------------------------------------------------------------------- coordinator
@pytest.fixture
def make_federation(tmp_path):
    made = []

    def make(folder="federation", **options) -> Federation:
        options = {"sites": ("A", "B"), "num_epochs": 5, "precision": "int8", **options}
        made.append(Federation(tmp_path / folder, **options))
        return made[-1]

    yield make
    for federation in made:
        federation.store.close()


def packed(seed: int) -> dict[str, np.ndarray]:
    return {name: pack(values) for name, values in make_weights(seed).items()}


def send_round(federation: Federation, number: int) -> None:
    for seed, site in enumerate("AB"):
        federation.send(RoundKey(RUN, number), site, NO_METRICS, packed(10 * number + seed))


def published(federation: Federation, key: str, site: str = "A", *, changes: bool = True) -> str:
    result = federation.coordinator.result(key, site, changes=changes)
    assert result.digest == file_digest(result.path)
    return result.digest


def test_a_site_that_has_the_average_before_downloads_changes_and_others_all(make_federation):
    federation = make_federation()
    federation.start("A", "B")
    send_round(federation, 0)
    for changes, dtype in ((True, "I8"), (False, "F32")):
        with open_document(federation.coordinator.result(RoundKey(RUN, 0), "A", changes=changes).path) as sent:
            assert {spec.dtype for spec in sent.specs.values()} == {dtype}
            assert sent.specs.keys() == make_weights(0).keys()
    with open_document(federation.coordinator.result(InitialKey(RUN), "A", changes=True).path) as sent:
        assert {spec.dtype for spec in sent.specs.values()} == {"F32"}


def test_changes_go_to_those_alone_who_have_what_they_lead_on_from(make_federation):
    federation = make_federation()
    federation.start("A", "B")
    forms = {}
    for number in range(2):
        send_round(federation, number)
        before = RoundKey(RUN, number - 1) if number else InitialKey(RUN)
        for changes in (True, False):
            since = federation.coordinator.result(before, "A", changes=changes).digest
            result = federation.coordinator.result(RoundKey(RUN, number), "A", changes=True, since=since)
            with open_document(result.path) as sent:
                forms[number, changes] = {spec.dtype for spec in sent.specs.values()}
        result = federation.coordinator.result(RoundKey(RUN, number), "A", changes=True, since="0" * 64)
        with open_document(result.path) as sent:
            assert {spec.dtype for spec in sent.specs.values()} == {"F32"}
    assert set(map(frozenset, forms.values())) == {frozenset({"I8"})}


def test_a_site_without_which_a_round_was_closed_downloads_the_whole_average(make_federation):
    federation = make_federation(sites=("A", "B", "C"), quorum=2, deadline_s=10.0)
    federation.start("A", "B", "C")
    for number in range(2):
        for seed, site in enumerate("AB"):
            federation.send(RoundKey(RUN, number), site, NO_METRICS, packed(seed))
        federation.now += 11
        federation.close()
    # C asks for what its update of the first round has become, and gets the average of the second.
    with open_document(federation.coordinator.result(RoundKey(RUN, 0), "C", changes=True).path) as sent:
        assert sent.message.round == 1
        assert {spec.dtype for spec in sent.specs.values()} == {"F32"}


def test_a_newcomer_goes_on_from_the_whole_average(make_federation):
    federation = make_federation()
    federation.start("A", "B")
    send_round(federation, 0)
    federation.coordinator.invite("C", "site", by="boss")
    federation.send(AdmissionKey(RUN, "C"), "C", make_registration(7))
    assert published(federation, RoundKey(RUN, 0), "C", changes=False) == published(
        federation, RoundKey(RUN, 0), "A", changes=False
    )


@pytest.mark.parametrize("step", ["save_contribution", "save_closing", "save_subset", "delete_results"])
def test_a_crash_changes_no_byte(make_federation, monkeypatch, step):
    undisturbed, federation = make_federation("undisturbed"), make_federation("mortal")
    for one in (undisturbed, federation):
        one.start("A", "B")
        send_round(one, 0)

    def die(*_, **__):
        raise SystemExit

    for number in (1, 2):
        send_round(undisturbed, number)
        expected = published(undisturbed, RoundKey(RUN, number))
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(Store, step, die)
            send_round(federation, number)
            published(federation, RoundKey(RUN, number))
            raise SystemExit  # nothing was deleted yet
        federation.store.close()
        federation = make_federation("mortal")
        federation.close()
        send_round(federation, number)
        assert published(federation, RoundKey(RUN, number)) == expected


@pytest.mark.parametrize(
    ("update", "complaint"),
    [
        (make_weights(0), r"tensor \S+ travels as I8 in this federation, not as F32"),
        (
            {**packed(0), "encoder.bias": of_step(np.nan, *[0] * 4)},
            "update of site A cannot be right: tensor encoder.bias has a step of nan",
        ),
        ({**packed(0), "encoder.bias": of_step(1, *[-128] * 4)}, "site A .* encoder.bias has a value of -128 steps"),
    ],
)
def test_an_update_of_another_form_is_refused(make_federation, update, complaint):
    federation = make_federation()
    federation.start("A", "B")
    with pytest.raises(WireError, match=complaint):
        federation.send(RoundKey(RUN, 0), "A", NO_METRICS, update)


# --------------------------------------------------------------------------------------------------------------- sites
def take_part(credential, *, seed: int, num_rounds: int, is_mortal=False) -> tuple[dict[str, np.ndarray], int]:
    """Move towards weights of one's own; return the last aggregate, and the bytes that travelled in its round.

    Args:
        is_mortal: Start again before every round, with the rests of a checkpoint.
    """
    goal, port = make_weights(seed, LARGE), int(credential.url.rpartition(":")[2])
    with (
        ByteCounter(("127.0.0.1", port)) as counter,
        make_client(replace(credential, url=f"http://127.0.0.1:{counter.port}")) as client,
    ):

        def begin(epoch: int, rests=({}, None)):
            session = Participant(client, site=credential.site, run=RUN)
            session.register(make_registration(seed + 1, LARGE, aliases={}))
            session.take_over(*rests)
            return session, session.start(epoch, make_weights(0, LARGE)).weights

        session, weights = begin(0)
        for number in range(num_rounds):
            if is_mortal and number:
                session, weights = begin(number, session.rests())
            before = sum(counter.traffic.snapshot())
            learned = {name: values + np.float32(0.1) * (goal[name] - values) for name, values in weights.items()}
            weights, _ = session.exchange(number, learned, NO_METRICS)
            bytes_of_round = sum(counter.traffic.snapshot()) - before
        return {name: np.array(values) for name, values in weights.items()}, bytes_of_round


@pytest.mark.slow
def test_two_sites_train_with_a_quarter_of_the_bytes_to_the_same_end(tmp_path):
    num_rounds, ends = 5, {}
    for name, precision, is_mortal in (("one", "float32", False), ("two", "int8", False), ("three", "int8", True)):
        with served(tmp_path / name, make_settings(num_epochs=num_rounds, precision=precision)) as federation:
            credentials = [federation.credential(site) for site in "AB"]
            ends[name] = in_threads(
                *(
                    lambda c=one, n=number, m=is_mortal: take_part(c, seed=n, num_rounds=num_rounds, is_mortal=m)
                    for number, one in enumerate(credentials)
                )
            )
            assert len(federation.state.store.load_rounds(RUN)) == num_rounds
    (single, single_bytes), (packed_end, packed_bytes) = ends["one"][0], ends["two"][0]
    assert 0.25 < packed_bytes / single_bytes < 0.26
    for name, values in single.items():
        assert packed_end[name].dtype == np.float32
        np.testing.assert_array_equal(packed_end[name], ends["two"][1][0][name])
        np.testing.assert_allclose(packed_end[name], values, rtol=0, atol=0.02 * np.abs(values).max())
        np.testing.assert_array_equal(ends["three"][0][0][name], packed_end[name])  # with the rests of a checkpoint


@pytest.mark.slow
def test_the_log_says_what_travels(tmp_path):
    for precision, bytes_per_value in (("float32", 4), ("float16", 2), ("int8", 1)):
        with (
            served(tmp_path / precision, make_settings(sites=("A", "B"), precision=precision)) as federation,
            make_client(federation.credential("A")) as one,
            make_client(federation.credential("B")) as two,
        ):
            sessions = [Participant(client, site=client.credential.site, run=RUN) for client in (one, two)]
            in_threads(*(lambda s=session: s.register(make_registration(3, LARGE, aliases={})) for session in sessions))
            values = sum(np.prod(shape) for shape in LARGE.values())
            assert sessions[0].megabytes == pytest.approx(values * bytes_per_value / 1e6, rel=0.002)


def test_a_site_that_goes_on_within_a_round_sends_the_change_of_the_average_before(tmp_path):
    settings = make_settings(num_epochs=4, precision="int8", exchange_every=2)
    with served(tmp_path / "federation", settings) as federation:
        own = make_weights(5, LARGE)

        def site(name: str, seed: int):
            with make_client(federation.credential(name)) as client:
                session = Participant(client, site=name, run=RUN)
                session.register(make_registration(seed, LARGE, aliases={}))
                start = session.start(0, make_weights(0, LARGE)).weights
                again = Participant(client, site=name, run=RUN)
                again.register(make_registration(seed, LARGE, aliases={}))
                position = again.start(1, own, rounds=Rounds(2))
                assert position.epoch == 1 and position.is_within
                np.testing.assert_array_equal(position.weights["encoder.bias"], start["encoder.bias"])
                return start, again.exchange(0, own, NO_METRICS)[0]

        (start, end), (_, other) = in_threads(lambda: site("A", 1), lambda: site("B", 2))
        for name, values in own.items():
            np.testing.assert_array_equal(end[name], other[name])
            largest = np.abs(values - start[name]).max()
            np.testing.assert_allclose(end[name], values, rtol=0, atol=largest / 127)


@pytest.mark.slow
def test_a_site_never_adds_changes_to_another_average_than_they_lead_on_from(tmp_path):
    """A coordinator is restored from a backup of an open round, and closes it anew with another site.

    A, which goes on in its process, has the average of the first closing. It gets the whole next one.
    """
    settings = make_settings(sites=("A", "B", "C"), num_epochs=6, precision="int8")
    folder, sites, weights = tmp_path / "federation", {}, {}

    def connect(federation, names, *, anew: bool):
        for name in names:
            client = make_client(replace(credentials[name], url=federation.url))
            if anew:
                sites[name] = Participant(client, site=name, run=RUN)
            else:
                sites[name].transport = client

    def begin(name):
        sites[name].register(make_registration(ord(name), LARGE, aliases={}))
        weights[name] = sites[name].start(0, make_weights(0, LARGE)).weights

    def train(name, number):
        shift = np.float32(0.01 * (ord(name) - 60) * (number + 1))
        learned = {key: np.asarray(values) * np.float32(0.9) + shift for key, values in weights[name].items()}
        weights[name], aggregate = sites[name].exchange(number, learned, NO_METRICS)
        return sorted(aggregate.contributors)

    def train_without_the_third(federation, names):
        def proceed():
            state = federation.state
            wait_until(lambda: state.registry.has_begun(str(RoundKey(RUN, 0))))
            wait_until(lambda: len(state.registry.get(RoundKey(RUN, 0)).contributions) == 2)
            federation.coordinator.act(RUN, RunAction(action="proceed"), OPERATOR)

        found = in_threads(*(lambda name=name: train(name, 0) for name in names), proceed)
        assert found[:2] == [names, names]

    with served(folder, settings) as federation:
        credentials = {name: federation.credential(name) for name in "ABC"}
        connect(federation, "ABC", anew=True)
        in_threads(*(lambda name=name: begin(name) for name in "ABC"))
    shutil.copytree(folder, tmp_path / "backup")
    with served(folder, settings) as federation:
        connect(federation, "ABC", anew=False)
        train_without_the_third(federation, ["A", "B"])
    with served(tmp_path / "backup", settings) as federation:
        connect(federation, "A", anew=False)
        connect(federation, "BC", anew=True)
        in_threads(*(lambda name=name: begin(name) for name in "BC"))
        train_without_the_third(federation, ["B", "C"])
        for number in (1, 2):
            in_threads(*(lambda name=name: train(name, number) for name in "ABC"))  # noqa: B023
            for key, values in weights["B"].items():
                np.testing.assert_array_equal(weights["A"][key], values)
                np.testing.assert_array_equal(weights["C"][key], values)


@pytest.mark.slow
def test_what_rounding_took_is_brought_once_whenever_a_site_was_ended(tmp_path):
    """Its checkpoint is from before the round; the update of the round counted, or another one of an earlier life."""
    settings = make_settings(num_epochs=4, precision="int8")
    with served(tmp_path / "federation", settings) as federation:
        learned = [make_weights(seed, LARGE) for seed in (7, 8, 9)]
        has_died = threading.Event()

        def begin(client, seed: int, epoch: int, rests=({}, None)):
            session = Participant(client, site=client.credential.site, run=RUN)
            session.register(make_registration(seed, LARGE, aliases={}))
            session.take_over(*rests)
            session.start(epoch, make_weights(0, LARGE))
            return session

        def mortal():
            with make_client(federation.credential("A")) as client:
                session = begin(client, 1, 0)
                session.exchange(0, learned[0], NO_METRICS)
                saved = session.rests()
                assert any(values.any() for values in saved[0].values())
                session.exchange(1, learned[1], NO_METRICS)
                after_the_round = begin(client, 1, 1, saved).rests()
                # The next update leaves, and the site does not live to see that it counts.
                saved = session.rests()
                sent = session._codec.encode(session._under_canonical_names(learned[2], session.local_names))
                client.contribute(RoundKey(RUN, 2), NO_METRICS, sent)
                again = begin(client, 1, 2, saved)
                kept = again.rests()
                has_died.set()
                again.exchange(2, learned[0], NO_METRICS)  # which is dropped
                return after_the_round, saved, kept, again.rests()

        def other():
            with make_client(federation.credential("B")) as client:
                session = begin(client, 2, 0)
                for number in (0, 1):
                    session.exchange(number, learned[0], NO_METRICS)
                assert has_died.wait(PATIENCE_S)
                session.exchange(2, learned[0], NO_METRICS)

        (after_the_round, saved, kept, end), _ = in_threads(mortal, other)
    assert after_the_round == ({}, 1)  # the update of round 1 has brought them
    assert saved[1] == kept[1] == 2 and kept[0].keys() == saved[0].keys()  # nobody knows yet whether it counts
    assert end == ({}, 3)


@pytest.mark.parametrize(
    ("last", "sites", "is_due"), [(0, "AB", True), (1, "AB", False), (1, "BC", True), (3, "BC", False)]
)
def test_rests_are_not_due_any_more_when_their_update_may_have_come(last, sites, is_due):
    """The rests of a checkpoint were to come with the update of round 1."""
    session = Participant(None, site="A", run=RUN)
    session._codec = Int8WithErrorFeedback()
    session._codec.take_over({"w": np.ones(3, np.float32)})
    session._rests_due = 1
    session._drop_rests_that_came(messages.Aggregate(round=last, contributors=dict.fromkeys(sites, 1.0)))
    assert bool(session.rests()[0]) is is_due


def test_a_tensor_without_an_axis_travels(tmp_path):
    codec, value = Int8WithErrorFeedback(), np.array(0.5, np.float32)
    codec.receive({"w": value})
    for _ in range(2):
        sent = codec.encode({"w": value + np.float32(0.25)})
        codec.settle()
        assert codec.rests()["w"].shape == () and isinstance(codec.rests()["w"], np.ndarray)
        (received,) = codec.receive(sent).values()
        assert isinstance(received, np.ndarray) and received.shape == ()
        value = received


def test_the_manifest_lists_what_travels():
    options = {"metrics": ("val_losses",), "later_metrics": (), "num_classes": 2}
    documents = training_documents(make_registration(plans=make_plans()), precision="int8", **options)
    assert "encoder.weight  I8[16]  16 bytes" in "\n".join(manifest.describe(documents, None))
