"""No text of another site, or of a coordinator, commands the terminal of whoever looks at the federation."""

from __future__ import annotations

import argparse
import io
import json
import shlex
import sys
import unicodedata
import zipfile

import pytest
from fake_federation import LABELS, RUN, make_census, make_client, make_plans, make_settings, served, wait_until
from hostile_coordinator import ESCAPES, hostile, send

from nnunetv2.federated.commands import admin, fetch_model, join, leave, status
from nnunetv2.federated.coordinator.storage.audit_log import Event
from nnunetv2.federated.errors import FederationError, RefusedError
from nnunetv2.federated.exchanges.consistency import first_difference
from nnunetv2.federated.protocol import api, messages
from nnunetv2.federated.protocol.invitation import Invitation, encode_invitation
from nnunetv2.federated.protocol.keys import CensusKey, PlansKey
from nnunetv2.federated.protocol.strict_json import canonical_json, decode_json
from nnunetv2.federated.site.credential import save_credential
from nnunetv2.utilities.command_line import run_command


def is_harmless(text: str) -> bool:
    """Tell whether a text, but for its line breaks, has no character that commands a terminal or is not seen."""
    return all(
        one == "\n" or (unicodedata.category(one)[0] != "C" and unicodedata.category(one) not in ("Zl", "Zp"))
        for one in text
    )


@pytest.fixture
def shown(monkeypatch, capsys):
    """Run a command as its console script does, and return all that it shows."""

    def run(function, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["nnUNetv2_command", *arguments])
        try:
            run_command(lambda: function(list(arguments)))
        except SystemExit as end:
            assert end.code == 1  # noqa: PT017  not every command fails
        text = "".join(capsys.readouterr())
        assert text and is_harmless(text), ascii(text)
        return text

    return run


# ------------------------------------------------------------------------------------------------------ a hostile site
@pytest.fixture
def refused(tmp_path):
    """Serve a federation in which site M has put escapes into plans, labels, names and reasons."""
    with served(tmp_path / "federation", make_settings(sites=("A", "M"))) as federation:
        odd_plans = make_plans() | {ESCAPES: {"x": ESCAPES}}
        odd_labels = {**LABELS, ESCAPES: 2}
        with federation.client("A") as a, federation.client("M") as m:
            for key, ours, theirs in (
                (PlansKey("p"), messages.PlansReport(plans=make_plans()), messages.PlansReport(plans=odd_plans)),
                (CensusKey(), make_census(), make_census(labels=odd_labels)),
            ):
                a.contribute(key, ours)
                m.contribute(key, theirs)
            m.report_failure(RUN, None, ESCAPES)
        wait_until(lambda: sum(bool(one.refusal) for one in federation.state.registry.open_exchanges()) == 2)
        yield federation


def test_a_status_shows_what_a_site_has_made_up_without_its_commands(refused, monkeypatch, shown):
    credential = refused.coordinator.state.store.folder / "credential.A.json"
    monkeypatch.setenv("nnUNet_fed_site", str(credential))
    text = shown(status.main)
    assert r"\x1b]0;owned\x07" in text and r"\u202e" in text
    assert not any(line.startswith(("forged", "run x")) for line in text.splitlines())
    assert "x1b" in json.loads(shown(status.main, "--json"))["waiting"][0]["refusal"]


def test_the_audit_log_is_shown_without_commands(refused, shown):
    folder = str(refused.coordinator.state.store.folder)
    text = shown(admin.main, "--folder", folder, "log")
    assert text.count("refusal") == 2 and r"\x1b[2K" in text
    numbers = [line.split()[0] for line in text.splitlines()]
    assert numbers == [str(number) for number in range(1, len(numbers) + 1)]  # no line is made up
    for line in shown(admin.main, "--folder", folder, "log", "--json").splitlines():
        json.loads(line)


def test_a_log_that_was_written_before_texts_were_checked_is_shown_without_commands(refused, shown):
    refused.coordinator.state.store.add_event(Event(1.0, "refusal", "M", f"key{ESCAPES}", {"message": ESCAPES}))
    refused.coordinator.state.store.add_event(Event(1.0, "unheard of", "M", None, {ESCAPES: ESCAPES}))
    folder = str(refused.coordinator.state.store.folder)
    shown(admin.main, "--folder", folder, "log")
    last = json.loads(shown(admin.main, "--folder", folder, "log", "--json").splitlines()[-1])
    assert last["detail"] == {ESCAPES: ESCAPES}  # a program gets what is there


def test_what_a_coordinator_says_and_keeps_is_harmless(refused):
    assert all(is_harmless(line) and "\n" not in line for line in refused.lines if "failure" not in line)
    assert all(is_harmless(one.refusal) for one in refused.coordinator.state.registry.open_exchanges())
    with refused.client("A") as client, pytest.raises(RefusedError) as caught:
        client.result(PlansKey("p"))
    assert is_harmless(str(caught.value))


