"""The page's HTTP side: login and sessions, the JSON behind it, and what the browser is allowed to do."""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import requests
from fake_federation import PROJECT, RUN, in_threads, make_settings, served, train, wait_until
from patience import MUCH_LONGER_S, PATIENCE_S

from nnunetv2.federated.coordinator.dashboard import login_sessions, pages
from nnunetv2.federated.coordinator.dashboard.audit_tail import LogTail
from nnunetv2.federated.coordinator.dashboard.login_sessions import LoginRequest, LoginSessions
from nnunetv2.federated.coordinator.dashboard.overview import OverviewBuilder
from nnunetv2.federated.coordinator.dashboard.pages import Dashboard
from nnunetv2.federated.coordinator.http.rate_limits import Limits
from nnunetv2.federated.coordinator.http.services import Services
from nnunetv2.federated.coordinator.storage.audit_log import Event
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.protocol.api import FailureReport


def new_token(name: str) -> str:
    return f"{name}.{secrets.token_urlsafe(32)}"


class Watcher:
    """A browser, as far as HTTP goes."""

    def __init__(self, federation, name: str = "eve", role: str = "observer") -> None:
        self.base = f"{federation.url}/v1"
        self.token = new_token(name)
        self.invitation = federation.coordinator.invite(name, role, by="boss")
        self.session = requests.Session()

    def log_in(self, **others) -> requests.Response:
        return self.session.post(f"{self.base}/session", json={"token": self.token, **others}, timeout=PATIENCE_S)

    def enrol(self) -> requests.Response:
        return self.log_in(invitation=self.invitation)

    def get(self, path: str, **options) -> requests.Response:
        return self.session.get(f"{self.base}/{path}", timeout=PATIENCE_S, **options)


@pytest.fixture
def federation(tmp_path):
    with served(tmp_path / "federation", make_settings()) as federation:
        yield federation


