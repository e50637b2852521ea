"""Serve the page, what it shows as JSON, its sessions, and the figures for Prometheus.

    GET    /                           the page: one file that needs nothing else; it shows nothing without a login
    POST   /v1/session                 {token, invitation} -> who has logged in, and a cookie
    GET    /v1/session                 who is logged in; 204 where nobody is
    DELETE /v1/session                 log out
    GET    /v1/overview?seen=&wait=    what the federation is doing; waits until that is not what was seen
    GET    /v1/runs/<run>/curves?since=&since_validation=    what the sites measured, from these rounds on
    GET    /metrics                    the same as figures

The JSON is for observers and operators, with a session or a bearer token; the figures need a bearer token. Sites are
neither: what the others measured is not theirs to see, unless the operator invites one of their people as an observer.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections import Counter
from functools import cache
from importlib.resources import files
from urllib.parse import urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from nnunetv2.federated.coordinator.dashboard import prometheus
from nnunetv2.federated.coordinator.dashboard.curves import draw
from nnunetv2.federated.coordinator.dashboard.login_sessions import SESSION_S, LoginRequest, Sessions
from nnunetv2.federated.coordinator.dashboard.overview import Board, Lookout
from nnunetv2.federated.coordinator.http.error_responses import json_response
from nnunetv2.federated.coordinator.http.notifications import Changes
from nnunetv2.federated.coordinator.http.request_bodies import read_json
from nnunetv2.federated.coordinator.members import Member
from nnunetv2.federated.coordinator.service import Coordinator, require_role
from nnunetv2.federated.errors import RefusedError

LONGEST_WAIT_S = 25.0
HEAD_EVERY_S = 86_400.0
"""Between two lines in the coordinator's output that tell the head of the audit log."""


class Observatory:
    """Everything that people who look at a coordinator share."""

    def __init__(self, coordinator: Coordinator, changes: Changes, *, url: str) -> None:
        self.coordinator = coordinator
        self._changes = changes
        self.lookout = Lookout(coordinator)
        self.board = Board(self.lookout, changes)
        self.sessions = Sessions(coordinator)
        self.refusals: Counter[str] = Counter()
        """Requests that were refused, by code."""
        parts = urlsplit(url)
        self.is_secure = parts.scheme == "https"
        # Cookies do not know ports: two federations of one machine must not take each other's.
        federation = hashlib.sha256(coordinator.settings.federation.encode()).hexdigest()[:8]
        self.cookie = f"nnunet_fed_{federation}"

    def identify(self, connection: Scope) -> str | None:
        """Return whose session a request shows, or None."""
        try:
            return self.sessions.viewer(HTTPConnection(connection).cookies[self.cookie]).name
        except (KeyError, RefusedError):
            return None

    def listen(self) -> None:
        """Wake who looks on whenever the person at the coordinator is told something: that is news for them too."""
        announce = self.coordinator.announce

        def announce_to_all(line: str) -> None:
            announce(line)
            self._changes.notify("")

        self.coordinator.announce = announce_to_all

    async def tell_head_daily(self) -> None:
        """Tell the person at the coordinator, now and every day, the hash that is to be noted elsewhere."""
        while True:
            tail = self.lookout.tail
            try:
                await run_in_threadpool(tail.read_on)
                self.coordinator.announce(f"audit log: the head of line {tail.number} is {tail.head}")
            except OSError as error:
                self.coordinator.announce(f"audit log: it cannot be read at the moment: {error}")
            await asyncio.sleep(HEAD_EVERY_S)


# ------------------------------------------------------------------------------------------------------ who looks
def observatory_of(request: HTTPConnection) -> Observatory:
    """Return what the people who look share."""
    return request.app.state.observatory


def bearer_of(request: Request) -> Member:
    """Return the observer or operator whose bearer token a request shows."""
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    member = observatory_of(request).coordinator.members.authenticate(token if kind.lower() == "bearer" else "")
    return _admitted(request, member)


def viewer_of(request: Request) -> Member:
    """Return the observer or operator that sends a request, by bearer token or by session."""
    observatory = observatory_of(request)
    if "authorization" in request.headers:
        return bearer_of(request)
    viewer = observatory.sessions.viewer(request.cookies.get(observatory.cookie, ""))
    return _admitted(request, Member(viewer.name, viewer.role))


def _admitted(request: Request, member: Member) -> Member:
    require_role(member, "observer", "operator")
    request.scope["member"] = member.name  # for the count of traffic
    return member


def _check_same_origin(request: Request) -> None:
    """Refuse what another site makes the browser send. The browser says so itself; programs do not."""
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise RefusedError("this request comes from another site", code="forbidden")


