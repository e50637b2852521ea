"""In half precision, half the bytes travel, and what rounding takes from a round comes with the next one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fake_federation import (
    RUN,
    SHAPES,
    in_threads,
    make_client,
    make_plans,
    make_registration,
    make_settings,
    make_weights,
    served,
)
from frozen_federation import Federation
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from benchmarks.byte_counter import ByteCounter
from nnunetv2.federated.aggregation.codecs import float16
from nnunetv2.federated.aggregation.codecs.float16 import Float16WithErrorFeedback, rest_of, rounded
from nnunetv2.federated.aggregation.weighted_mean import aggregate_documents
from nnunetv2.federated.commands import manifest
from nnunetv2.federated.coordinator.storage.store import Store
from nnunetv2.federated.errors import PrecisionError, WireError
from nnunetv2.federated.exchanges.steps.registration import match_registrations
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.api import SettingsChange
from nnunetv2.federated.protocol.document import TensorSpec, file_digest, open_document, write_document
from nnunetv2.federated.protocol.invitation import Invitation
from nnunetv2.federated.protocol.keys import AdmissionKey, InitialKey, RoundKey
from nnunetv2.federated.site.credential import load_credential
from nnunetv2.federated.site.enrolment import join
from nnunetv2.federated.site.participant import Participant
from nnunetv2.federated.site.planned_documents import training_documents
from nnunetv2.training.nnUNetTrainer.variants.federated.overlapped_training import catch_up

LARGE = {"encoder.weight": (512, 300), "encoder.bias": (512,), "head.weight": (40, 512)}
NO_METRICS = messages.Update()
SINGLES = st.floats(-60000, 60000, width=32)


# --------------------------------------------------------------------------------------------------------- arithmetic
def test_values_are_rounded_to_the_nearest():
    values = np.float32([1, 1 + 2**-11, 1 + 3 * 2**-11, -65504, 65519.9, 2**-24, 2**-26, 0])
    assert rounded(values).tolist() == [1, 1, 1 + 2**-9, -65504, 65504, 2**-24, 0, 0]
    assert rest_of(values).tolist() == [0, 2**-11, -(2**-11), 0, np.float32(65519.9) - 65504, 0, 2**-26, 0]
    assert rounded(np.empty((2, 0), np.float32)).shape == (2, 0)


@pytest.mark.slow
@given(SINGLES)
def test_a_value_is_its_rounding_and_the_rest_exactly(value):
    value = np.float32([value])
    assert float(rounded(value)[0]) + float(rest_of(value)[0]) == float(value[0])


@pytest.mark.parametrize("value", [65520.0, -65520.0, 3e38])
def test_what_is_too_large_is_named_and_never_becomes_infinite(value):
    with pytest.raises(PrecisionError, match=r"tensor w: a value of size [\d.e+]+ does not fit.*--precision float32"):
        Float16WithErrorFeedback().encode({"v": np.float32([1]), "w": np.float32([1, value])})


# ----------------------------------------------------------------------------------------------------- error feedback
@settings(max_examples=80, deadline=None)
@given(arrays(np.float32, st.tuples(st.integers(1, 30), st.just(4)), elements=SINGLES))
def test_all_that_is_sent_adds_up_to_all_weights_within_one_rounding(weights):
    feedback, total = Float16WithErrorFeedback(), np.zeros(4)
    for values in weights:
        total += feedback.encode({"w": values})["w"]
        feedback.settle()
    one_rounding = 16.0  # half a unit in the last place of the largest; and of float32 in every round
    assert np.all(np.abs(total - weights.sum(axis=0, dtype=np.float64)) <= one_rounding + len(weights) * 2**-8)


def test_an_update_is_the_same_until_it_counts():
    feedback, weights = Float16WithErrorFeedback(), {"w": np.float32([1 + 2**-11 - 2**-20])}
    first, again = feedback.encode(weights)["w"], feedback.encode(weights)["w"]
    assert first.tolist() == again.tolist() == [1]
    feedback.settle()
    assert feedback.encode(weights)["w"].tolist() == [1 + 2**-10]


def train_in_steps(folder, step: float, *, num_rounds: int, with_feedback: bool = True) -> tuple[float, float]:
    """Let two sites add a step to a weight of 1 in every round; return what they end with, and what is kept."""
    sites = {"A": Float16WithErrorFeedback(), "B": Float16WithErrorFeedback()}
    weight = np.float32([1.0])
    specs = {"w": TensorSpec("F32", (1,))}
    write_document(folder / "-1", messages.Aggregate(round=None, contributors={}), specs, [weight])
    for number in range(num_rounds):
        for factor, (site, feedback) in zip((0.5, 1.5), sites.items()):
            sent = feedback.encode({"w": weight.astype(np.float32) + np.float32(factor * step)})
            if with_feedback:
                feedback.settle()
            write_document(folder / site, messages.Update(), float16.narrowed(specs), sent.values())
        with (
            open_document(folder / "A") as a,
            open_document(folder / "B") as b,
            open_document(folder / str(number - 1)) as previous,
        ):
            aggregate_documents(
                {"A": a, "B": b},
                {"A": 1, "B": 1},
                out_path=folder / str(number),
                handout=Float16WithErrorFeedback(),
                message=messages.Aggregate(round=number, contributors={"A": 1, "B": 1}),
                previous=previous if with_feedback else None,
            )
        with open_document(folder / str(number)) as result:
            kept = result.read("w").copy()
        weight = rounded(kept)
    return float(weight[0]), float(kept[0])


@pytest.mark.slow
def test_steps_below_half_a_unit_in_the_last_place_are_not_lost(tmp_path):
    step, num_rounds = 4e-5, 50  # a unit in the last place is 98e-5 there
    weight, kept = train_in_steps(tmp_path, step, num_rounds=num_rounds)
    assert weight == pytest.approx(1 + step * num_rounds, abs=2**-10)
    assert kept == pytest.approx(1 + step * num_rounds, abs=2**-10)
    assert train_in_steps(tmp_path, step, num_rounds=num_rounds, with_feedback=False)[0] == 1


# -------------------------------------------------------------------------------------------------------- aggregation
def test_the_aggregate_is_the_mean_and_the_rest_of_the_one_before(tmp_path):
    before = make_weights(0)
    updates = {
        site: {name: rounded(values) for name, values in make_weights(seed).items()}
        for seed, site in enumerate("BA", start=1)
    }
    specs = {name: TensorSpec.of(values) for name, values in before.items()}
    write_document(tmp_path / "before", messages.Aggregate(round=None, contributors={}), specs, before.values())
    for site, update in updates.items():
        write_document(tmp_path / site, messages.Update(), float16.narrowed(specs), update.values())
    with (
        open_document(tmp_path / "before") as previous,
        open_document(tmp_path / "A") as a,
        open_document(tmp_path / "B") as b,
    ):
        done = [
            aggregate_documents(
                documents,
                {"A": 1, "B": 3},
                out_path=tmp_path / "result",
                previous=previous,
                message=messages.Aggregate(round=0, contributors={}),
                handout=Float16WithErrorFeedback(),
            )
            for documents in ({"A": a, "B": b}, {"B": b, "A": a})
        ]
    assert done[0].digest == done[1].digest
    with open_document(tmp_path / "result") as result:
        for name, values in before.items():
            mean = (updates["A"][name].astype(np.float64) + 3 * updates["B"][name].astype(np.float64)) / 4
            assert result.spec(name).dtype == "F32"
            np.testing.assert_array_equal(result.read(name), (mean + rest_of(values)).astype(np.float32))
    moved = sum(np.square(updates["A"][name].astype(np.float64) - rounded(before[name])).sum() for name in SHAPES)
    assert done[0].changes["A"].norm == pytest.approx(np.sqrt(moved))  # from what the site has downloaded


# --------------------------------------------------------------------------------------------------------- coordinator
@pytest.fixture
def make_federation(tmp_path):
    made = []

    def make(folder="federation", **options) -> Federation:
        options = {"sites": ("A", "B"), "num_epochs": 5, "precision": "float16", **options}
        made.append(Federation(tmp_path / folder, **options))
        return made[-1]

    yield make
    for federation in made:
        federation.store.close()


def in_half(seed: int) -> dict[str, np.ndarray]:
    return {name: rounded(values) for name, values in make_weights(seed).items()}


def send_round(federation: Federation, number: int) -> None:
    for seed, site in enumerate("AB"):
        federation.send(RoundKey(RUN, number), site, messages.Update(), in_half(10 * number + seed))


def published(federation: Federation, key: str, site: str = "A") -> str:
    """Return the digest of what a site downloads, which the file has too."""
    result = federation.coordinator.result(key, site)
    assert result.digest == file_digest(result.path)
    return result.digest


def test_the_default_is_what_it_was(make_federation):
    federation = make_federation(precision="float32")
    federation.start("A", "B")
    federation.update(0, "A", 1), federation.update(0, "B", 2)
    result = federation.coordinator.result(RoundKey(RUN, 0), "A")
    assert result.path.name == "result.safetensors"
    match = match_registrations({site: make_registration() for site in "AB"}, make_settings())
    for text in (match.model_dump_json(), make_settings().model_dump_json()):
        assert "precision" not in text  # older sites know no such field
    assert match.precision == "float32"


def test_sites_download_the_rounding_of_what_is_kept(make_federation):
    federation = make_federation()
    federation.start("A", "B")
    send_round(federation, 0)
    for key in (InitialKey(RUN), RoundKey(RUN, 0)):
        with (
            federation.state.documents.result(key) as kept,
            open_document(federation.coordinator.result(key, "A").path) as sent,
        ):
            assert sent.message == kept.message and sent.specs == float16.narrowed(kept.specs)
            for name, spec in kept.specs.items():
                assert spec.dtype == "F32"
                np.testing.assert_array_equal(sent.read(name), rounded(kept.read(name)))
    assert published(federation, RoundKey(RUN, 0), "A") == published(federation, RoundKey(RUN, 0), "B")


def test_a_late_site_downloads_the_same_document(make_federation):
    federation = make_federation()
    federation.start("A", "B")
    send_round(federation, 0)
    federation.coordinator.invite("C", "site", by="boss")
    federation.send(AdmissionKey(RUN, "C"), "C", make_registration(7))
    assert published(federation, RoundKey(RUN, 0), "C") == published(federation, RoundKey(RUN, 0), "A")


@pytest.mark.slow
@pytest.mark.parametrize("step", ["save_contribution", "save_closing", "save_subset", "delete_results"])
def test_a_crash_changes_no_byte(make_federation, monkeypatch, step):
    undisturbed, federation = make_federation("undisturbed"), make_federation("mortal")
    for one in (undisturbed, federation):
        one.start("A", "B")
        send_round(one, 0)

    def die(*_, **__):
        raise SystemExit

    for number in (1, 2, 3):
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


def test_the_precision_is_fixed(make_federation):
    federation = make_federation()
    assert federation.coordinator.change_settings(SettingsChange(validate_every=2), by="boss").precision == "float16"
    assert "precision" not in SettingsChange.model_fields
    assert federation.store.load_settings().precision == "float16"


@pytest.mark.parametrize(
    ("precision", "update", "complaint"),
    [
        ("float16", make_weights(0), r"tensor \S+ travels as F16 in this federation, not as F32: this site needs"),
        ("float32", in_half(0), r"tensor \S+ travels as F32 in this federation, not as F16"),
    ],
)
def test_an_update_of_another_precision_is_refused(make_federation, precision, update, complaint):
    federation = make_federation(precision=precision)
    federation.start("A", "B")
    with pytest.raises(WireError, match=complaint):
        federation.send(RoundKey(RUN, 0), "A", messages.Update(), update)


# --------------------------------------------------------------------------------------------------------------- sites
def take_part(credential, *, seed: int, num_rounds: int, shapes=LARGE) -> tuple[dict[str, np.ndarray], int]:
    """Move towards weights of one's own; return the last aggregate, and the bytes that travelled in its round."""
    goal, port = make_weights(seed, shapes), int(credential.url.rpartition(":")[2])
    with (
        ByteCounter(("127.0.0.1", port)) as counter,
        make_client(replace(credential, url=f"http://127.0.0.1:{counter.port}")) as client,
    ):
        session = Participant(client, site=credential.site, run=RUN)
        session.register(make_registration(seed + 1, shapes, aliases={}))
        weights = session.start(0, make_weights(0, shapes)).weights
        for number in range(num_rounds):
            before = sum(counter.traffic.snapshot())
            learned = {name: values + np.float32(0.1) * (goal[name] - values) for name, values in weights.items()}
            weights, _ = session.exchange(number, learned, NO_METRICS)
            bytes_of_round = sum(counter.traffic.snapshot()) - before
        return {name: np.array(values) for name, values in weights.items()}, bytes_of_round


