"""What the pages about federations say is what the package does: commands, messages, routes, links."""
from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
PAGES = [PROJECT / "documentation" / f"{name}.md" for name in (
    "federated-training", "operators-guide", "sites-guide", "wire-protocol", "threat-model", "troubleshooting")]
FEDERATION = "nnunetv2.federated"
PARSERS = {
    "nnUNetv2_fed_coordinator": f"{FEDERATION}.coordinator.cli:build_parser",
    "nnUNetv2_fed_admin": f"{FEDERATION}.admin:build_parser",
    "nnUNetv2_fed_join": f"{FEDERATION}.site:build_parser",
    "nnUNetv2_fed_leave": f"{FEDERATION}.status:build_leave_parser",
    "nnUNetv2_fed_manifest": f"{FEDERATION}.manifest:build_parser",
    "nnUNetv2_fed_status": f"{FEDERATION}.status:build_parser",
    "nnUNetv2_fed_simulate": f"{FEDERATION}.simulate:build_parser",
    "nnUNetv2_plan_and_preprocess":
        "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints:build_plan_and_preprocess_parser",
    "nnUNetv2_preprocess": "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints:build_preprocess_parser",
    "nnUNetv2_train": "nnunetv2.run.run_training:build_parser",
    "nnUNetv2_predict": "nnunetv2.inference.predict_from_raw_data:build_parser",
}
ADMIN_COMMANDS = "backup|invite|log|proceed|restore|revoke|settings|verify-log"
DEPLOY = [PROJECT / "deploy" / name for name in ("nnunet-coordinator.service", "Containerfile", "nginx.conf")]
SHORTEST_FRAGMENT = 5


# -------------------------------------------------------------------------------------------------------- commands
def commands_in(text: str) -> Iterator[str]:
    """Yield the command lines in a page: indented ones, and whole ones between backticks. Backslashes join lines."""
    joined = re.sub(r"\s*\\\n[\s#]*", " ", text)
    for line in joined.splitlines():
        if match := re.match(r"(?:    |#   )(?:sudo -u \S+ )?(?:\S*/)?(nnUNetv2_\w+ .*)", line):
            yield match[1].partition("  # ")[0].partition("     ")[0]
    yield from re.findall(r"`(nnUNetv2_\w+ [^`]*)`", text)
    for words in re.findall(rf"`((?:{ADMIN_COMMANDS}) [^`]+)`", text):
        yield "nnUNetv2_fed_admin " + re.sub(r"\b[NS]\b", "2", words)


def all_commands() -> list[str]:
    found = [command for path in (*PAGES, *DEPLOY) for command in commands_in(path.read_text(encoding="utf-8"))]
    return sorted({" ".join(command.split()) for command in found if "..." not in command})


@pytest.mark.parametrize("command", all_commands())
def test_every_command_on_the_pages_is_one(command):
    program, *arguments = shlex.split(command)
    module, function = PARSERS[program].split(":")
    getattr(importlib.import_module(module), function)().parse_args(arguments)


def test_commands_are_found():
    assert len(all_commands()) >= 35


def test_every_command_of_the_federation_is_on_a_page():
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    setup = (PROJECT / "setup.py").read_text(encoding="utf-8")
    commands = set(re.findall(r'"(nnUNetv2_fed_\w+)"', setup))
    assert commands == {command for command in PARSERS if command.startswith("nnUNetv2_fed_")}
    assert {command for command in commands if f"{command} " not in text and f"{command}\n" not in text} == set()