# ---------------------------------------------------------------------------------------------------- where it is made
def test_a_difference_between_sites_is_printable_short_and_readable():
    found = first_difference({"A": {}, "B": {ESCAPES: [ESCAPES]}}, "plans")
    assert is_harmless(found) and "\n" not in found and r"plans.\x1b]0;owned\x07" in found
    assert (
        first_difference({"A": {"Läsion": "größer"}, "B": {"Läsion": "肝"}}, "labels")
        == 'labels.Läsion is "größer" at A and "肝" at B'
    )
    long = first_difference({"A": 1, "B": {"x" * 10**6: {"y" * 10**6: 1}}}, "plans")
    assert len(long) < 500
    deep_a, deep_b = 1, 2
    for number in range(60):
        deep_a, deep_b = {f"{number}" + "k" * 500: deep_a}, {f"{number}" + "k" * 500: deep_b}
    assert len(first_difference({"A": deep_a, "B": deep_b}, "plans")) <= 4000


def test_equal_values_are_no_difference_however_they_are_written():
    assert first_difference({"A": {"a": 1, "b": "ü"}, "B": json.loads(canonical_json({"b": "ü", "a": 1}))}, "x") is None


def test_what_is_not_valid_is_told_without_the_words_of_the_sender():
    with pytest.raises(FederationError) as caught:
        decode_json(
            messages.Census,
            json.dumps({"num_cases": 1, "channel_names": {"0": "CT"}, "labels": {ESCAPES: "x"}}).encode(),
        )
    assert is_harmless(str(caught.value)) and len(str(caught.value)) <= 500


def test_texts_of_answers_are_printable_once_they_are_read_and_fit_when_they_are_sent_on():
    body = {"code": "x", "message": ESCAPES, "remedy": "\x1b" * 8000}
    problem = decode_json(api.Problem, json.dumps(body).encode())
    assert is_harmless(problem.message + problem.remedy) and "\n" not in problem.message
    assert api.Problem.model_validate(problem.model_dump()) == problem


# ----------------------------------------------------------------------------------------------- a hostile coordinator
@pytest.fixture
def hostile_text(tmp_path, monkeypatch):
    """Serve answers, and let commands be those of a site that has joined there."""

    def serve(answer):
        federation = hostile(answer)
        credential = federation.__enter__()
        entered.append(federation)
        path = tmp_path / "site.json"
        save_credential(credential, path)
        monkeypatch.setenv("nnUNet_fed_site", str(path))
        monkeypatch.setenv("nnUNet_fed_give_up_after_h", "0")
        monkeypatch.chdir(tmp_path)
        return credential

    entered = []
    yield serve
    for federation in entered:
        federation.__exit__(None, None, None)


COMMANDS = {
    "status": (status.main, []),
    "leave": (leave.main, ["RUN"]),
    "pause": (admin.main, ["pause", "RUN"]),
    "invite": (admin.main, ["invite", "NAME"]),
    "settings": (admin.main, ["settings"]),
    "revoke": (admin.main, ["revoke", "NAME"]),
    "fetch": (fetch_model.main, ["RUN"]),
    "fetch any": (fetch_model.main, []),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["problem", "page", "reason", "junk"])
def test_no_refusal_commands_the_terminal_of_a_command(command, kind, hostile_text, shown):
    def answer(handler):
        if kind == "reason":
            handler.send_response(403, "no\x1b[2K\x9b8m\u202e".encode().decode("latin-1"))
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        body = {
            "problem": json.dumps({"code": "forbidden", "message": ESCAPES, "remedy": ESCAPES}),
            "page": f"<html>{ESCAPES}</html>",
            "junk": json.dumps({ESCAPES: [ESCAPES]}),
        }[kind]
        send(handler, body.encode(), 200 if kind == "junk" else 403)

    hostile_text(answer)
    function, arguments = COMMANDS[command]
    text = shown(function, *arguments)
    assert "error: " in text or (command, kind) == ("revoke", "junk")  # its answer has no body


STATUS = {
    "federation": ESCAPES,
    "sites": [],
    "runs": [{"run": ESCAPES, "closed": True}, {"run": f"2{ESCAPES}", "closed": True}],
    "progress": [{"run": ESCAPES}, {"run": f"2{ESCAPES}"}],
    "waiting": [{"key": ESCAPES, "contributed": [], "waiting_for": [], "opened": 1.0, "refusal": ESCAPES}],
    "failures": [{"site": "A", "run": ESCAPES, "round": 1, "reason": ESCAPES, "time": 1.0}],
}