# ------------------------------------------------------------------------------------------------------- handlers
async def get_page(request: Request) -> Response:
    """Send the page."""
    body, policy = page()
    return Response(
        body,
        media_type="text/html",
        headers={
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "X-Frame-Options": "DENY",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-cache",
            "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
        },
    )


async def post_session(request: Request) -> Response:
    """Log in."""
    _check_same_origin(request)
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise RefusedError("a login is sent as application/json", code="incomplete_request")
    observatory = observatory_of(request)
    login = await read_json(request, LoginRequest)
    address = request.client.host if request.client else ""
    cookie, viewer = await run_in_threadpool(observatory.sessions.log_in, login, address=address)
    observatory.sessions.log_out(request.cookies.get(observatory.cookie, ""))  # the one that this cookie replaces
    answer = json_response(viewer)
    # No path: the browser sends the cookie to where it comes from, /v1/..., under whatever prefix a proxy adds.
    answer.set_cookie(
        observatory.cookie,
        cookie,
        max_age=int(SESSION_S),
        path=None,
        secure=observatory.is_secure,
        httponly=True,
        samesite="strict",
    )
    return answer


async def get_session(request: Request) -> Response:
    """Say who is logged in."""
    observatory = observatory_of(request)
    cookie = request.cookies.get(observatory.cookie)
    if cookie is None:  # no error: it is what the page asks first
        return Response(status_code=204, headers={"Cache-Control": "no-store"})
    return json_response(observatory.sessions.viewer(cookie))


async def delete_session(request: Request) -> Response:
    """Log out."""
    _check_same_origin(request)
    observatory = observatory_of(request)
    observatory.sessions.log_out(request.cookies.get(observatory.cookie, ""))
    answer = Response(status_code=204)
    answer.set_cookie(
        observatory.cookie, "", max_age=0, path=None, secure=observatory.is_secure, httponly=True, samesite="strict"
    )
    return answer


async def get_overview(request: Request) -> Response:
    """Tell an observer what the federation is doing; wait for news if there are none."""
    viewer_of(request)
    board = observatory_of(request).board
    await board.wait(request.query_params.get("seen", ""), min(_number(request, "wait"), LONGEST_WAIT_S))
    viewer_of(request)  # it may have been revoked meanwhile
    return Response(await board.read(), media_type="application/json", headers={"Cache-Control": "no-store"})


async def get_curves(request: Request) -> Response:
    """Tell an observer what the sites measured in a run."""
    viewer_of(request)
    since = int(_number(request, "since"))
    validations = int(_number(request, "since_validation")) if "since_validation" in request.query_params else since
    coordinator, run = observatory_of(request).coordinator, request.path_params["run"]
    curves = await run_in_threadpool(
        lambda: json_response(draw(coordinator, run, since=since, since_validation=validations))
    )
    return curves


async def get_metrics(request: Request) -> Response:
    """Tell Prometheus."""
    bearer_of(request)
    observatory = observatory_of(request)
    overview = await observatory.board.overview()
    text = await run_in_threadpool(
        lambda: prometheus.encode(
            prometheus.figures(
                overview,
                observatory.lookout,
                refusals=observatory.refusals.copy(),
                sessions=observatory.sessions.count(),
            )
        )
    )
    return Response(text, headers={"Content-Type": prometheus.CONTENT_TYPE, "Cache-Control": "no-store"})


def _number(request: Request, name: str) -> float:
    text = request.query_params.get(name, "0")
    if not re.fullmatch(r"[0-9]{1,8}(\.[0-9]{1,6})?", text):
        raise RefusedError(f"{name} must be a number, not {text[:40]!r}", code="incomplete_request")
    return float(text)


ROUTES = [
    Route("/", get_page),
    Route("/metrics", get_metrics),
    Route("/v1/session", post_session, methods=["POST"]),
    Route("/v1/session", get_session),
    Route("/v1/session", delete_session, methods=["DELETE"]),
    Route("/v1/overview", get_overview),
    Route("/v1/runs/{run}/curves", get_curves),
]


# ------------------------------------------------------------------------------------------------------- the file
@cache
def page() -> tuple[str, str]:
    """Return the page, in one piece, and the policy that lets the browser run nothing but what is in it."""
    folder = files("nnunetv2.federated.coordinator.dashboard") / "static"
    text, style, script = ((folder / f"page.{ending}").read_text(encoding="utf-8") for ending in ("html", "css", "js"))
    body = text.replace("/* page.css */", style).replace("/* page.js */", script)
    return body, (
        f"default-src 'none'; script-src {_hash_source(script)}; style-src {_hash_source(style)}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    )


def _hash_source(text: str) -> str:
    """Return what names a script or style in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
