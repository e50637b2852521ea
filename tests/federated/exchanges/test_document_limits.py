"""Documents whose JSON is meant to hurt who reads it, and the largest that honest sites send."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import requests
from fake_federation import RUN, SHAPES, make_census, make_plans, make_registration, make_settings, make_weights, served

from nnunetv2.federated.coordinator.service import Result
from nnunetv2.federated.errors import FederationError, WireError
from nnunetv2.federated.exchanges.document_limits import (
    AGGREGATE,
    PLANS,
    REGISTRATION,
    SMALL,
    coarse_limits,
    weights_limits,
)
from nnunetv2.federated.exchanges.steps import step_of
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.document import Limits, TensorSpec, encode_header, open_document
from nnunetv2.federated.protocol.keys import (
    CensusKey,
    CoarseKey,
    FineKey,
    InitialKey,
    PlansKey,
    RegistrationKey,
    RoundKey,
)
from nnunetv2.federated.protocol.strict_json import MAX_DIGITS, count_elements, parse_json
from nnunetv2.federated.site.transports.http_requests import LARGEST_ANSWER, read_small

TIGHT = Limits(header_bytes=4000, elements=100)
REPORT = '{"protocol":1,"kind":"plans_report","plans":{"x":%s}}'


def raw(message: str) -> bytes:
    """Return a document with any text as its message."""
    header = json.dumps({"__metadata__": {"message": message}}).encode()
    return len(header).to_bytes(8, "little") + header


def read(folder, content: bytes, limits: Limits):
    """Open a document, and return its message."""
    path = folder / "document"
    path.write_bytes(content)
    with open_document(path, limits=limits) as document:
        return document.message


# --------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("json_text", "complaint"),
    [
        ("[" + ",".join(["[]"] * 60) + "]", "126 brackets and commas"),
        ("[" + ",".join(['{"":0}'] * 60) + "]", "brackets and commas, at most 100"),
        ("{" + ",".join(f'"{number}":0' for number in range(110)) + "}", "brackets and commas"),
        ("[" * 101 + "]" * 101, "brackets and commas"),
        ("[" * 70 + "]" * 70, "nested more than 64 deep"),
        ("1" * 401, "has 401 digits, at most 400"),
        ("-0." + "1" * 401, "digits, at most 400"),
        ("1e" + "9" * 401, "digits, at most 400"),
        ('"' + "a" * 4000 + '"', "the header has"),
        (" " * 4000 + "0", "the header has"),
    ],
)
def test_what_is_built_from_a_document_is_bounded_before_it_is_built(tmp_path, json_text, complaint):
    with pytest.raises(WireError, match=complaint):
        read(tmp_path, raw(REPORT % json_text), TIGHT)


def test_brackets_cannot_hide_in_the_escapes_of_the_header(tmp_path):
    text = REPORT % ("[" + ",".join(["[]"] * 90) + "]")
    hidden = "".join(rf"\u{ord(one):04x}" if one in "[]{}," else json.dumps(one)[1:-1] for one in text)
    header = ('{"__metadata__":{"message":"' + hidden + '"}}').encode()
    assert count_elements(header) < 5
    with pytest.raises(WireError, match="the message has 18"):
        read(tmp_path, len(header).to_bytes(8, "little") + header, TIGHT)


def test_what_is_within_the_limits_is_read(tmp_path):
    assert read(tmp_path, raw(REPORT % "[[],[[]],{},-1.5e3,12]"), TIGHT).plans == {"x": [[], [[]], {}, -1500.0, 12]}
    assert parse_json("9" * MAX_DIGITS, what="it") == int("9" * MAX_DIGITS)


def test_faults_are_not_collected_by_the_thousand(tmp_path):
    fields = ",".join(f'"unknown{number}":0' for number in range(5000))
    with pytest.raises(WireError, match="5001 values are not what they should be"):
        read(tmp_path, raw(f'{{"protocol":1,"kind":"plans_report",{fields}}}'), PLANS)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"tensors": [[]] * 5000}, r"registration\.tensors\.0"),
        ({"aliases": {f" {number}": "w" for number in range(5000)}}, "' 0' is no name of a tensor"),
        ({"aliases": {f"a{number}": number for number in range(5000)}}, "0 is no name of a tensor"),
    ],
)
def test_the_first_fault_of_a_long_list_is_told(tmp_path, change, complaint):
    content = {**json.loads(make_registration().model_dump_json()), **change}
    with pytest.raises(WireError, match=complaint):
        read(tmp_path, raw(json.dumps(content)), REGISTRATION)


def test_labels_are_counted_before_they_are_looked_at(tmp_path):
    content = {**json.loads(make_census().model_dump_json()), "labels": {str(number): "x" for number in range(10_001)}}
    with pytest.raises(WireError, match="has 10001 entries, at most 10000"):
        read(tmp_path, raw(json.dumps(content)), SMALL)


@pytest.mark.parametrize(
    "spacings", ['"' + "a" * 1000 + "\U0001f600" + '"', r'"\ud83d\ude00"', '{"":0}', "[" + ",".join(['""'] * 200) + "]"]
)
def test_a_summary_of_cases_is_numbers(tmp_path, spacings):
    text = (
        '{"protocol":1,"kind":"coarse_summary","spacings":%s,"shapes":[[1,1,1]],"relative_sizes":[1],'
        '"moments":[{"count":1,"mean":1,"m2":1}],"promotes_to_float64":false}'
    )
    limits = coarse_limits(20, 1, tensor_bytes=0)
    assert read(tmp_path, raw(text % "[[1,1,1]]"), limits).spacings == ((1, 1, 1),)
    with pytest.raises(WireError, match="more text than a list of numbers needs|not valid"):
        read(tmp_path, raw(text % spacings), limits)


# ----------------------------------------------------------------------------------------- what honest sites send
def fits(message, limits: Limits, specs=None, *, times: float = 2.0) -> bool:
    """Tell whether a message would fit if it were so many times as large."""
    header = encode_header(message, specs or {})
    return times * len(header) <= limits.header_bytes and times * count_elements(header) <= limits.elements


def test_honest_documents_have_room_to_spare():
    names = [
        f"encoder.stages.{stage}.blocks.{block}.conv{conv}.conv.weight"
        for stage in range(10)
        for block in range(50)
        for conv in range(4)
    ]
    shapes = dict.fromkeys(names, (320, 320, 3, 3, 3))
    specs = {name: TensorSpec("F32", shape) for name, shape in shapes.items()}
    registration = make_registration(shapes=shapes, aliases={f"decoder.{name}": name for name in names})
    assert fits(registration, REGISTRATION)
    plans = make_plans(configurations={str(number): {"patch_size": [1] * 3} for number in range(1000)})
    assert fits(messages.PlansReport(plans=plans), PLANS)
    labels = {f"structure_{number}": number for number in range(1000)}
    assert fits(make_census(labels=labels), SMALL)
    counts = (float(2**53 - 1),) * 5000
    assert fits(messages.Validation(tp=counts, fp=counts, fn=counts), SMALL)
    assert fits(messages.FineSummary(bins=(tuple(range(65_000, 65_006)),) * 64), SMALL)
    figures = {"train_losses": -0.123456789012345678, "dice_per_class_or_region": [0.12345678901234568] * 1000}
    update = messages.Update(metrics=figures, earlier=messages.EarlierMetrics(round=1, metrics=figures))
    assert fits(update, weights_limits(specs), specs, times=1.2)
    aggregate = messages.Aggregate(round=1, contributors={f"site-{number}": 1.0 for number in range(1000)})
    assert fits(aggregate, AGGREGATE, specs)


@pytest.mark.parametrize(("cases", "channels"), [(1, 1), (1000, 4), (20_000, 1)])
def test_a_summary_has_room_for_each_case_and_channel(cases, channels):
    triple = (0.12345678901234568,) * 3
    summary = messages.CoarseSummary(
        spacings=(triple,) * cases,
        shapes=((100_000,) * 3,) * cases,
        relative_sizes=(0.12345678901234568,) * cases,
        moments=({"count": 2**62, "mean": -0.12345678901234568, "m2": 1.2345678901234568e300},) * channels,
        promotes_to_float64=False,
        extrema=((-0.12345678901234568,) * 2,) * channels,
    )
    specs = {f"coarse.{channel}": TensorSpec("I64", (65_536,)) for channel in range(channels)}
    header, limits = encode_header(summary, specs), coarse_limits(cases, channels, tensor_bytes=0)
    assert len(header) <= limits.header_bytes and count_elements(header) <= limits.elements
    assert header.count(b'"') <= limits.quotes


# ------------------------------------------------------------------------------------------------ at the coordinator
class Peer:
    """A site that sends what it likes."""

    def __init__(self, federation, site: str) -> None:
        self.base = f"{federation.url}/v1"
        self.session = requests.Session()
        self.session.headers["Authorization"] = f"Bearer {federation.credential(site).token}"

    def put(self, key: str, body: bytes) -> requests.Response:
        return self.session.put(
            f"{self.base}/gatherings/{key}",
            data=body,
            timeout=60,
            headers={"X-Content-SHA256": hashlib.sha256(body).hexdigest()},
        )

    def send(self, key: str, message, tensors=None) -> int:
        tensors = tensors or {}
        header = encode_header(message, {name: TensorSpec.of(values) for name, values in tensors.items()})
        return self.put(key, header + b"".join(values.tobytes() for values in tensors.values())).status_code


@pytest.fixture
def federation(tmp_path):
    with served(tmp_path / "federation", make_settings(sites=("A", "B"))) as federation:
        yield federation


@pytest.fixture
def begun(federation):
    """A federation whose run takes updates of its first round, and its sites."""
    sites = {name: Peer(federation, name) for name in "AB"}
    for peer in sites.values():
        assert peer.send(RegistrationKey(RUN), make_registration()) == 200
    assert sites["A"].session.get(f"{sites['A'].base}/gatherings/{RegistrationKey(RUN)}?wait=20", timeout=30).ok
    owner = next(iter(set(federation.state.documents.agreement(RUN).match.initial_owner.values())))
    for name, peer in sites.items():
        assert peer.send(InitialKey(RUN), messages.Update(), make_weights(0) if name == owner else {}) == 200
    assert sites["A"].session.get(f"{sites['A'].base}/gatherings/{InitialKey(RUN)}?wait=20", timeout=30).ok
    return federation, sites


@pytest.mark.parametrize("key", [CensusKey(), PlansKey("p"), RegistrationKey(RUN)])
def test_a_document_larger_than_its_kind_may_be_is_refused_before_it_is_read(federation, key):
    body = raw(REPORT % ("[" + ",".join(["[]"] * (2 << 20)) + "]"))
    answer = Peer(federation, "A").put(key, body)
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert not list((federation.state.store.folder / "incoming").iterdir())


def test_as_much_json_as_fits_is_refused_for_its_brackets(federation):
    room = PLANS.header_bytes - 1000
    answer = Peer(federation, "A").put(PlansKey("p"), raw(REPORT % ("[" + ",".join(["[]"] * (room // 3)) + "]")))
    assert answer.status_code == 400 and "brackets and commas" in answer.json()["message"]


def test_an_update_has_room_for_its_tensors_and_its_figures_only(begun):
    federation, sites = begun
    limits = weights_limits({name: TensorSpec("F32", shape) for name, shape in SHAPES.items()})
    assert limits.header_bytes < 256 << 10
    assert step_of(RoundKey(RUN, 0)).limits(RoundKey(RUN, 0), "A", federation.state.documents) == limits
    weights = make_weights(1)
    header = json.loads(encode_header(messages.Update(), {n: TensorSpec.of(v) for n, v in weights.items()})[8:])
    header["__metadata__"]["message"] = '{"protocol":1,"kind":"update"}' + " " * (256 << 10)
    text = json.dumps(header).encode()
    body = len(text).to_bytes(8, "little") + text + b"".join(values.tobytes() for values in weights.values())
    assert sites["A"].put(RoundKey(RUN, 0), body).json()["code"] == "too_large"
    assert sites["A"].send(RoundKey(RUN, 0), messages.Update(metrics={"train_losses": 0.5}), weights) == 200


def test_documents_that_are_all_json_are_read_one_at_a_time(federation, tmp_path):
    coordinator, path = federation.coordinator, tmp_path / "document"
    path.write_bytes(encode_header(messages.PlansReport(plans={}), {}))
    with coordinator._opened(PlansKey("p"), "A", path) as document:
        assert document.message.kind == "plans_report" and coordinator._reading.locked()
    assert not coordinator._reading.locked()


# --------------------------------------------------------------------------------------------------------- figures
def test_figures_of_other_trainers_are_kept(begun):
    federation, sites = begun
    figures = {"loss": 0.5, "my_trainer.own-figure": [0.1, None], "2d": 1.0}
    for peer in sites.values():
        assert peer.send(RoundKey(RUN, 0), messages.Update(metrics=figures), make_weights(1)) == 200
    assert sites["A"].session.get(f"{sites['A'].base}/gatherings/{RoundKey(RUN, 0)}?wait=20", timeout=30).ok
    assert federation.state.store.load_rounds(RUN)[0]["sites"]["A"]["metrics"] == figures


@pytest.mark.parametrize(
    "figures",
    [
        {f"figure{number}": 0.5 for number in range(65)},
        {f"figure{number}": [0.5] * 1000 for number in range(3)},
        {"a" * 65: 0.5},
        {"\x1b[2J": 0.5},
        {"": 0.5},
        {"figure": [0.5] * 1001},
        {"figure": "text"},
        {"figure": {"inner": 0.5}},
    ],
)
def test_more_figures_than_people_look_at_are_refused(tmp_path, figures):
    text = json.dumps({"protocol": 1, "kind": "update", "metrics": figures})
    with pytest.raises(WireError, match="update.metrics"):
        read(tmp_path, raw(text), weights_limits({}))
    earlier = json.dumps({"protocol": 1, "kind": "update", "earlier": {"round": 1, "metrics": figures}})
    with pytest.raises(WireError, match="update.earlier.metrics"):
        read(tmp_path, raw(earlier), weights_limits({}))


# ------------------------------------------------------------------------------------------------------- at a site
BOMB = raw(REPORT % ("[" + ",".join(["[]"] * (2 << 20)) + "]"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "key", [RoundKey(RUN, 0), InitialKey(RUN), RegistrationKey(RUN), CensusKey(), CoarseKey(), FineKey(), PlansKey("p")]
)
def test_a_site_reads_no_more_of_a_result_than_there_can_be(federation, tmp_path, monkeypatch, key):
    path = tmp_path / "bomb"
    path.write_bytes(BOMB)
    result = Result(key, path, hashlib.sha256(BOMB).hexdigest())
    monkeypatch.setattr(federation.coordinator, "result", lambda key, site: result)
    with federation.client("A") as client, pytest.raises(WireError, match="at most"):
        client.result(key)


@pytest.mark.slow
def test_how_large_a_pooled_fingerprint_may_be_follows_from_the_cases(federation, tmp_path, monkeypatch):
    def answer_with(message) -> None:
        path = tmp_path / message.kind
        path.write_bytes(encode_header(message, {}))
        result = Result("x", path, hashlib.sha256(path.read_bytes()).hexdigest())
        monkeypatch.setattr(federation.coordinator, "result", lambda key, site: result)

    fingerprint = {"spacings": [[1.0, 1.0, 1.0]] * 20_000}
    with federation.client("A") as client:
        for num_cases, fits_in in ((20_000, True), (10, False)):
            answer_with(messages.PooledCensus(num_cases=num_cases))
            client.result(CensusKey())
            answer_with(messages.PooledFingerprint(num_cases=20_000, fingerprint=fingerprint))
            if fits_in:
                assert client.result(FineKey()).message.fingerprint == fingerprint
            else:
                with pytest.raises(WireError, match="brackets and commas"):
                    client.result(FineKey())


def test_answers_that_are_no_files_are_small():
    answer = requests.Response()
    answer.status_code, answer.raw = 200, _Endless()
    with pytest.raises(FederationError, match=f"more than {LARGEST_ANSWER} bytes"):
        read_small(answer)
    assert answer.raw.sent <= 2 * LARGEST_ANSWER


class _Endless:
    """A body that never ends."""

    sent = 0

    def read(self, size: int = -1, **_: object) -> bytes:
        self.sent += 1 << 16
        return bytes(1 << 16)


def test_weights_of_many_tensors_are_still_read(tmp_path):
    weights = {f"tensor{number}": np.float32([number]) for number in range(3000)}
    specs = {name: TensorSpec.of(values) for name, values in weights.items()}
    content = encode_header(messages.Update(), specs) + b"".join(values.tobytes() for values in weights.values())
    path = tmp_path / "document"
    path.write_bytes(content)
    with open_document(path, limits=weights_limits(specs)) as document:
        assert document.read("tensor2999") == np.float32([2999])
