"""Serve the dashboard: the page, its JSON, login sessions, Prometheus figures.

    GET    /                           the page: one file that needs nothing else; it shows nothing without a login
    POST   /v1/session                 {token, invitation} -> who has logged in, and a cookie
    GET    /v1/session                 who is logged in; 204 where nobody is
    DELETE /v1/session                 log out
    GET    /v1/overview?seen=&wait=    the state of the federation; waits until it differs from the seen one
    GET    /v1/runs/<run>/curves?since=&since_validation=    the sites' measurements, from these rounds on
    GET    /metrics                    the same as figures

The JSON is for observers and operators, with a session or a bearer token; the figures need a bearer token. Sites are
neither: they do not see the others' measurements, unless the operator invites one of their people as an observer.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from functools import cache
from importlib.resources import files
from urllib.parse import urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from nnunetv2.federated.coordinator.dashboard import prometheus
from nnunetv2.federated.coordinator.dashboard.curves import build_curves
from nnunetv2.federated.coordinator.dashboard.login_sessions import SESSION_S, LoginRequest, LoginSessions
from nnunetv2.federated.coordinator.dashboard.overview import OverviewBuilder, OverviewCache
from nnunetv2.federated.coordinator.http.authentication import member_of
from nnunetv2.federated.coordinator.http.error_responses import json_response
from nnunetv2.federated.coordinator.http.request_bodies import read_json
from nnunetv2.federated.coordinator.http.services import Services
from nnunetv2.federated.coordinator.http.traffic_meter import traffic_of
from nnunetv2.federated.coordinator.members import Member, require_role
from nnunetv2.federated.coordinator.service import Coordinator
from nnunetv2.federated.errors import RefusedError

LONGEST_WAIT_S = 25.0
HEAD_EVERY_S = 86_400.0
"""Between two lines in the coordinator's output that tell the head of the audit log."""


