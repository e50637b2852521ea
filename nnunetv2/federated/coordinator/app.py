"""Serve a coordinator over HTTP: routes, waiting, and the status code of every error.

    GET  /v1/authority               the private certificate authority, in PEM; sites know its fingerprint
    POST /v1/join                    {invitation, token} -> {federation, site, settings}; what follows needs the token
    GET  /v1/settings                what holds for all sites
    GET  /v1/status                  what the federation is doing
    GET  /v1/runs/<run>?plans=       how far a run of training is, or the one that a training with plans belongs to
    GET  /v1/outlooks                which runs will have a common model, and why others will not
    GET  /v1/runs/<run>/model        the model of a run that is over, in a zip file (ranges allowed); operators too
    POST /v1/runs/<run>/actions      {action, exchange}: an operator steers a run, a site leaves it or returns
    POST /v1/failures                {run, round, reason}: a site cannot go on
    POST /v1/offers/<key>            {digest, size} -> 200 receipt: need not be sent, 202 {offset}: send it from there
    PUT  /v1/exchanges/<key>        contribute a document, or the rest of it (Content-Range) -> receipt
    GET  /v1/exchanges/<key>?wait=  200 the result (ranges allowed), 202 {waiting_for}, 409 why there is none

For operators:

    POST   /v1/members               {name, role, lifetime_s} -> {name, role, invitation, expires}
    DELETE /v1/members/<name>        revoke a credential
    PATCH  /v1/settings              change what may be changed while the federation is at work

For people who look on: the page and what it shows, see `page.py`.

An offer spares a site the upload of what is held already or would be refused. Errors are JSON {code, message, remedy}.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nnunetv2.federated.coordinator import run_control
from nnunetv2.federated.coordinator.dashboard import pages
from nnunetv2.federated.coordinator.http.endpoint import Place
from nnunetv2.federated.coordinator.http.error_responses import (
    answer_error,
    answer_nobody,
    answer_unknown,
    json_response,
)
from nnunetv2.federated.coordinator.http.notifications import Changes
from nnunetv2.federated.coordinator.http.rate_limits import Gate, Limits
from nnunetv2.federated.coordinator.http.request_bodies import BYPASSED, Reception, announced, drain, read_json, receive
from nnunetv2.federated.coordinator.members import Member
from nnunetv2.federated.coordinator.models import model_store
from nnunetv2.federated.coordinator.service import SHOWN_EXCHANGES, Coordinator, Result, require_role
from nnunetv2.federated.coordinator.storage.store import Traffic
from nnunetv2.federated.errors import FederationError, RefusedError
from nnunetv2.federated.protocol import api

LONGEST_WAIT_S = 55.0
"""Below the minute after which many proxies give up on an answer."""


# -------------------------------------------------------------------------------------------------------- handlers
def coordinator_of(request: Request) -> Coordinator:
    """Return the coordinator that a request is for."""
    return request.app.state.coordinator


def member_of(request: Request) -> Member:
    """Return who sends a request, by its bearer token."""
    member = coordinator_of(request).members.authenticate(bearer_token(request.scope))
    request.scope["member"] = member.name  # for TrafficMeter
    return member


def bearer_token(scope: Scope) -> str:
    """Return the token that a request shows, or ""."""
    kind, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
    return token if kind.lower() == "bearer" else ""


def site_of(request: Request) -> str:
    """Return the site that sends a request; refuse members in other roles."""
    return require_role(member_of(request), "site")


def operator_of(request: Request) -> str:
    """Return the operator that sends a request; refuse members in other roles."""
    return require_role(member_of(request), "operator")


async def get_authority(request: Request) -> Response:
    """Tell anybody who vouches for this coordinator, where no public authority does."""
    authority = request.app.state.place.authority
    if authority is None:
        raise RefusedError("this coordinator has no certificate authority of its own", code="no_authority")
    return Response(authority, media_type="application/x-pem-file")


async def post_join(request: Request) -> Response:
    """Let a site join."""
    join = await read_json(request, api.JoinRequest)
    return json_response(await run_in_threadpool(coordinator_of(request).join, join))


async def get_settings(request: Request) -> Response:
    """Tell a member the settings of the federation."""
    member_of(request)
    return json_response(coordinator_of(request).settings)


async def get_status(request: Request) -> Response:
    """Tell a member what the federation is doing."""
    member = member_of(request)
    coordinator = coordinator_of(request)
    return await run_in_threadpool(lambda: json_response(coordinator.status(member)))


async def get_run(request: Request) -> Response:
    """Tell a member how far a run is; a site that names its plans, how far the run is that they belong to."""
    member, run = member_of(request), request.path_params["run"]
    plans, coordinator = request.query_params.get("plans"), coordinator_of(request)
    if plans is not None:
        run = await run_in_threadpool(coordinator.run_of_plans, run, require_role(member, "site"), plans)
    return json_response(coordinator.run_state(run))


async def get_outlooks(request: Request) -> Response:
    """Tell a member which runs will have a common model."""
    member_of(request)
    coordinator = coordinator_of(request)
    runs = coordinator.book.runs()[:SHOWN_EXCHANGES]
    return json_response(await run_in_threadpool(model_store.outlooks, coordinator, runs))


async def get_model(request: Request) -> Response:
    """Send a site or an operator the model of a run that is over; to HEAD, say only that it is there, and its size."""
    member = require_role(member_of(request), "site", "operator")
    coordinator, run = coordinator_of(request), request.path_params["run"]
    if request.method == "HEAD":
        size = (await run_in_threadpool(model_store.find, coordinator, run)).stat().st_size
        return Response(
            media_type="application/zip",
            headers={"Content-Length": str(size), "Accept-Ranges": "bytes", "Cache-Control": "no-store"},
        )
    model = await run_in_threadpool(model_store.fetch, coordinator, run, member=member)
    return DigestedFile(model.path, model.digest, media_type="application/zip")


async def post_action(request: Request) -> Response:
    """Do what an operator wants of a run, or a site of its own part in it."""
    member = member_of(request)
    action = await read_json(request, api.RunAction)
    return json_response(
        await run_in_threadpool(run_control.act, coordinator_of(request), request.path_params["run"], action, member)
    )


async def post_member(request: Request) -> Response:
    """Invite somebody."""
    operator, coordinator = operator_of(request), coordinator_of(request)
    wanted = await read_json(request, api.InviteRequest)
    secret = await run_in_threadpool(
        coordinator.invite, wanted.name, wanted.role, by=operator, lifetime_s=wanted.lifetime_s
    )
    return json_response(
        api.InviteAnswer(
            name=wanted.name,
            role=wanted.role,
            expires=coordinator.clock() + wanted.lifetime_s,
            invitation=request.app.state.place.invitation(coordinator.settings.federation, wanted.name, secret),
        )
    )


async def delete_member(request: Request) -> Response:
    """Revoke a credential."""
    operator = operator_of(request)
    await run_in_threadpool(coordinator_of(request).revoke, request.path_params["name"], by=operator)
    return Response(status_code=204)


async def patch_settings(request: Request) -> Response:
    """Change settings of a federation at work."""
    operator = operator_of(request)
    change = await read_json(request, api.SettingsChange)
    return json_response(await run_in_threadpool(coordinator_of(request).change_settings, change, by=operator))


async def post_failure(request: Request) -> Response:
    """Take a site's report that it cannot go on."""
    site = site_of(request)
    report = await read_json(request, api.FailureReport)
    await run_in_threadpool(run_control.report_failure, coordinator_of(request), site, report)
    return Response(status_code=204)


