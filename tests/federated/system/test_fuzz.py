"""Send the coordinator what nobody would send in good faith: it answers with a refusal, and nobody else notices.

Mallory is a site with a proper credential. A and B are in the middle of a run. NNUNET_FED_MATRIX=full sends more than
100,000 requests; without it, a few thousand.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import socket
import struct
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from asgi_caller import Answer, call, running
from fake_federation import RUN, make_census, make_registration, make_settings, make_weights, served
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patience import PATIENCE_S

from nnunetv2.federated.coordinator.app import build_app
from nnunetv2.federated.coordinator.http.endpoint import Endpoint
from nnunetv2.federated.coordinator.http.error_responses import STATUS_OF_CODE
from nnunetv2.federated.coordinator.http.rate_limits import Limits
from nnunetv2.federated.coordinator.members import create_federation
from nnunetv2.federated.coordinator.service import Coordinator
from nnunetv2.federated.coordinator.storage import audit_log
from nnunetv2.federated.coordinator.storage.store import Store
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.api import Problem
from nnunetv2.federated.protocol.document import TensorSpec, write_document
from nnunetv2.federated.protocol.keys import (
    AdmissionKey,
    CensusKey,
    CoarseKey,
    FineKey,
    InitialKey,
    RegistrationKey,
    RoundKey,
    ValidationKey,
)
from nnunetv2.federated.protocol.strict_json import decode_json

FULL = os.environ.get("NNUNET_FED_MATRIX") == "full"
pytestmark = pytest.mark.timeout(3600 if FULL else 300)
MUTATED = 100_000 if FULL else 2500
GENERATED = 6000 if FULL else 250
OVER_A_SOCKET = 3000 if FULL else 300
TOKENS = {"A": "A." + "a" * 43, "B": "B." + "b" * 43, "M": "M." + "m" * 43}
GENEROUS = Limits(
    requests_per_s=1e9,
    requests_at_once=1e9,
    lines_per_s=1e9,
    lines_at_once=1e9,
    stranger_requests_per_s=1e9,
    stranger_requests_at_once=1e9,
)
MAX_GROWTH_KIB = 24 << 10


# ------------------------------------------------------------------------------------------------------------ the scene
class Scene:
    """A federation in the middle of its work, and what A and B have in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(folder / "federation")
        create_federation(self.store, make_settings(sites=("A", "B", "M"), num_epochs=3), now=time.time())
        self.lines: list[str] = []
        self.coordinator = Coordinator(self.store, log=lambda line: None)
        self.state = self.coordinator.state
        for invitation in self.coordinator.members.open_invitations(time.time()):
            self.coordinator.members.join(invitation.secret, TOKENS[invitation.member])
        self.app = build_app(self.coordinator, Endpoint("http://127.0.0.1:1"), limits=GENEROUS)
        self.statuses: Counter[int] = Counter()

    def document(self, message, tensors=None) -> bytes:
        tensors = tensors or {}
        path = self.folder / "document.safetensors"
        write_document(path, message, {name: TensorSpec.of(v) for name, v in tensors.items()}, tensors.values())
        return path.read_bytes()

    async def prepare(self) -> None:
        """Let all register; let A and B open round 0, which then waits for M; A and B begin the fingerprint."""
        for number, site in enumerate(TOKENS):
            await self.put(RegistrationKey(RUN), site, self.document(make_registration(3 - number)))
        await self.result(RegistrationKey(RUN))
        for site in TOKENS:
            await self.put(
                InitialKey(RUN), site, self.document(messages.Update(), make_weights(0) if site == "A" else {})
            )
        await self.result(InitialKey(RUN))
        await self.put(RoundKey(RUN, 0), "A", self.document(messages.Update(), make_weights(1)))
        await self.put(CensusKey(), "A", self.document(make_census()))
        await self.put("plans/nnUNetPlans", "A", self.document(messages.PlansReport(plans={"plans_name": "x"})))

    async def put(self, key: str, site: str, body: bytes) -> None:
        answer = await call(self.app, "PUT", f"/v1/gatherings/{key}", token=TOKENS[site], body=body)
        assert answer.status == 200, answer

    async def result(self, key: str) -> None:
        answer = await call(self.app, "GET", f"/v1/gatherings/{key}", token=TOKENS["A"], query=b"wait=20")
        assert answer.status == 200, answer

    def belongings(self) -> dict[str, object]:
        """Return all that A and B, and the federation as a whole, have: nothing of it may change."""
        of_others = {
            str(path.relative_to(self.store.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted((self.store.folder / "gatherings").rglob("*.safetensors"))
            if not path.name.startswith("M.")
        }
        ours = {
            str(exchange.key): {site: held for site, held in exchange.contributions.items() if site != "M"}
            for exchange in self.coordinator.state.registry
        }
        return {
            "files": of_others,
            "contributions": {key: held for key, held in ours.items() if held},
            "closed": sorted(str(one.key) for one in self.coordinator.state.registry if one.is_closed),
            "members": dict(self.store.load_members()),
            "settings": self.store.load_settings(),
            "controls": {
                run: (control.state, control.left - {"M"})
                for run, control in self.store.load_controls().items()
                if control.left - {"M"}
            },
            "outside": sorted(path.name for path in self.folder.iterdir()),
        }

    def check(self, answer: Answer, *, request: object) -> None:
        """Fail if an answer is an error of the coordinator's own, or a refusal that does not say why."""
        self.statuses[answer.status] += 1
        assert answer.status < 500, (request, answer)
        if answer.status >= 400 and answer.body:
            problem = decode_json(Problem, answer.body)
            assert STATUS_OF_CODE[problem.code] == answer.status, (request, problem)
            assert problem.message and "\n" not in problem.message.strip() and "Traceback" not in problem.message


@pytest.fixture
def scene(tmp_path):
    scene = Scene(tmp_path)
    yield scene
    scene.store.close()


def resident_kib() -> int:
    return int(
        next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    )


# ------------------------------------------------------------------------------------------------------------ mutation
class Mutator:
    """Make requests out of valid ones: bytes, JSON, headers and paths are changed in ways that have hurt others."""

    NASTY_NUMBERS = (0, -1, 1, 2**31, 2**53, 2**62, 2**63, 2**64 - 1, 1e308, -1e-320, 0.5, 10**400, True, None)
    NASTY_TEXTS = (
        "",
        ".",
        "..",
        "../../../etc/passwd",
        "A",
        "a",
        "\u0410",
        "A\u200b",
        "\ud800",
        "\x00",
        "A\r\nX: y",
        "%2e%2e",
        "x" * 5000,
        "\\..\\",
        "'; DROP TABLE members; --",
        "\U0001f3e5",
        "e\u0301",
        "\u202eA",
        "__metadata__",
        "message",
        "runs/x/registration",
        "NaN",
        "1e999",
        "constructor",
    )
    NASTY_SEGMENTS = (
        "..",
        ".",
        "",
        "%2e%2e",
        "%2f",
        "%00",
        "~",
        "r" * 200,
        "%F0%9F%8F%A5",
        "-1",
        "00",
        "1e3",
        "99999999",
        "rounds",
        RUN,
        "A",
        "B",
        "M",
        "admissions",
        "initial",
        "*",
        "?",
        "#",
        "%ff",
        "plans",
    )
    NASTY_QUERIES = (b"", b"wait=0", b"wait=-1", b"wait=1e9", b"wait=nan", b"wait=0&wait=0", b"%ff=%00", b"wait=")
    NASTY_TOKENS = (
        "",
        "M",
        "M.",
        "A." + "m" * 43,
        "M." + "m" * 42,
        TOKENS["M"] + "x",
        "operator." + "m" * 43,
        "m." + "m" * 43,
        "M\x00." + "m" * 43,
    )
    NASTY_HEADERS = (
        (b"content-length", b"-1"),
        (b"content-length", b"99999999999999999999"),
        (b"content-length", b"1e3"),
        (b"content-length", b"10 "),
        (b"x-content-sha256", b"0" * 64),
        (b"x-content-sha256", b"Z" * 64),
        (b"x-content-sha256", b""),
        (b"content-range", b"bytes 0-0/1"),
        (b"content-range", b"bytes 5-4/3"),
        (b"content-range", b"bytes 0-99999999999999/1"),
        (b"content-range", b"bytes */*"),
        (b"content-encoding", b"gzip"),
        (b"range", b"bytes=-1"),
        (b"range", b"bytes=0-,1-,2-,3-"),
        (b"range", b"bytes=99999999999-"),
        (b"range", b"lines=1"),
        (b"range", b"bytes=" + b"0-0," * 900),
        (b"if-range", b'"' + b"0" * 64 + b'"'),
        (b"transfer-encoding", b"chunked"),
        (b"authorization", b"Bearer \xff\xfe"),
        (b"authorization", b"Bearer A." + b"a" * 42),
        (b"authorization", b"Basic TTpt"),
        (b"cookie", b"session=" + b"x" * 4000),
        (b"x-forwarded-for", b"127.0.0.1"),
        (b"host", b"\xff"),
        (b"content-type", b"text/xml"),
        (b"expect", b"100-continue"),
        (b"upgrade", b"websocket"),
    )

    def __init__(self, seed: int, documents: dict[str, bytes]) -> None:
        self.rng = random.Random(seed)
        self.documents = documents
        self.paths = [f"/v1/gatherings/{key}" for key in documents] + [
            "/v1/settings",
            "/v1/status",
            f"/v1/runs/{RUN}",
            f"/v1/runs/{RUN}/actions",
            "/v1/failures",
            "/v1/members",
            "/v1/members/A",
            "/v1/join",
            "/v1/authority",
            f"/v1/offers/{RoundKey(RUN, 0)}",
            "/",
            "/metrics",
            "/v2/x",
            "/v1/overview",
            "/v1/session",
            f"/v1/runs/{RUN}/curves",
        ]
        self.bodies = [
            {"digest": "0" * 64, "size": 1000},
            {"run": RUN, "round": 0, "reason": "out of memory"},
            {"action": "stop"},
            {"action": "reset"},
            {"action": "proceed", "gathering": RoundKey(RUN, 0)},
            {"name": "C", "role": "site"},
            {"quorum": 1, "deadline_s": 0.1},
            {"protocol": 1, "invitation": "x" * 43, "token": "A." + "x" * 43},
            {"token": TOKENS["A"][:-1] + "x"},
        ]

    def request(self) -> dict:
        """Return the arguments of one call."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.55:  # a document
            key = rng.choice(list(self.documents))
            request = {
                "method": "PUT",
                "path": f"/v1/gatherings/{key}",
                "body": self.document(self.documents[rng.choice((key, rng.choice(list(self.documents))))]),
            }
        elif kind < 0.75:  # a small body
            request = {
                "method": rng.choice(("POST", "PATCH", "DELETE", "PUT")),
                "path": rng.choice(self.paths),
                "body": self.text(rng.choice(self.bodies)),
            }
            if rng.random() < 0.3:
                request["path"] = f"/v1/offers/{rng.choice(list(self.documents))}"
        else:
            request = {
                "method": rng.choice(("GET", "GET", "GET", "HEAD", "DELETE", "OPTIONS", "TRACE", "BREW")),
                "path": rng.choice(self.paths),
                "query": rng.choice(self.NASTY_QUERIES),
            }
        request["token"] = TOKENS["M"] if rng.random() < 0.9 else rng.choice(self.NASTY_TOKENS)
        if rng.random() < 0.25:
            request["path"] = self.path(request["path"])
        if rng.random() < 0.3:
            request["headers"] = dict(rng.sample(self.NASTY_HEADERS, rng.randint(1, 3)))
        if rng.random() < 0.1:
            request["pieces"], request["breaks_off"] = rng.randint(1, 4), rng.random() < 0.5
        return request

    def path(self, path: str) -> str:
        parts = path.split("/")
        for _ in range(self.rng.randint(1, 3)):
            index = self.rng.randrange(1, len(parts) + 1)
            parts[index : index + self.rng.randint(0, 1)] = [self.rng.choice(self.NASTY_SEGMENTS)]
        return "/".join(parts) if parts[0] == "" else "/" + "/".join(parts)

    def document(self, document: bytes) -> bytes:
        """Change the header as JSON, the message in it, or the bytes."""
        rng = self.rng
        size = int.from_bytes(document[:8], "little")
        kind = rng.random()
        if kind < 0.45:
            header = json.loads(document[8 : 8 + size])
            if rng.random() < 0.6:
                message = json.loads(header["__metadata__"]["message"])
                header["__metadata__"]["message"] = self.text(message).decode("utf-8", "surrogateescape")
                changed = json.dumps(header).encode()
            else:
                changed = self.text(header)
            return len(changed).to_bytes(8, "little") + changed + document[8 + size :]
        if kind < 0.6:
            length = rng.choice((0, 1, 7, size - 1, size + 1, len(document), 2**31, 2**63, 2**64 - 1))
            return length.to_bytes(8, "little") + document[8:]
        if kind < 0.75:  # values
            values = bytearray(document)
            for _ in range(rng.randint(1, 8)):
                place = rng.randrange(8 + size, max(9 + size, len(values) - 3))
                values[place : place + 4] = rng.choice(
                    (struct.pack("<f", float("nan")), struct.pack("<f", -np.inf), rng.randbytes(4))
                )
            return bytes(values)
        changed = bytearray(document)
        for _ in range(rng.choice((1, 1, 2, 5, 50))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        cut = rng.choice((None, None, 8, rng.randrange(len(changed))))
        return bytes(changed[:cut]) + (rng.randbytes(rng.randint(1, 2000)) if rng.random() < 0.2 else b"")

    def text(self, value: object) -> bytes:
        """Change JSON: its values, its keys, its structure, or its text."""
        rng = self.rng
        for _ in range(rng.choice((0, 1, 1, 2, 4))):
            value = self.changed(value)
        text = json.dumps(value)
        kind = rng.random()
        if kind < 0.03:
            return b"[" * rng.choice((10, 100, 1000, 30_000)) + text.encode()
        if kind < 0.06:
            depth = rng.choice((60, 70, 900, 5000))
            return text[:-1].encode() + b', "x": ' + b'{"a":' * depth + b"1" + b"}" * depth + b"}"
        if kind < 0.12 and len(text) > 2:
            place = rng.randrange(len(text))
            piece = rng.choice(("NaN", "\\ud800", "\x00", "1e999", ",,", '"', "}", "]"))
            return (text[:place] + piece + text[place:]).encode()
        if kind < 0.15:
            return text.encode("utf-16")
        return text.encode()

    def changed(self, value: object, depth: int = 0) -> object:
        """Return a value in which one place is different."""
        rng = self.rng
        if isinstance(value, dict) and value and (depth == 0 or rng.random() < 0.8):
            changed = dict(value)
            key = rng.choice(list(changed))
            action = rng.random()
            if action < 0.15:
                del changed[key]
            elif action < 0.3:
                changed[rng.choice(self.NASTY_TEXTS)] = changed.pop(key)
            else:
                changed[key] = self.changed(changed[key], depth + 1)
            return changed
        if isinstance(value, list) and value and rng.random() < 0.8:
            changed = list(value)
            index = rng.randrange(len(changed))
            if rng.random() < 0.3:
                changed.insert(index, changed[index])
            else:
                changed[index] = self.changed(changed[index], depth + 1)
            return changed
        return rng.choice(
            (
                rng.choice(self.NASTY_NUMBERS),
                rng.choice(self.NASTY_TEXTS),
                [],
                {},
                [value],
                {"x": value},
                [value] * rng.choice((2, 300)),
            )
        )


def documents_of(scene: Scene) -> dict[str, bytes]:
    """Return a valid document of Mallory's for every kind of exchange."""
    moments = (messages.ChannelMoments(count=5, mean=1.0, m2=2.0),)
    coarse = messages.CoarseSummary(
        spacings=((1.0, 1.0, 1.0),) * 3,
        shapes=((8, 8, 8),) * 3,
        relative_sizes=(1.0,) * 3,
        moments=moments,
        promotes_to_float64=False,
    )
    histogram = np.zeros(65536, np.int64)
    histogram[40000] = 5
    return {
        RoundKey(RUN, 0): scene.document(messages.Update(metrics={"loss": 1.0, "dice": [0.5, None]}), make_weights(3)),
        RegistrationKey(RUN): scene.document(make_registration(1)),
        RegistrationKey("2d.fold_1.nnUNetTrainerFake"): scene.document(make_registration(1)),
        InitialKey(RUN): scene.document(messages.Update()),
        ValidationKey(RUN, 0): scene.document(messages.Validation(tp=(1.0,), fp=(2.0,), fn=(3.0,))),
        AdmissionKey(RUN, "M"): scene.document(make_registration(1)),
        AdmissionKey(RUN, "A"): scene.document(make_registration(1)),
        CensusKey(): scene.document(make_census()),
        CoarseKey(): scene.document(coarse, {"coarse.0": histogram}),
        FineKey(): scene.document(messages.FineSummary(bins=((40000,),)), {"fine.0": histogram[None]}),
        "plans/nnUNetPlans": scene.document(messages.PlansReport(plans={"plans_name": "x", "configurations": {}})),
    }


def test_mutated_requests_are_refused_and_change_nothing_of_others(scene):
    async def scenario() -> tuple[int, int]:
        async with running(scene.app):
            await scene.prepare()
            before = scene.belongings()
            mutator = Mutator(6, documents_of(scene))
            early = 0
            for number in range(MUTATED):
                request = mutator.request()
                scene.check(await call(scene.app, **request), request=request)
                if number == MUTATED // 5:
                    early = resident_kib()
            late = resident_kib()
            assert scene.belongings() == before
            assert not list((scene.store.folder / "incoming").iterdir())
            assert audit_log.first_break(scene.store.load_log()) is None
            # the run goes on as if nothing had happened
            if "M" not in scene.coordinator.state.registry.get(RoundKey(RUN, 0)).contributions:
                await scene.put(RoundKey(RUN, 0), "M", scene.document(messages.Update(), make_weights(5)))
            await scene.put(RoundKey(RUN, 0), "B", scene.document(messages.Update(), make_weights(2)))
            await scene.result(RoundKey(RUN, 0))
            return early, late

    begin = time.perf_counter()
    early, late = asyncio.run(scenario())
    print(
        f"{MUTATED} mutated requests in {time.perf_counter() - begin:.1f} s: {dict(sorted(scene.statuses.items()))}; "
        f"resident {early >> 10} MiB after a fifth, {late >> 10} MiB at the end"
    )
    assert scene.statuses[400] > MUTATED / 10 and scene.statuses[200] > MUTATED / 50
    assert late - early < MAX_GROWTH_KIB


# ---------------------------------------------------------------------------------------------------------- generation
SEGMENTS = st.sampled_from((*Mutator.NASTY_SEGMENTS, "v1", "gatherings", "offers", "members", "join", "failures"))
PATHS = st.one_of(
    st.lists(SEGMENTS, max_size=6).map(lambda parts: "/" + "/".join(parts)),
    st.lists(SEGMENTS, max_size=4).map(lambda parts: "/v1/gatherings/" + "/".join(parts)),
    st.text(st.characters(codec="latin-1"), max_size=40).map(lambda text: "/v1/gatherings/runs/" + text),
)
KNOWN = (
    ("GET", "/v1/settings"),
    ("GET", "/v1/status"),
    ("GET", f"/v1/runs/{RUN}"),
    ("POST", "/v1/join"),
    ("POST", f"/v1/runs/{RUN}/actions"),
    ("POST", "/v1/failures"),
    ("POST", "/v1/members"),
    ("DELETE", "/v1/members/A"),
    ("PATCH", "/v1/settings"),
    ("POST", f"/v1/offers/{RoundKey(RUN, 0)}"),
    ("POST", f"/v1/offers/{CensusKey()}"),
    ("PUT", f"/v1/gatherings/{RoundKey(RUN, 0)}"),
    ("PUT", f"/v1/gatherings/{CensusKey()}"),
    ("PUT", "/v1/gatherings/plans/x"),
    ("GET", f"/v1/gatherings/{InitialKey(RUN)}"),
    ("GET", f"/v1/gatherings/{RoundKey(RUN, 0)}"),
    ("GET", "/metrics"),
    ("GET", "/v1/overview"),
    ("GET", f"/v1/runs/{RUN}/curves"),
    ("POST", "/v1/session"),
    ("DELETE", "/v1/session"),
)
TARGETS = st.one_of(
    st.sampled_from(KNOWN),
    st.sampled_from(KNOWN),
    st.tuples(st.sampled_from(("GET", "PUT", "POST", "DELETE", "PATCH", "HEAD")), PATHS),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
FIELDS = (
    "digest",
    "size",
    "run",
    "round",
    "reason",
    "action",
    "gathering",
    "name",
    "role",
    "quorum",
    "invitation",
    "token",
    "protocol",
    "lifetime_s",
)
NAMED = st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6)
BODIES = st.one_of(
    st.binary(max_size=200),
    JSON.map(lambda value: json.dumps(value).encode()),
    NAMED.map(lambda value: json.dumps(value).encode()),
    st.tuples(st.integers(0, 300), NAMED).map(
        lambda pair: pair[0].to_bytes(8, "little") + json.dumps(pair[1]).encode()
    ),
)
HEADERS = st.dictionaries(
    st.sampled_from([name for name, _ in Mutator.NASTY_HEADERS]), st.binary(max_size=60), max_size=4
)


def test_generated_requests_are_refused_and_change_nothing_of_others(scene):
    loop = asyncio.new_event_loop()
    context = running(scene.app)
    loop.run_until_complete(context.__aenter__())
    loop.run_until_complete(scene.prepare())
    before = scene.belongings()

    @settings(
        max_examples=GENERATED, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(target=TARGETS, body=BODIES, headers=HEADERS, query=st.binary(max_size=20))
    def ask(target: tuple[str, str], **request: object) -> None:
        request["method"], request["path"] = target
        scene.check(loop.run_until_complete(call(scene.app, token=TOKENS["M"], **request)), request=request)

    try:
        ask()
        assert scene.belongings() == before
        print(f"{GENERATED} generated requests: {dict(sorted(scene.statuses.items()))}")
    finally:
        loop.run_until_complete(context.__aexit__(None, None, None))
        loop.close()


# ------------------------------------------------------------------------------------------------------ over a socket
def raw_requests(rng: random.Random, token: str) -> list[bytes]:
    """Return requests as bytes, some proper, most not."""
    credential = f"Host: x\r\nAuthorization: Bearer {token}\r\n"
    proper = [
        f"GET /v1/settings HTTP/1.1\r\n{credential}\r\n",
        f"POST /v1/failures HTTP/1.1\r\n{credential}Content-Length: 2\r\n\r\n{{}}",
        f"PUT /v1/gatherings/{CensusKey()} HTTP/1.1\r\n{credential}Content-Length: 5\r\n"
        f"X-Content-SHA256: {'0' * 64}\r\n\r\nabcde",
        f"PUT /v1/gatherings/{CensusKey()} HTTP/1.1\r\n{credential}Transfer-Encoding: chunked\r\n\r\n"
        "5\r\nabcde\r\n0\r\n\r\n",
    ]
    join = b"POST /v1/join HTTP/1.1\r\nHost: x\r\n"
    awful = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\r\n" * 100,
        b"\x00" * 500,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET " + b"/x" * 20_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: " + b"b" * 40_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"H%d: x\r\n" % number for number in range(5000)) + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        join + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        join + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /",
        join + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffffff\r\n",
        b"GET /v1/settings HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    ]
    requests = []
    for _ in range(OVER_A_SOCKET):
        if rng.random() < 0.2:
            requests.append(rng.choice(awful))
            continue
        request = bytearray(rng.choice(proper).encode())
        for _ in range(rng.choice((0, 1, 1, 2, 8))):
            place = rng.randrange(len(request))
            action = rng.random()
            if action < 0.5:
                request[place] = rng.randrange(256)
            elif action < 0.75:
                del request[place : place + rng.randint(1, 4)]
            else:
                request[place:place] = rng.choice((b"\r\n", b"\n", b" ", b"\x00", b":", b"\xff", b"\r"))
        requests.append(bytes(request))
    return requests


def test_bytes_that_are_no_http_do_not_disturb(tmp_path):
    with served(tmp_path / "federation", make_settings(), limits=GENEROUS) as federation:
        token, port = federation.credential("A").token, int(federation.url.rpartition(":")[2])
        statuses: Counter[bytes] = Counter()
        for request in raw_requests(random.Random(8), token):
            with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
                connection.sendall(request)
                with suppress(OSError):  # it has answered, and closed the connection already
                    connection.shutdown(socket.SHUT_WR)
                answer = b""
                try:
                    while piece := connection.recv(1 << 16):
                        answer += piece
                except ConnectionResetError:
                    answer = answer or b"reset"
            status = answer[9:12] if answer.startswith(b"HTTP/1.1 ") else b"none"
            statuses[status] += 1
            assert not status.startswith(b"5"), (request, answer)
        print(f"{OVER_A_SOCKET} requests over a socket: {dict(statuses)}")
        with federation.client("A") as client:
            assert client.settings().sites == ("A", "B")