@pytest.mark.parametrize(
    ("function", "arguments", "body"),
    [
        (status.main, [], STATUS),
        (status.main, ["--json"], STATUS),
        (fetch_model.main, [], STATUS),
        (admin.main, ["stop", "RUN"], {"run": ESCAPES}),
        (admin.main, ["settings"], {"federation": ESCAPES, "sites": ["A", "B"]}),
        (admin.main, ["invite", "NAME"], {"name": "NAME", "role": "site", "invitation": ESCAPES, "expires": 1.0}),
    ],
    ids=lambda value: value if isinstance(value, list) else "",
)
def test_no_good_answer_commands_the_terminal_of_a_command(function, arguments, body, hostile_text, shown):
    beside = {
        "outlooks": {"runs": [{"run": ESCAPES, "obstacle": ESCAPES}]},
        "privacy": {"runs": [{"run": ESCAPES, "sites": {}}]},
    }
    hostile_text(lambda handler: send(handler, json.dumps(beside.get(handler.path.rpartition("/")[2], body)).encode()))
    text = shown(function, *arguments)
    assert r"\x1b" in text or r"\u001b" in text


def test_a_join_shows_the_names_of_a_federation_without_commands(hostile_text, shown, tmp_path, monkeypatch):
    settings = {"federation": ESCAPES, "sites": ["A", "B"]}
    credential = hostile_text(
        lambda handler: send(handler, json.dumps({"federation": ESCAPES, "site": "A", "settings": settings}).encode())
    )
    monkeypatch.setenv("nnUNet_fed_site", str(tmp_path / "new" / "site.json"))
    invitation = encode_invitation(Invitation(credential.url, ESCAPES, "A", "s" * 20))
    assert r"has joined \x1b]0;owned" in shown(join.main, invitation)


def test_a_line_of_progress_is_one_printable_line(hostile_text):
    asked = []

    def answer(handler):
        asked.append(handler.path)
        body = (
            {"code": "coordinator_trouble", "message": f"one\n{ESCAPES}"}
            if len(asked) < 3
            else {"federation": "f", "sites": ["A", "B"]}
        )
        send(handler, json.dumps(body).encode(), 503 if len(asked) < 3 else 200)

    lines: list[str] = []
    with make_client(hostile_text(answer), lines) as client:
        client.settings()
    assert lines and all(is_harmless(line) and "\n" not in line for line in lines)


# ----------------------------------------------------------------------------------------------------- printed commands
def parse_prediction(line: str) -> argparse.Namespace:
    """Read a command as a shell and nnUNetv2_predict would."""
    program, *words = shlex.split(line)
    assert program == "nnUNetv2_predict"
    parser = argparse.ArgumentParser()
    for option in ("-d", "-c", "-tr", "-p", "-chk", "-i", "-o"):
        parser.add_argument(option, required=True)
    parser.add_argument("-f", nargs="+")
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("dataset", "trainer", "configuration", "fold"),
    [
        ("Dataset001_x -c 2d; touch pwned #", "T", "2d", "0"),
        ("Dataset001_$(touch pwned)", "T", "`id`", "0"),
        ("Dataset001_'x", "-o", "--help", "-1"),
        ("Dataset001_A", "a\nb", "2d", "0 1 -o x"),
        ("Dataset001_A", "T", "2d", "0"),
    ],
)
def test_commands_to_type_keep_names_of_a_zip_in_their_places(dataset, trainer, configuration, fold, tmp_path):
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr(f"{dataset}/{trainer}__P__{configuration}/fold_{fold}/checkpoint_final.pth", b"x")
    [line] = fetch_model.describe_prediction(tmp_path / "m.zip", dataset)
    read = parse_prediction(line)
    assert is_harmless(line) and "\n" not in line
    assert (read.d, read.tr, read.c, read.f) == (dataset, trainer.replace("\n", " "), configuration, [fold])
    assert (read.p, read.chk, read.i, read.o) == ("P", "checkpoint_final.pth", "IMAGES", "PREDICTIONS")


def zip_of(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        zip_of("Dataset001_A/T__P__2d\x1b[2K/fold_0/checkpoint_final.pth"),
        zip_of("../../evil.pth"),
        zip_of("/etc/evil.pth"),
        zip_of("Dataset001_A/run.sh"),
        zip_of("evil/T__P__2d/fold_0/checkpoint_final.pth"),
        b"no zip file",
    ],
    ids=["unseen", "outside", "absolute", "script", "no dataset", "no zip"],
)
def test_a_model_that_is_none_is_refused_although_nobody_installs_it(content, hostile_text, shown, tmp_path):
    hostile_text(lambda handler: send(handler, content))
    text = shown(fetch_model.main, "RUN")
    assert "error: " in text and "nnUNetv2_predict" not in text and "RUN.zip" in text
    assert list(tmp_path.glob("*.zip")) == [] and [one.name for one in tmp_path.iterdir()] == ["site.json"]