class Dashboard:
    """The page and its JSON, for people who look on."""

    def __init__(self, coordinator: Coordinator, services: Services, *, url: str) -> None:
        self.overview = OverviewCache(OverviewBuilder(coordinator), coordinator.notifier)
        self.sessions = LoginSessions(coordinator)
        self._coordinator = coordinator
        self._refusals = services.refusals
        self.is_secure = urlsplit(url).scheme == "https"
        # Cookies do not know ports: two federations of one machine must not take each other's.
        federation = hashlib.sha256(coordinator.settings.federation.encode()).hexdigest()[:8]
        self._cookie = f"nnunet_fed_{federation}"

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/", self.get_page),
            Route("/metrics", self.get_metrics),
            Route("/v1/session", self.post_session, methods=["POST"]),
            Route("/v1/session", self.get_session),
            Route("/v1/session", self.delete_session, methods=["DELETE"]),
            Route("/v1/overview", self.get_overview),
            Route("/v1/runs/{run}/curves", self.get_curves),
        ]

    async def log_head_daily(self) -> None:
        """Log the head of the audit log, now and every day."""
        tail, log = self.overview.builder.tail, self._coordinator.state.log
        while True:
            try:
                await run_in_threadpool(tail.read_on)
                log(f"audit log: the head of line {tail.number} is {tail.head}")
            except OSError as error:
                log(f"audit log: it cannot be read at the moment: {error}")
            await asyncio.sleep(HEAD_EVERY_S)

    # ---------------------------------------------------------------------------------------------- who looks
    def identify(self, connection: Scope) -> str | None:
        """Return whose session a request shows, or None."""
        try:
            return self.sessions.member(HTTPConnection(connection).cookies[self._cookie]).name
        except (KeyError, RefusedError):
            return None

    def _viewer_of(self, request: Request) -> Member:
        """Return the observer or operator that sends a request, by bearer token or by session."""
        if "authorization" in request.headers:
            return _admitted(member_of(request))
        member = self.sessions.member(request.cookies.get(self._cookie, ""))
        traffic_of(request.scope).member = member.name
        return _admitted(member)

    # ----------------------------------------------------------------------------------------------- handlers
    async def get_page(self, request: Request) -> Response:
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

    async def post_session(self, request: Request) -> Response:
        """Log in."""
        _check_same_origin(request)
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise RefusedError("a login is sent as application/json", code="incomplete_request")
        login = await read_json(request, LoginRequest)
        address = request.client.host if request.client else ""
        cookie, viewer = await run_in_threadpool(self.sessions.log_in, login, address=address)
        self.sessions.log_out(request.cookies.get(self._cookie, ""))  # the one that this cookie replaces
        return self._with_cookie(json_response(viewer), cookie, max_age=int(SESSION_S))

    async def get_session(self, request: Request) -> Response:
        """Return who is logged in."""
        cookie = request.cookies.get(self._cookie)
        if cookie is None:  # no error: it is the page's first request
            return Response(status_code=204, headers={"Cache-Control": "no-store"})
        return json_response(self.sessions.viewer(cookie))

    async def delete_session(self, request: Request) -> Response:
        """Log out."""
        _check_same_origin(request)
        self.sessions.log_out(request.cookies.get(self._cookie, ""))
        return self._with_cookie(Response(status_code=204), "", max_age=0)

    def _with_cookie(self, response: Response, value: str, *, max_age: int) -> Response:
        # No path: the browser sends the cookie to where it comes from, /v1/..., under whatever prefix a proxy adds.
        response.set_cookie(
            self._cookie, value, max_age=max_age, path=None, secure=self.is_secure, httponly=True, samesite="strict"
        )
        return response

    async def get_overview(self, request: Request) -> Response:
        """Return the state of the federation to an observer.

        Wait for news if there are none.
        """
        self._viewer_of(request)
        await self.overview.wait(request.query_params.get("seen", ""), min(_number(request, "wait"), LONGEST_WAIT_S))
        self._viewer_of(request)  # it may have been revoked meanwhile
        body = await self.overview.read()
        return Response(body, media_type="application/json", headers={"Cache-Control": "no-store"})

    async def get_curves(self, request: Request) -> Response:
        """Return the curves of a run to an observer."""
        self._viewer_of(request)
        since, is_asked = int(_number(request, "since")), "since_validation" in request.query_params
        validations = int(_number(request, "since_validation")) if is_asked else since
        state, run = self._coordinator.state, request.path_params["run"]
        return await run_in_threadpool(
            lambda: json_response(build_curves(state, run, since=since, since_validation=validations))
        )

    async def get_metrics(self, request: Request) -> Response:
        """Return the figures for Prometheus."""
        _admitted(member_of(request))
        overview = await self.overview.get()
        text = await run_in_threadpool(
            lambda: prometheus.exposition(
                prometheus.FederationCollector(
                    overview,
                    self._coordinator,
                    self.overview.builder.tail,
                    refusals=self._refusals.copy(),
                    sessions=self.sessions.count(),
                )
            )
        )
        return Response(text, headers={"Content-Type": prometheus.CONTENT_TYPE, "Cache-Control": "no-store"})


def _admitted(member: Member) -> Member:
    """Return a member that may look on; refuse sites."""
    require_role(member, "observer", "operator")
    return member


def _check_same_origin(request: Request) -> None:
    """Refuse requests that another web site makes the browser send.

    The browser marks them itself; programs do not.
    """
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise RefusedError("this request comes from another site", code="forbidden")


def _number(request: Request, name: str) -> float:
    text = request.query_params.get(name, "0")
    if not re.fullmatch(r"[0-9]{1,8}(\.[0-9]{1,6})?", text):
        raise RefusedError(f"{name} must be a number, not {text[:40]!r}", code="incomplete_request")
    return float(text)


# ------------------------------------------------------------------------------------------------------- the file
@cache
def page() -> tuple[str, str]:
    """Return the page, in one piece, and the policy that forbids all other scripts."""
    folder = files("nnunetv2.federated.coordinator.dashboard") / "static"
    text, style, script = ((folder / f"page.{ending}").read_text(encoding="utf-8") for ending in ("html", "css", "js"))
    body = text.replace("/* page.css */", style).replace("/* page.js */", script)
    return body, (
        f"default-src 'none'; script-src {_hash_source(script)}; style-src {_hash_source(style)}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    )


def _hash_source(text: str) -> str:
    """Return the name of a script or style in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
