"""The pages about federations agree with the package: messages, routes, refusals, limits, figures."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from functools import cache
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
SHORTEST_FRAGMENT = 5


# -------------------------------------------------------------------------------------------------------- messages
@cache
def texts_of_source() -> str:
    """Return every text in the package's federation, with a line each, in which a value is written as a NUL."""
    package = PROJECT / "nnunetv2"
    training = package / "training"
    variants = training / "nnUNetTrainer" / "variants"
    folders = [package / "federated", training / "differential_privacy", variants / "federated", variants / "privacy"]
    found = []
    for path in [
        package / "experiment_planning" / "federated_planning.py",
        package / "experiment_planning" / "secure_planning.py",
        package / "experiment_planning" / "experiment_planners" / "case_geometry.py",
        package / "experiment_planning" / "site_cases.py",
        training / "loss" / "marginal.py",
        *sorted(file for folder in folders for file in folder.rglob("*.py")),
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(text.replace("\n", " ") for text in found)


def listed_messages() -> list[str]:
    rows = (PROJECT / "documentation" / "troubleshooting.md").read_text(encoding="utf-8").splitlines()
    cells = [row.split("|")[1] for row in rows if row.startswith("| `")]
    return [message for cell in cells for message in re.findall("`([^`]+)`", cell)]


@pytest.mark.parametrize("message", listed_messages())
def test_every_message_of_the_troubleshooting_page_exists(message):
    fragments = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
    assert any(len(part) >= SHORTEST_FRAGMENT for part in fragments)
    assert re.search("[^\n]*".join(fragments), texts_of_source()), f"nobody says {message!r}"


def test_enough_messages_are_listed():
    assert len(listed_messages()) >= 50


# -------------------------------------------------------------------------------------------------------- protocol
def load_generator(name: str):
    spec = importlib.util.spec_from_file_location(name, PROJECT / "documentation" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclass looks for itself
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def described() -> dict:
    return json.loads((PROJECT / "documentation" / "openapi.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def built() -> dict:
    return load_generator("make_openapi").build()


def routes_of_app(tmp_path: Path) -> set[tuple[str, str]]:
    """Return (method, path) of everything that a coordinator serves."""
    from nnunetv2.federated.coordinator.app import build_app
    from nnunetv2.federated.coordinator.http.endpoint import Endpoint
    from nnunetv2.federated.coordinator.members import create_federation
    from nnunetv2.federated.coordinator.service import Coordinator
    from nnunetv2.federated.coordinator.storage.store import Store
    from nnunetv2.federated.protocol.api import FederationSettings

    with Store(tmp_path / "federation") as store:
        create_federation(store, FederationSettings(federation="test", sites=("A", "B")), now=0.0)
        app = build_app(Coordinator(store), Endpoint("http://127.0.0.1:1"))
        return {
            (method.lower(), route.path.replace(":path}", "}"))
            for route in app.routes
            for method in route.methods - {"HEAD"}
        }


def test_the_description_has_every_route_and_no_other(described, tmp_path):
    assert {(method, path) for path, methods in described["paths"].items() for method in methods} == routes_of_app(
        tmp_path
    )


def test_the_page_has_every_route(tmp_path):
    text = (PROJECT / "documentation" / "wire-protocol.md").read_text(encoding="utf-8")
    for _, path in routes_of_app(tmp_path):
        assert f"{path.replace('{', '<').replace('}', '>')}" in text


def test_the_page_has_the_exchanges_of_the_steps_as_they_are():
    page = (PROJECT / "documentation" / "wire-protocol.md").read_text(encoding="utf-8")
    assert load_generator("make_exchanges").with_table(page) == page, "run documentation/make_exchanges.py"


def test_the_description_is_that_of_the_models_as_they_are(described, built):
    """Fields, not wording: the wording of a schema is pydantic's, and differs between its versions."""

    def fields(description):
        schemas = description["components"]["schemas"]
        return {name: sorted(schema.get("properties", {})) for name, schema in schemas.items()}

    assert fields(described) == fields(built), "run documentation/make_openapi.py"
    assert described["paths"] == built["paths"], "run documentation/make_openapi.py"
    assert described["x-status-of-code"] == built["x-status-of-code"], "run documentation/make_openapi.py"


def test_every_refusal_belongs_to_a_route_and_is_on_the_page(built):
    from nnunetv2.federated.coordinator.http.error_responses import STATUS_OF_CODE

    generator = load_generator("make_openapi")
    named = {code for methods in generator.OPERATIONS.values() for one in methods.values() for code in one.codes}
    assert named | set(generator.ANYWHERE) == STATUS_OF_CODE.keys()
    text = (PROJECT / "documentation" / "wire-protocol.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\d{3}) \| (.*) \|$", text, flags=re.M))
    assert {code: int(status) for status, row in rows.items() for code in re.findall("`(.*?)`", row)} == STATUS_OF_CODE


def test_every_kind_of_document_is_on_the_page(built):
    text = (PROJECT / "documentation" / "wire-protocol.md").read_text(encoding="utf-8")
    for name in built["x-documents"]:
        assert f"`{built['components']['schemas'][name]['properties']['kind']['const']}`" in text


def test_limits_on_the_page_are_those_of_the_code():
    from nnunetv2.federated.coordinator import run_control
    from nnunetv2.federated.coordinator.dashboard import login_sessions, pages
    from nnunetv2.federated.coordinator.http import connections, rate_limits, request_bodies, site_routes
    from nnunetv2.federated.coordinator.storage import quotas
    from nnunetv2.federated.exchanges.document_limits import METRICS_BYTES, SMALL
    from nnunetv2.federated.exchanges.steps import STEPS
    from nnunetv2.federated.protocol.messages import MAX_METRIC_NUMBERS, MAX_METRICS

    granted = rate_limits.Limits()
    assert (site_routes.LONGEST_WAIT_S, pages.LONGEST_WAIT_S) == (55, 25)
    larger = {step.key.kind: step.header.header_bytes >> 20 for step in STEPS if step.header != SMALL}
    assert larger == {"plans": 2, "late_plans": 2, "registration": 4, "admission": 4}
    assert SMALL.header_bytes >> 20 == 1
    assert (METRICS_BYTES >> 10, MAX_METRICS, MAX_METRIC_NUMBERS, request_bodies.SMALL_BODY >> 10) == (
        128,
        64,
        2000,
        64,
    )
    assert (run_control.FAILURES_PER_DAY, run_control.LOGGED_CHARACTERS) == (200, 1000)
    assert (quotas.MAX_OPEN, quotas.MAX_OPEN_BYTES >> 30, quotas.RESERVED_BYTES >> 20) == (200, 1, 256)
    assert (granted.requests_per_s, granted.requests_at_once, granted.simultaneous_requests) == (50, 2000, 32)
    assert (granted.lines_per_s, granted.lines_at_once) == (1 / 6, 300)
    assert (granted.stranger_requests_per_s, granted.stranger_requests_at_once) == (20, 300)
    assert (granted.connections, granted.idle_connections, granted.idle_connections_per_address) == (8192, 2048, 512)
    assert (login_sessions.MAX_ATTEMPTS, login_sessions.ATTEMPTS_S) == (10, 300)
    assert (rate_limits.PACE["body"], rate_limits.PACE["headers"][0], rate_limits.PACE["rest"][0]) == (
        (30, 32 << 10),
        20,
        5,
    )
    assert (connections.REST_BYTES >> 20, connections.HEADER_BYTES >> 10) == (5, 16)


def test_figures_on_the_page_are_those_for_prometheus():
    guide = (PROJECT / "documentation" / "operators-guide.md").read_text(encoding="utf-8")
    named = set(re.findall(r"nnunet_fed_(\w+)", guide))
    source = (PROJECT / "nnunetv2" / "federated" / "coordinator" / "dashboard" / "prometheus.py").read_text(
        encoding="utf-8"
    )
    assert named and {name for name in named if f'"{name}"' not in source} == set()