@pytest.mark.slow
def test_two_sites_train_with_half_the_bytes_to_the_same_end(tmp_path):
    num_rounds, ends = 5, {}
    for precision in ("float32", "float16"):
        with served(tmp_path / precision, make_settings(num_epochs=num_rounds, precision=precision)) as federation:
            credentials = [federation.credential(site) for site in "AB"]
            ends[precision] = in_threads(
                *(
                    lambda c=one, n=number: take_part(c, seed=n, num_rounds=num_rounds)
                    for number, one in enumerate(credentials)
                )
            )
            records = federation.state.store.load_rounds(RUN)
            assert {record["settings"].get("precision", "float32") for record in records} == {precision}
    (single, single_bytes), (half, half_bytes) = (ends[precision][0] for precision in ("float32", "float16"))
    assert 0.5 < half_bytes / single_bytes < 0.51
    for name, values in single.items():
        assert half[name].dtype == np.float16
        np.testing.assert_array_equal(half[name], ends["float16"][1][0][name])
        np.testing.assert_allclose(half[name], values, rtol=2**-10, atol=2**-10)


def test_a_rest_waits_until_an_update_counts(tmp_path):
    class Transport:
        sent: list[float] = []
        contributors = {"b": 1.0}

        def exchange(self, key, message, tensors):
            self.sent.append(float(tensors["w"][0]))
            aggregate = messages.Aggregate(round=0, contributors=self.contributors)
            return type("Document", (), {"message": aggregate, "specs": tensors, "read": tensors.get})()

    session = Participant(transport := Transport(), site="a", run=RUN)
    session.match = messages.Match.model_construct(shared={"w": {"a": "w", "b": "w"}}, received={})
    session._codec = Float16WithErrorFeedback()
    for contributors in ({"b": 1.0}, {"a": 1.0}, {"a": 1.0}):
        transport.contributors = contributors
        session.exchange(0, {"w": np.float32([1 + 2**-12 + 2**-13])}, NO_METRICS)
    assert transport.sent == [1, 1, 1 + 2**-10]