# -------------------------------------------------------------------------------------------------------- messages
@cache
def texts_of_source() -> str:
    """Return every text in the package's federation, with a line each, in which a value is written as a NUL."""
    package = PROJECT / "nnunetv2"
    folders = [package / "federated", package / "training" / "nnUNetTrainer" / "variants" / "federated"]
    found = []
    for path in [package / "experiment_planning" / "federated_planning.py",
                 *sorted(file for folder in folders for file in folder.rglob("*.py"))]:
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
def load_generator():
    spec = importlib.util.spec_from_file_location("make_openapi", PROJECT / "documentation" / "make_openapi.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_openapi"] = module  # where its dataclass looks for itself
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def described() -> dict:
    return json.loads((PROJECT / "documentation" / "openapi.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def built() -> dict:
    return load_generator().build()


def routes_of_app(tmp_path: Path) -> set[tuple[str, str]]:
    """Return (method, path) of everything that a coordinator serves."""
    from nnunetv2.federated.bodies import FederationSettings
    from nnunetv2.federated.coordinator.app import build_app
    from nnunetv2.federated.coordinator.members import create_federation
    from nnunetv2.federated.coordinator.place import Place
    from nnunetv2.federated.coordinator.service import Coordinator
    from nnunetv2.federated.store import Store

    with Store(tmp_path / "federation") as store:
        create_federation(store, FederationSettings(federation="test", sites=("A", "B")), now=0.0)
        app = build_app(Coordinator(store), Place("http://127.0.0.1:1"))
        return {(method.lower(), route.path.replace(":path}", "}"))
                for route in app.routes for method in route.methods - {"HEAD"}}


def test_the_description_has_every_route_and_no_other(described, tmp_path):
    assert {(method, path) for path, methods in described["paths"].items() for method in methods} \
        == routes_of_app(tmp_path)


def test_the_page_has_every_route(tmp_path):
    text = (PROJECT / "documentation" / "wire-protocol.md").read_text(encoding="utf-8")
    for _, path in routes_of_app(tmp_path):
        assert f"{path.replace('{', '<').replace('}', '>')}" in text


def test_the_description_is_that_of_the_models_as_they_are(described, built):
    """Fields, not wording: the wording of a schema is pydantic's, and differs between its versions."""
    def fields(description):
        schemas = description["components"]["schemas"]
        return {name: sorted(schema.get("properties", {})) for name, schema in schemas.items()}

    assert fields(described) == fields(built), "run documentation/make_openapi.py"
    assert described["paths"] == built["paths"], "run documentation/make_openapi.py"
    assert described["x-status-of-code"] == built["x-status-of-code"], "run documentation/make_openapi.py"


def test_every_refusal_belongs_to_a_route_and_is_on_the_page(built):
    from nnunetv2.federated.coordinator.problems import STATUS_OF_CODE

    generator = load_generator()
    named = {code for methods in generator.OPERATIONS.values() for one in methods.values() for code in one.codes}
    assert named | set(generator.ANYWHERE) == STATUS_OF_CODE.keys()
    text = (PROJECT / "documentation" / "wire-protocol.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\d{3}) \| (.*) \|$", text, flags=re.M))
    assert {code: int(status) for status, row in rows.items() for code in re.findall("`(.*?)`", row)} == STATUS_OF_CODE


def test_every_kind_of_document_is_on_the_page(built):
    from nnunetv2.federated import messages

    text = (PROJECT / "documentation" / "wire-protocol.md").read_text(encoding="utf-8")
    for name in built["x-documents"]:
        assert f"`{getattr(messages, name).model_fields['kind'].default}`" in text


def test_limits_on_the_page_are_those_of_the_code():
    from nnunetv2.federated.closing import MAX_DOCUMENT_BYTES, MESSAGE_ALLOWANCE
    from nnunetv2.federated.coordinator import app, connections, limits, page, quotas, sessions, uploads

    granted = limits.Limits()
    assert (app.LONGEST_WAIT_S, page.LONGEST_WAIT_S) == (55, 25)
    assert (MAX_DOCUMENT_BYTES >> 20, MESSAGE_ALLOWANCE >> 20, uploads.SMALL_BODY >> 10) == (256, 4, 64)
    assert (quotas.MAX_OPEN, quotas.MAX_OPEN_BYTES >> 30, quotas.RESERVED_BYTES >> 20) == (200, 1, 256)
    assert (granted.requests_per_s, granted.requests_at_once, granted.simultaneous_requests) == (50, 2000, 32)
    assert (granted.lines_per_s, granted.lines_at_once) == (1 / 6, 300)
    assert (granted.stranger_requests_per_s, granted.stranger_requests_at_once) == (20, 300)
    assert (granted.connections, granted.idle_connections, granted.idle_connections_per_address) == (8192, 2048, 512)
    assert (sessions.MAX_ATTEMPTS, sessions.ATTEMPTS_S) == (10, 300)
    assert (limits.PACE["body"], limits.PACE["headers"][0], limits.PACE["rest"][0]) == ((30, 32 << 10), 20, 5)
    assert (connections.REST_BYTES >> 20, connections.HEADER_BYTES >> 10) == (5, 16)


def test_figures_on_the_page_are_those_for_prometheus():
    named = set(re.findall(r"nnunet_fed_(\w+)", PAGES[1].read_text(encoding="utf-8")))
    source = (PROJECT / "nnunetv2" / "federated" / "coordinator" / "metrics.py").read_text(encoding="utf-8")
    assert named and {name for name in named if f'"{name}"' not in source} == set()


# ----------------------------------------------------------------------------------------------------------- links
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.M)
            assert anchor in {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