@pytest.fixture
def eve(federation):
    """An observer who has logged in."""
    eve = Watcher(federation)
    assert eve.enrol().status_code == 200
    return eve


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A federation with a run of three rounds that is over, and an observer."""
    with served(tmp_path_factory.mktemp("done") / "federation", make_settings()) as federation:
        with federation.client("A") as a, federation.client("B") as b:
            in_threads(
                lambda: train(a, seed=1, num_rounds=3, num_cases=1), lambda: train(b, seed=2, num_rounds=3, num_cases=3)
            )
        wait_until(lambda: federation.state.store.load_events("model"))  # written behind the last round
        eve = Watcher(federation)
        eve.enrol()
        yield SimpleNamespace(federation=federation, eve=eve, coordinator=federation.coordinator)


# ------------------------------------------------------------------------------------------------------------ login
def test_an_invitation_becomes_a_session_and_a_token(federation):
    eve = Watcher(federation)
    answer = eve.enrol()
    assert answer.status_code == 200
    assert (answer.json()["name"], answer.json()["role"], answer.json()["federation"]) == ("eve", "observer", "test")
    assert eve.get("overview").status_code == 200
    assert eve.enrol().status_code == 200, "the same invitation and token again: the answer may have been lost"
    eve.session.cookies.clear()
    assert eve.get("overview").status_code == 401
    assert eve.log_in().status_code == 200
    assert eve.get("overview").status_code == 200


def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites(federation):
    cookie = Watcher(federation).enrol().headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "Max-Age=43200" in cookie
    assert "Path" not in cookie and "Domain" not in cookie, "so it works under the prefix of a proxy"
    assert "Secure" not in cookie


def make_dashboard(federation, url: str) -> Dashboard:
    return Dashboard(federation.coordinator, Services(federation.coordinator), url=url)


def test_with_tls_the_cookie_is_for_tls_only(federation):
    assert make_dashboard(federation, "https://fed.example/prefix").is_secure
    assert not make_dashboard(federation, "http://127.0.0.1:8750").is_secure


def test_logging_out_ends_the_session(eve):
    cookies = eve.session.cookies.copy()
    assert eve.get("session").json()["name"] == "eve"
    assert eve.session.delete(f"{eve.base}/session", timeout=PATIENCE_S).status_code == 204
    assert not eve.session.cookies
    eve.session.cookies = cookies
    assert eve.get("session").status_code == 401


def test_nobody_is_logged_in_at_first(federation):
    answer = requests.get(f"{federation.url}/v1/session", timeout=PATIENCE_S)
    assert (answer.status_code, answer.content) == (204, b"")


def test_a_revoked_observer_sees_no_more(federation, eve):
    assert eve.get("overview").status_code == 200
    federation.coordinator.revoke("eve", by="boss")
    assert eve.get("overview").status_code == 401
    assert eve.get("overview", headers={"Authorization": f"Bearer {eve.token}"}).status_code == 401


def test_a_new_token_ends_the_sessions_of_the_old_one(federation, eve):
    secret = federation.coordinator.invite("eve", "observer", by="boss")
    assert eve.get("overview").status_code == 200
    old, eve.token = eve.session.cookies.copy(), new_token("eve")
    assert eve.log_in(invitation=secret).status_code == 200
    eve.session.cookies = old
    assert eve.get("overview").status_code == 401


def test_a_session_looks_and_does_nothing_else(federation):
    chief = Watcher(federation, "chief", "operator")
    assert chief.enrol().json()["role"] == "operator"
    assert chief.get("overview").status_code == 200
    for method, path in (
        ("POST", "members"),
        ("PATCH", "settings"),
        ("DELETE", "members/A"),
        ("GET", "settings"),
        ("POST", f"runs/{RUN}/actions"),
        ("GET", "../metrics"),
    ):
        assert chief.session.request(method, f"{chief.base}/{path}", json={}, timeout=PATIENCE_S).status_code == 401


def test_a_site_may_not_look(federation):
    token = federation.credential("A").token
    headers = {"Authorization": f"Bearer {token}"}
    for path in ("v1/overview", f"v1/runs/{RUN}/curves", "metrics"):
        assert requests.get(f"{federation.url}/{path}", headers=headers, timeout=PATIENCE_S).status_code == 403
    answer = requests.post(f"{federation.url}/v1/session", json={"token": token}, timeout=PATIENCE_S)
    assert answer.status_code == 403 and "this is for observers and operators" in answer.json()["message"]
    assert "set-cookie" not in answer.headers


def test_the_invitation_of_a_site_is_not_used_up_by_the_page(federation):
    secret = federation.invitations()["B"]
    answer = requests.post(
        f"{federation.url}/v1/session", json={"token": new_token("B"), "invitation": secret}, timeout=PATIENCE_S
    )
    assert answer.status_code == 403 and "nnUNetv2_fed_join" in answer.json()["remedy"]
    assert federation.invitations()["B"] == secret


@pytest.mark.parametrize(
    "change",
    [
        {"token": "eve.wrongwrongwrong"},
        {"invitation": "no-such-invitation"},
        {"token": new_token("adam"), "invitation": "no-such-invitation"},
    ],
)
def test_wrong_secrets_are_refused(federation, change):
    eve = Watcher(federation)
    answer = eve.log_in(**change)
    assert answer.status_code in (401, 403) and "set-cookie" not in answer.headers


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b'{"token": 1}',
        b'{"token": "a"}',
        b'{"token": "' + b"x" * 501 + b'"}',
        b'{"token": "eve.0123456789abcdef", "more": 1}',
    ],
)
def test_nonsense_is_refused(federation, body):
    answer = requests.post(
        f"{federation.url}/v1/session", data=body, headers={"Content-Type": "application/json"}, timeout=PATIENCE_S
    )
    assert answer.status_code == 400 and answer.json()["code"] == "invalid"


def test_a_login_comes_from_the_page_itself(federation, eve):
    for headers, status in (
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Type": "text/plain"}, 400),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
    ):
        headers = {"Content-Type": "application/json", **headers}
        answer = requests.post(
            f"{federation.url}/v1/session", data=f'{{"token": "{eve.token}"}}', headers=headers, timeout=PATIENCE_S
        )
        assert answer.status_code == status
    answer = eve.session.delete(f"{eve.base}/session", headers={"Sec-Fetch-Site": "cross-site"}, timeout=PATIENCE_S)
    assert answer.status_code == 403 and eve.get("overview").status_code == 200


def test_who_fails_too_often_has_to_wait(federation, eve):
    for _ in range(login_sessions.MAX_ATTEMPTS):
        assert Watcher.log_in(SimpleNamespace(**{**vars(eve), "token": new_token("eve")})).status_code == 401
    answer = Watcher.log_in(SimpleNamespace(**{**vars(eve), "token": new_token("eve")}))
    assert answer.status_code == 429 and "Try again in" in answer.json()["remedy"]
    assert eve.get("overview").status_code == 200, "who is logged in is not concerned"
    assert eve.log_in().status_code == 200, "nor who has the right token"


def test_nothing_that_is_for_somebody_is_kept_in_between(federation, eve):
    for answer in (
        eve.get("session"),
        eve.get("overview"),
        eve.get("status"),
        requests.get(f"{eve.base}/status"),
        requests.get(f"{eve.base}/session"),
    ):
        assert answer.headers["cache-control"] == "no-store"


def test_a_flood_of_strangers_does_not_lock_viewers_out(tmp_path):
    limits = Limits(stranger_requests_at_once=5.0, stranger_requests_per_s=0.001)
    with served(tmp_path / "federation", make_settings(), limits) as federation:
        eve = Watcher(federation)
        eve.enrol()
        statuses = [requests.get(f"{federation.url}/v1/session", timeout=PATIENCE_S).status_code for _ in range(10)]
        assert statuses[0] == 204 and statuses[-1] == 429
        assert eve.get("overview").status_code == 200


# --------------------------------------------------------------------------------------- sessions, without a network
class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clocked(federation):
    """Sessions whose time is set by hand, and the login of an observer."""
    clock = Clock()
    federation.state.clock = clock
    token = new_token("adam")
    secret = federation.coordinator.invite("adam", "observer", by="boss")
    federation.coordinator.members.join(secret, token)
    return SimpleNamespace(sessions=LoginSessions(federation.coordinator), clock=clock, login=LoginRequest(token=token))


def test_sessions_end_by_themselves(clocked):
    cookie, viewer = clocked.sessions.log_in(clocked.login, address="x")
    assert viewer.expires == clocked.clock.now + login_sessions.SESSION_S
    for _ in range(10):
        clocked.clock.now += 3600
        clocked.sessions.viewer(cookie)
    clocked.clock.now += 2 * 3600
    with pytest.raises(RefusedError, match="nobody is logged in"):
        clocked.sessions.viewer(cookie)


def test_a_session_that_nobody_uses_ends_early(clocked):
    cookie, _ = clocked.sessions.log_in(clocked.login, address="x")
    clocked.clock.now += login_sessions.IDLE_S - 1
    assert clocked.sessions.count() == 1
    clocked.clock.now += 2
    assert clocked.sessions.count() == 0
    with pytest.raises(RefusedError):
        clocked.sessions.viewer(cookie)


def test_the_number_of_sessions_is_bounded(clocked, monkeypatch):
    monkeypatch.setattr(login_sessions, "MAX_SESSIONS", 3)
    cookies = []
    for _ in range(5):
        clocked.clock.now += 1
        cookies.append(clocked.sessions.log_in(clocked.login, address="x")[0])
    assert clocked.sessions.count() == 3
    for cookie in cookies[2:]:
        clocked.sessions.viewer(cookie)


def test_nobody_ends_the_sessions_of_others_by_logging_in(clocked, federation, monkeypatch):
    monkeypatch.setattr(login_sessions, "MAX_SESSIONS", 3)
    own, _ = clocked.sessions.log_in(clocked.login, address="x")
    token = new_token("mallory")
    federation.coordinator.members.join(federation.coordinator.invite("mallory", "observer", by="boss"), token)
    for _ in range(5):
        clocked.clock.now += 1
        clocked.sessions.log_in(LoginRequest(token=token), address="y")
    assert clocked.sessions.count() == 4
    clocked.sessions.viewer(own)


def test_failures_are_forgotten_after_a_while_and_counted_by_address(clocked, monkeypatch):
    wrong = LoginRequest(token=new_token("adam"))
    for _ in range(login_sessions.MAX_ATTEMPTS):
        with pytest.raises(RefusedError, match="does not know"):
            clocked.sessions.log_in(wrong, address="10.0.0.1")
    with pytest.raises(RefusedError, match="too many failed logins"):
        clocked.sessions.log_in(wrong, address="10.0.0.1")
    with pytest.raises(RefusedError, match="does not know"):
        clocked.sessions.log_in(wrong, address="10.0.0.2")
    clocked.clock.now += login_sessions.ATTEMPTS_S
    with pytest.raises(RefusedError, match="does not know"):
        clocked.sessions.log_in(wrong, address="10.0.0.1")


def test_who_has_a_network_of_addresses_counts_as_one(clocked):
    for number in range(login_sessions.MAX_ATTEMPTS + 1):
        with pytest.raises(RefusedError) as info:
            clocked.sessions.log_in(LoginRequest(token=new_token("adam")), address=f"2001:db8::{number}")
    assert info.value.code == "too_many_attempts"


def test_logging_in_again_ends_the_session_before(federation, eve):
    before = eve.session.cookies.copy()
    assert eve.log_in().status_code == 200 and eve.get("overview").status_code == 200
    eve.session.cookies = before
    assert eve.get("overview").status_code == 401


def test_a_database_that_is_locked_for_a_while_does_not_end_the_daily_head(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "HEAD_EVERY_S", 0.05)
    monkeypatch.setattr(LogTail, "read_on", fails_twice(LogTail.read_on))
    with served(tmp_path / "federation", make_settings()) as federation:
        wait_until(lambda: any("the head of line" in line for line in federation.lines))
        assert "it cannot be read at the moment: the database" in federation.lines[0]


def fails_twice(function):
    calls = []

    def failing(*args):
        calls.append(args)
        if len(calls) <= 2:
            raise OSError("the database of the federation: database is locked")
        return function(*args)

    return failing


def test_the_memory_of_failures_is_bounded(monkeypatch):
    monkeypatch.setattr(login_sessions, "MAX_ADDRESSES", 4)
    attempts = login_sessions.Attempts()
    for number in range(100):
        attempts.failed(f"10.0.0.{number}", 1.0)
    assert len(attempts._failures) == 4


# --------------------------------------------------------------------------------------------------- the page itself
def test_the_page_is_one_file_that_may_run_nothing_but_itself(federation):
    answer = requests.get(f"{federation.url}/", timeout=PATIENCE_S)
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_the_page_needs_nothing_from_elsewhere_and_knows_no_secrets(federation):
    text = pages.page()[0]
    outside = [url for url in re.findall(r"https?://[^\s'\"]+", text) if url != "http://www.w3.org/2000/svg"]
    assert outside == []
    assert not re.search(r"\son[a-z]+=|style=|javascript:|innerHTML|eval\(|localStorage", text)
    assert "test" not in requests.get(f"{federation.url}/", timeout=PATIENCE_S).text.partition("<script>")[0]


def test_the_page_comes_with_the_package():
    code = (
        "from setuptools import Distribution; import runpy, setuptools, json\n"
        "seen = {}\nsetuptools.setup = lambda **options: seen.update(options)\nrunpy.run_path('setup.py')\n"
        "print(json.dumps(seen['package_data']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert '"nnunetv2.federated.coordinator.dashboard": ["static/*"]' in done.stdout


# -------------------------------------------------------------------------------------------------------------- JSON
def test_the_overview_tells_of_sites_and_runs(done):
    seen = done.eve.get("overview").json()
    assert [site["site"] for site in seen["sites"]] == ["A", "B"]
    assert all(site["state"] == "active" and site["bytes_received"] > 0 for site in seen["sites"])
    (run,) = seen["runs"]
    assert (run["run"], run["state"], run["rounds_closed"], run["num_rounds"]) == (RUN, "complete", 3, 3)
    assert run["meeting"] is None and "checkpoint" not in run["model"] and "model written to" in run["model"]
    assert seen["troubles"] == [] and seen["health"]["log_lines"] > 10
    assert seen["health"]["log_head"] == done.coordinator.state.store.load_log()[-1][-1]


def test_no_secrets_in_the_json(done):
    secrets_ = [done.federation.credential(site).token for site in "AB"] + [done.eve.token, done.eve.invitation]
    invited = done.coordinator.invite("C", "observer", by="boss")
    for path in ("overview", f"runs/{RUN}/curves", "session"):
        text = done.eve.get(path).text
        assert not any(
            secret in text or hashlib.sha256(secret.encode()).hexdigest() in text for secret in [*secrets_, invited]
        )


def test_a_bearer_token_does_as_well(done):
    headers = {"Authorization": f"Bearer {done.eve.token}"}
    answer = requests.get(f"{done.federation.url}/v1/overview", headers=headers, timeout=PATIENCE_S)
    assert answer.json()["federation"] == "test"


def test_figures_are_for_the_token_of_an_observer(done):
    headers = {"Authorization": f"Bearer {done.eve.token}"}
    answer = requests.get(f"{done.federation.url}/metrics", headers=headers, timeout=PATIENCE_S)
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert f'nnunet_fed_rounds_closed_total{{run="{RUN}"}} 3.0\n' in answer.text
    assert done.eve.token not in answer.text
    for headers in (
        {},
        {"Authorization": "Bearer eve.wrong"},
        {"Cookie": "; ".join(f"{cookie.name}={cookie.value}" for cookie in done.eve.session.cookies)},
    ):
        assert requests.get(f"{done.federation.url}/metrics", headers=headers, timeout=PATIENCE_S).status_code == 401


def test_curves_have_each_site_and_the_mean(done):
    curves = done.eve.get(f"runs/{RUN}/curves").json()
    assert [one["round"] for one in curves["rounds"]] == [0, 1, 2] and curves["more"] is False
    last = curves["rounds"][2]
    assert last["sites"]["A"]["metrics"] == {"loss": 3.0} and last["sites"]["B"]["metrics"] == {"loss": 4.0}
    assert last["pooled"] == {"loss": (1 * 3.0 + 3 * 4.0) / 4}
    assert last["sites"]["B"]["weight"] == 3.0 and last["sites"]["B"]["bytes"] > 0
    assert last["opened"] <= last["sites"]["A"]["received"] <= last["closed"]


def test_curves_go_on_where_one_has_them(done, monkeypatch):
    assert [one["round"] for one in done.eve.get(f"runs/{RUN}/curves?since=2").json()["rounds"]] == [2]
    assert done.eve.get(f"runs/{RUN}/curves?since=3").json()["rounds"] == []
    monkeypatch.setattr("nnunetv2.federated.coordinator.dashboard.curves.ROUNDS_AT_ONCE", 2)
    first = done.eve.get(f"runs/{RUN}/curves").json()
    assert [one["round"] for one in first["rounds"]] == [0, 1] and first["more"] is True


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("runs/none/curves", 404),
        (f"runs/{RUN}/curves?since=-1", 400),
        (f"runs/{RUN}/curves?since=x", 400),
        ("overview?wait=soon", 400),
        ("overview?wait=1e9", 400),
    ],
)
def test_odd_questions_get_an_answer(done, path, status):
    answer = done.eve.get(path)
    assert answer.status_code == status and answer.json()["code"]


# -------------------------------------------------------------------------------------------------------------- live
@pytest.mark.slow
def test_who_has_seen_everything_waits_for_news(federation, eve, monkeypatch):
    seen = eve.get("overview").json()["revision"]
    begin = time.monotonic()
    assert eve.get(f"overview?seen={seen}&wait=0.7").json()["revision"] == seen
    assert time.monotonic() - begin > 0.6
    monkeypatch.setattr("nnunetv2.federated.coordinator.dashboard.pages.LONGEST_WAIT_S", MUCH_LONGER_S)
    threading.Timer(0.3, lambda: federation.coordinator.notifier.notify("fingerprint/census")).start()
    assert eve.get(f"overview?seen={seen}&wait={MUCH_LONGER_S}").json()["revision"] != seen


def test_who_has_seen_something_else_is_answered_at_once(eve, monkeypatch):
    monkeypatch.setattr("nnunetv2.federated.coordinator.dashboard.pages.LONGEST_WAIT_S", MUCH_LONGER_S)
    assert eve.get(f"overview?seen=something-else&wait={MUCH_LONGER_S}").status_code == 200


@pytest.mark.slow
def test_a_failure_wakes_the_viewers(federation, eve):
    seen = eve.get("overview").json()["revision"]
    with federation.client("A") as a, federation.client("B") as b:
        in_threads(lambda: train(a, seed=1, num_rounds=1), lambda: train(b, seed=2, num_rounds=1))
        news = eve.get(f"overview?seen={seen}&wait=20").json()
        federation.coordinator.report_failure("A", FailureReport(run=RUN, round=1, reason="out of memory"))
    wait_until(lambda: eve.get("overview").json()["troubles"])
    news = eve.get("overview").json()
    assert (news["troubles"][0]["kind"], news["troubles"][0]["site"], news["troubles"][0]["text"]) == (
        "failure",
        "A",
        "out of memory",
    )
    (member,) = [one for one in news["runs"][0]["members"] if one["site"] == "A"]
    assert (member["activity"], member["note"]) == ("failed", "out of memory")
    assert news["runs"][0]["meeting"]["waiting_for"] == ["A", "B"]


@pytest.mark.slow
def test_many_viewers_share_one_look_and_cost_no_threads(federation, eve, monkeypatch):
    looks = []
    build = OverviewBuilder.build
    monkeypatch.setattr(OverviewBuilder, "build", lambda self, revision="": (looks.append(1), build(self, revision))[1])
    seen = eve.get("overview").json()["revision"]
    before, results, waiting = threading.active_count(), [], []
    changes = federation.coordinator.notifier
    expect = changes.expect
    monkeypatch.setattr(changes, "expect", lambda key: (waiting.append(key), expect(key))[1])
    headers = {"Authorization": f"Bearer {eve.token}"}

    def watch() -> None:
        url = f"{eve.base}/overview?seen={seen}&wait=20"
        results.append(requests.get(url, headers=headers, timeout=PATIENCE_S).json()["revision"])

    viewers = [threading.Thread(target=watch) for _ in range(20)]
    for viewer in viewers:
        viewer.start()
    wait_until(lambda: len(waiting) == len(viewers))
    assert threading.active_count() - before <= len(viewers) + 2, "the server's threads do not grow with its viewers"
    looks.clear()
    federation.coordinator.notifier.notify("fingerprint/census")
    for viewer in viewers:
        viewer.join(PATIENCE_S)
    assert len(results) == 20 and seen not in results
    assert len(looks) <= 2


@pytest.mark.slow
def test_the_head_of_the_log_is_told_at_the_start_and_every_day(federation, monkeypatch):
    wait_until(lambda: any(line.startswith("audit log: the head of line 1 is ") for line in federation.lines))
    federation.state.store.add_event(Event(1.0, "test", None, None, {}))
    import asyncio

    monkeypatch.setattr(pages, "HEAD_EVERY_S", 0.01)
    dashboard = make_dashboard(federation, federation.url)

    async def two_days() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(dashboard.log_head_daily(), 0.3)

    asyncio.run(two_days())
    head = federation.state.store.load_log()[-1][-1]
    assert federation.lines.count(f"audit log: the head of line 2 is {head}") >= 2