async def post_offer(request: Request) -> Response:
    """Say whether a document is wanted."""
    site = site_of(request)
    offer = await read_json(request, api.Offer)
    receipt = await run_in_threadpool(
        coordinator_of(request).offer, request.path_params["key"], site, offer.digest, offer.size
    )
    if receipt is not None:
        return json_response(receipt)
    offset = await run_in_threadpool(
        coordinator_of(request).uploads.offset, request.path_params["key"], site, offer.digest
    )
    return json_response(api.Wanted(offset=offset), 202)


async def put_contribution(request: Request) -> Response:
    """Receive a document, or the rest of one. What a broken connection leaves behind can be gone on with."""
    coordinator = coordinator_of(request)
    site, key = site_of(request), request.path_params["key"]
    try:
        announcement = announced(request)
        receipt = await run_in_threadpool(coordinator.offer, key, site, announcement.digest, announcement.size)
    except FederationError:
        await drain(request)
        raise
    if receipt is not None:
        await drain(request)
        return json_response(receipt)
    digest, size = announcement.digest, announcement.size
    with coordinator.uploads.writing(key, site, digest, offset=announcement.offset) as upload:
        await receive(request, upload, announcement, request.app.state.reception)
        upload.complete()
        try:
            site_of(request)  # it may have been revoked since this began, and invited again
            receipt = await request.app.state.reception.finish(
                coordinator.contribute, key, site, upload.path, digest, size
            )
        finally:
            upload.discard()  # what is left of it: nothing, or what is of no use
        return json_response(receipt)


async def get_result(request: Request) -> Response:
    """Send a result, or wait for it for as long as the site asks."""
    coordinator, changes = coordinator_of(request), request.app.state.changes
    site, key = site_of(request), request.path_params["key"]
    with changes.waiting(key) as change:  # from before the first look, so that no change is missed
        outcome = await run_in_threadpool(coordinator.result, key, site)
        wait_s = wanted_wait(request)
        if not isinstance(outcome, Result) and wait_s > 0 and not changes.stopping:
            try:
                await asyncio.wait_for(change.wait(), wait_s)
            except asyncio.TimeoutError:
                pass
            else:
                site_of(request)  # it may have been revoked meanwhile
                outcome = await run_in_threadpool(coordinator.result, key, site)
    if isinstance(outcome, Result):
        return DigestedFile(outcome.path, outcome.digest, {"X-Gathering": outcome.key})
    answer = json_response(outcome, 202)
    if outcome.lacks:
        answer.headers[api.LACKS_HEADER] = str(outcome.lacks)
    return answer