def test_weights_that_cannot_travel_are_not_even_sent_in_the_beginning():
    session = Participant(None, site="a", run=RUN)
    session.match = messages.Match.model_construct(shared={"w": {"a": "v"}}, received={}, initial_owner={"w": "a"})
    session._codec = Float16WithErrorFeedback()
    with pytest.raises(PrecisionError, match="tensor w: a value of size 70000 "):
        session._begin({"v": np.float32([70000])}, is_registered=True)


def test_a_site_that_trains_on_meanwhile_goes_on_in_float32():
    """What it sent is what it trained on from: what rounding took is in the account, and must not come twice."""
    aggregate, own, sent = {"w": np.float16([1])}, {"w": np.float32([1.1])}, {"w": np.float32([1.05])}
    values = catch_up(aggregate, own, sent)["w"]
    assert values.dtype == np.float32 and values[0] == np.float32(1) + (np.float32(1.1) - np.float32(1.05))


def test_the_manifest_lists_what_travels(tmp_path):
    with served(tmp_path / "federation", make_settings(precision="float16")) as federation:
        path = tmp_path / "site.json"
        join(Invitation(federation.url, "test", "A", federation.invitations()["A"]), path=path)
        assert load_credential(path).precision == "float16"
        assert federation.credential("B").precision == "float16"
    options = {"metrics": ("val_losses",), "later_metrics": (), "num_classes": 2}
    half, single = (
        training_documents(make_registration(plans=make_plans()), precision=precision, **options)
        for precision in ("float16", "float32")
    )
    sizes = [[document.size for document in documents if document.kind == "update"] for documents in (half, single)]
    assert sizes[0][0] == sizes[1][0] and sizes[0][1] == sizes[1][1] - 48  # of 96 bytes of tensors
    text = "\n".join(manifest.describe(half, None))
    assert "encoder.weight  F16[4, 3]  24 bytes" in text and "encoder.weight  F32[4, 3]  48 bytes" in text
