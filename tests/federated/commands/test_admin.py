"""The operator's command."""

import json
import os
import re
import subprocess
import sys

import pytest
from fake_federation import PROJECT, RUN, in_threads, make_registration, make_settings, served, wait_until

from nnunetv2.federated.commands import admin
from nnunetv2.federated.commands.api_client import OPERATOR_FILE, ask
from nnunetv2.federated.coordinator import members
from nnunetv2.federated.errors import CoordinatorUnreachable, FederationError, NotJoinedError, RefusedError, WireError
from nnunetv2.federated.protocol.invitation import decode_invitation
from nnunetv2.federated.protocol.keys import RegistrationKey
from nnunetv2.federated.site.credential import SiteCredential, load_credential, save_credential
from nnunetv2.federated.site.enrolment import join


@pytest.fixture
def federation(tmp_path):
    with served(tmp_path / "federation", make_settings(sites=("A", "B"))) as federation:
        token = "operator.0123456789abcdef0123456789abcdef"
        federation.coordinator.members.appoint_local_operator(token)
        save_credential(
            SiteCredential(federation.url, "test", "operator", token), tmp_path / "federation" / OPERATOR_FILE
        )
        yield federation


@pytest.fixture
def run(federation, capsys):
    """Run the command and return what it prints."""

    def run_(*arguments: str) -> str:
        admin.main(["--folder", str(federation.coordinator.store.folder), *arguments])
        return capsys.readouterr().out

    return run_


def invitation_in(text: str):
    return decode_invitation(re.search(r"nnUNetv2_fed_join (\S+)", text)[1])


def test_a_new_site_is_invited_and_joins(federation, run, tmp_path):
    invitation = invitation_in(run("invite", "C"))
    assert (invitation.url, invitation.site, invitation.federation) == (federation.url, "C", "test")
    assert "Site C has joined test" in join(invitation, path=tmp_path / "c.json")
    assert federation.coordinator.settings.sites == ("A", "B", "C")


def test_an_observer_may_look_and_not_touch(federation, run, tmp_path):
    assert "Observer eve has joined" in join(
        invitation_in(run("invite", "eve", "--role", "observer")), path=tmp_path / "eve.json"
    )
    from nnunetv2.federated.site.transports.http import HttpTransport

    with HttpTransport(load_credential(tmp_path / "eve.json")) as client:
        assert client.status().federation == "test"
        with pytest.raises(RefusedError, match="this is for sites"):
            client.contribute(RegistrationKey(RUN), make_registration())
    assert federation.coordinator.settings.sites == ("A", "B")


def test_observers_get_a_link_to_the_page_too(federation, run):
    assert f"{federation.url}/#nnunet-fed:" in run("invite", "eve", "--role", "observer")
    assert "/#nnunet-fed:" not in run("invite", "C")


def test_an_operator_elsewhere_uses_its_own_credential(run, tmp_path, monkeypatch, capsys):
    join(invitation_in(run("invite", "chief", "--role", "operator")), path=tmp_path / "chief.json")
    monkeypatch.setenv("nnUNet_fed_site", str(tmp_path / "chief.json"))
    monkeypatch.chdir(tmp_path)
    admin.main(["settings"])
    assert json.loads(capsys.readouterr().out)["sites"] == ["A", "B"]


def test_a_site_is_no_operator(federation, tmp_path):
    credential = federation.credential("A")
    for arguments in (["revoke", "B"], ["invite", "X"], ["settings", "--quorum", "1"], ["pause", RUN]):
        parsed = admin.build_parser().parse_args(arguments)
        with pytest.raises(RefusedError) as info:
            parsed.function(credential, parsed)
        assert info.value.code == "forbidden"


def test_a_revoked_site_is_told_so(federation, run):
    from nnunetv2.federated.errors import NotJoinedError as Unknown

    with federation.client("A") as client:
        client.settings()
        assert "is revoked" in run("revoke", "A")
        with pytest.raises(Unknown, match="revoked"):
            client.settings()
    with pytest.raises(RefusedError, match="no member 'nobody'"):
        run("revoke", "nobody")


def test_settings_are_changed_one_by_one(run):
    assert json.loads(run("settings", "--quorum", "2", "--deadline", "60"))["quorum"] == 2
    changed = json.loads(run("settings", "--late-updates", "carry"))
    assert (changed["quorum"], changed["deadline_s"], changed["late_updates"]) == (2, 60.0, "carry")
    assert json.loads(run("settings", "--wait-for-all"))["quorum"] is None
    assert json.loads(run("settings"))["min_sites"] == 2
    with pytest.raises(WireError, match="the command line is not valid: quorum"):
        run("settings", "--quorum", "0")
    with pytest.raises(RefusedError, match="--quorum 1 is less than --min-sites 2"):
        run("settings", "--quorum", "1", "--deadline", "60")


def test_a_run_is_steered(federation, run):
    with federation.client("A") as a, federation.client("B") as b:
        in_threads(
            lambda: a.exchange(RegistrationKey(RUN), make_registration()),
            lambda: b.exchange(RegistrationKey(RUN), make_registration()),
        )
    wait_until(lambda: federation.coordinator.book.is_closed(RegistrationKey(RUN)))
    assert f"run {RUN}: paused, 0 of 3 rounds closed" in run("pause", RUN)
    assert "running" in run("resume", RUN)
    assert "running" in run("reset", RUN)
    with pytest.raises(RefusedError, match="there is no run"):
        run("pause", RUN)


def test_without_a_coordinator_the_way_out_is_named(tmp_path):
    with pytest.raises(NotJoinedError, match="start nnUNetv2_fed_coordinator --folder"):
        admin.main(["--folder", str(tmp_path), "settings"])
    save_credential(SiteCredential("http://127.0.0.1:9", "test", "operator", "operator.x"), tmp_path / OPERATOR_FILE)
    with pytest.raises(CoordinatorUnreachable, match="Is it running"):
        admin.main(["--folder", str(tmp_path), "settings"])


def test_settings_without_effect_are_refused(federation, run):
    for options in (["--deadline", "60"], ["--late-updates", "carry"], ["--wait-for-all", "--deadline", "60"]):
        with pytest.raises(FederationError, match="--quorum"):
            run("settings", *options)
    assert federation.coordinator.settings.deadline_s is None


def test_the_command_runs_with_little_more_than_the_standard_library():
    code = (
        "import sys\nfor name in ('torch', 'requests', 'numpy'): sys.modules[name] = None\n"
        "from nnunetv2.federated.commands.admin import main; main(['-h'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, env=os.environ)
    assert done.returncode == 0 and "invite" in done.stdout, done.stderr


def test_a_token_is_not_sent_to_where_an_answer_points(tmp_path):
    """A proxy that sends everybody elsewhere gets no credential there."""
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    asked = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/stolen")
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        credential = SiteCredential(f"http://127.0.0.1:{server.server_port}", "test", "A", "A.secret")
        with pytest.raises(FederationError, match="answers with status 302.*not as a coordinator would"):
            ask(credential, "GET", "status")
        server.shutdown()
    assert asked == ["/v1/status"]


def test_no_more_sites_are_invited_than_the_status_can_show(federation, run, monkeypatch):
    """Else the settings could be written, and not be read again."""
    monkeypatch.setattr(members, "MAX_SITES", 3)
    run("invite", "C"), run("revoke", "C"), run("invite", "C"), run("invite", "eve", "--role", "observer")
    with pytest.raises(RefusedError, match="there are 3 sites") as info:
        run("invite", "D")
    assert info.value.code == "too_many_sites"