def wanted_wait(request: Request) -> float:
    """Return how many seconds a site wants to wait for a result."""
    text = request.query_params.get("wait", "0")
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text):
        raise RefusedError(f"wait must be a number of seconds, not {text[:40]!r}", code="incomplete_request")
    return min(float(text), LONGEST_WAIT_S)


class DigestedFile(FileResponse):
    """Send a file whose SHA-256 is known, or the range of it that is asked for."""

    chunk_size = 256 << 10
    """What a download holds at a time; with hundreds of them that counts."""

    def __init__(
        self,
        path: Path,
        digest: str,
        headers: Mapping[str, str] | None = None,
        *,
        media_type: str = "application/octet-stream",
    ) -> None:
        headers = {"X-Content-SHA256": digest, "ETag": f'"{digest}"', "Cache-Control": "no-store", **(headers or {})}
        # Asked here, a file that is gone (old results are deleted) is the machine's trouble, and the site asks again.
        super().__init__(path, headers=headers, media_type=media_type, stat_result=path.stat())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name, value) for name, value in scope["headers"] if name != b"range" or is_one_range(value)]
        await super().__call__({**scope, "headers": headers}, receive, send)


def is_one_range(value: bytes) -> bool:
    """Tell whether a Range header asks for one piece of a file; what else it may ask for is not worth an answer."""
    match = re.fullmatch(rb"bytes=([0-9]{1,15})-([0-9]{1,15})?", value)
    return match is not None and (match[2] is None or int(match[1]) <= int(match[2]))


# ------------------------------------------------------------------------------------------------------------- app
class TrafficMeter:
    """Count the bytes of every request and its answer for the member that sent it."""

    def __init__(self, app: ASGIApp, coordinator: Coordinator) -> None:
        self.app = app
        self.coordinator = coordinator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = sent = 0

        async def counting_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message

        async def counting_send(message: Message) -> None:
            nonlocal sent
            sent += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, counting_receive, counting_send)
        finally:
            if "member" in scope:
                key = scope.get("path_params", {}).get("key", "")
                if self.coordinator.book.get(key) is None:
                    key = ""  # anybody can make up names: no counter for each
                received += scope.get(BYPASSED, 0)
                self.coordinator.members.count(scope["member"], key, Traffic(received, sent, self.coordinator.clock()))


def build_app(coordinator: Coordinator, place: Place, *, limits: Limits = Limits()) -> Starlette:  # noqa: B008 - frozen
    """Build the application that serves a coordinator at a place; it starts and stops it too."""
    changes = Changes()

    def identify(scope: Scope) -> str | None:
        try:
            return coordinator.members.authenticate(bearer_token(scope)).name
        except RefusedError:
            return app.state.observatory.identify(scope)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        changes.bind()
        app.state.observatory.listen()
        coordinator.on_change = changes.notify
        coordinator.on_progress = changes.mention
        coordinator.start()
        daily = asyncio.create_task(app.state.observatory.tell_head_daily())
        yield
        daily.cancel()
        with suppress(asyncio.CancelledError):
            await daily
        app.state.reception.close()
        await run_in_threadpool(coordinator.stop)

    handlers: dict[Any, Any] = {
        FederationError: answer_error,
        OSError: answer_error,
        HTTPException: answer_unknown,
        ClientDisconnect: answer_nobody,
        Exception: answer_error,
    }
    app = Starlette(
        lifespan=lifespan,
        exception_handlers=handlers,
        routes=[
            Route("/v1/authority", get_authority),
            Route("/v1/join", post_join, methods=["POST"]),
            Route("/v1/settings", get_settings),
            Route("/v1/settings", patch_settings, methods=["PATCH"]),
            Route("/v1/members", post_member, methods=["POST"]),
            Route("/v1/members/{name}", delete_member, methods=["DELETE"]),
            Route("/v1/status", get_status),
            Route("/v1/outlooks", get_outlooks),
            Route("/v1/runs/{run}", get_run),
            Route("/v1/runs/{run}/model", get_model),
            Route("/v1/runs/{run}/actions", post_action, methods=["POST"]),
            Route("/v1/failures", post_failure, methods=["POST"]),
            Route("/v1/offers/{key:path}", post_offer, methods=["POST"]),
            Route("/v1/gatherings/{key:path}", put_contribution, methods=["PUT"]),
            Route("/v1/gatherings/{key:path}", get_result, methods=["GET"]),
            *pages.ROUTES,
        ],
    )
    app.router.redirect_slashes = False  # it would send people wherever a Host header says
    app.state.coordinator = coordinator
    app.state.changes = changes
    app.state.reception = Reception()
    app.state.place = place
    app.state.observatory = pages.Observatory(coordinator, changes, url=place.url)
    app.add_middleware(TrafficMeter, coordinator=coordinator)
    app.add_middleware(Gate, limits=limits, identify=identify)
    return app
