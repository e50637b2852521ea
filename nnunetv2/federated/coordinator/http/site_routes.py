"""Serve the requests of a site: settings, run states, documents, models.

    GET  /v1/settings                the settings that hold for all sites
    GET  /v1/roster                  the identities of the sites, where they aggregate securely
    GET  /v1/status                  the state of the federation
    GET  /v1/runs/<run>?plans=       how far a run of training is, or the one that a training with plans belongs to
    GET  /v1/outlooks                which runs will have a common model, and why others will not
    GET  /v1/privacy                 the differential privacy that sites have declared for their trainings
    GET  /v1/runs/<run>/model        the model of a run that is over, in a zip file (ranges allowed); operators too
    POST /v1/runs/<run>/actions      {action, gathering}: an operator steers a run, a site leaves it or returns
    POST /v1/failures                {run, round, reason}: a site cannot go on
    POST /v1/offers/<key>            {digest, size} -> 200 receipt: need not be sent, 202 {offset}: send it from there
    PUT  /v1/gatherings/<key>        contribute a document, or the rest of it (Content-Range) -> receipt
    GET  /v1/gatherings/<key>?wait=  200 the result (ranges allowed), 202 {waiting_for}, 409 why there is none
    PUT, GET /v1/rehearsal           bytes without content, to and fro; see `rehearsal.py`

An offer spares a site the upload of a document that is held already or would be refused. A `SiteService` answers: the
handlers know HTTP only.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from nnunetv2.federated.coordinator.http.authentication import member_of, site_of
from nnunetv2.federated.coordinator.http.error_responses import HANDLERS, json_response
from nnunetv2.federated.coordinator.http.large_bodies import BufferPool
from nnunetv2.federated.coordinator.http.rehearsal import REHEARSAL_ROUTES
from nnunetv2.federated.coordinator.http.request_bodies import drain, read_json, read_upload_headers, receive
from nnunetv2.federated.coordinator.http.services import Services, provide, services_of
from nnunetv2.federated.coordinator.http.traffic_meter import TrafficMeter
from nnunetv2.federated.coordinator.members import require_role
from nnunetv2.federated.coordinator.site_service import Result, SiteService
from nnunetv2.federated.errors import FederationError, RefusedError
from nnunetv2.federated.protocol import api
from nnunetv2.federated.protocol.messages import DIGEST_PATTERN

LONGEST_WAIT_S = 55.0
"""Below the minute after which many proxies give up on an answer."""


def service_of(request: Request) -> SiteService:
    """Return the service that answers a request."""
    return services_of(request).site


# -------------------------------------------------------------------------------------------------------- handlers
async def get_settings(request: Request) -> Response:
    """Return the settings of the federation to a member."""
    member_of(request)
    service = service_of(request)
    return json_response(await run_in_threadpool(lambda: service.settings))


async def get_roster(request: Request) -> Response:
    """Return the identities of the sites to a member."""
    member_of(request)
    return json_response(await run_in_threadpool(service_of(request).roster))


async def get_status(request: Request) -> Response:
    """Return the state of the federation to a member."""
    member = member_of(request)
    service = service_of(request)
    return await run_in_threadpool(lambda: json_response(service.status(member)))


async def get_run(request: Request) -> Response:
    """Return how far a run is, or the run that a site's plans belong to."""
    member, run = member_of(request), request.path_params["run"]
    plans, service = request.query_params.get("plans"), service_of(request)
    if plans is not None:
        run = await run_in_threadpool(service.run_of_plans, run, require_role(member, "site"), plans)
    return json_response(await run_in_threadpool(service.run_state, run))


async def get_outlooks(request: Request) -> Response:
    """Return which runs will have a common model."""
    member_of(request)
    return json_response(await run_in_threadpool(service_of(request).outlooks))


async def get_privacy(request: Request) -> Response:
    """Return the differential privacy that sites have declared."""
    member_of(request)
    return json_response(await run_in_threadpool(service_of(request).declared_privacy))


async def get_model(request: Request) -> Response:
    """Send the model of a run that is over; to HEAD, its size only."""
    member = require_role(member_of(request), "site", "operator")
    service, run = service_of(request), request.path_params["run"]
    if request.method == "HEAD":
        size = (await run_in_threadpool(service.find_model, run)).stat().st_size
        return Response(
            media_type="application/zip",
            headers={"Content-Length": str(size), "Accept-Ranges": "bytes", "Cache-Control": "no-store"},
        )
    model = await run_in_threadpool(service.fetch_model, run, member=member)
    downloads = services_of(request).reception.downloads
    return DigestedFile(model.path, model.digest, downloads, media_type="application/zip")


async def post_action(request: Request) -> Response:
    """Apply a member's action to a run."""
    member = member_of(request)
    action = await read_json(request, api.RunAction)
    return json_response(await run_in_threadpool(service_of(request).act, request.path_params["run"], action, member))


async def post_failure(request: Request) -> Response:
    """Take a site's failure report."""
    site = site_of(request)
    report = await read_json(request, api.FailureReport)
    await run_in_threadpool(service_of(request).report_failure, site, report)
    return Response(status_code=204)


async def post_offer(request: Request) -> Response:
    """Return whether a document is wanted."""
    site = site_of(request)
    offer = await read_json(request, api.Offer)
    service, key = service_of(request), request.path_params["key"]
    receipt = await run_in_threadpool(service.offer, key, site, offer.digest, offer.size)
    if receipt is not None:
        return json_response(receipt)
    offset = await run_in_threadpool(service.uploads.offset, key, site, offer.digest)
    return json_response(api.Wanted(offset=offset), 202)


async def put_contribution(request: Request) -> Response:
    """Receive a document, or the rest of one that a broken connection has left."""
    service, reception = service_of(request), services_of(request).reception
    site, key = site_of(request), request.path_params["key"]
    try:
        headers = read_upload_headers(request)
        receipt = await run_in_threadpool(service.offer, key, site, headers.digest, headers.size)
    except FederationError:
        await drain(request)
        raise
    if receipt is not None:
        await drain(request)
        return json_response(receipt)
    digest, size = headers.digest, headers.size
    with service.uploads.writing(key, site, digest, offset=headers.offset) as upload:
        await receive(request, upload, headers, reception)
        upload.complete()
        try:
            site_of(request)  # it may have been revoked since this began, and invited again
            receipt = await reception.finish(service.contribute, key, site, upload.path, digest, size)
        finally:
            upload.discard()  # its file, if still there, is of no use
        return json_response(receipt)


async def get_result(request: Request) -> Response:
    """Send a result, or wait for it for as long as the site asks."""
    service, notifier = service_of(request), service_of(request).notifier
    site, key = site_of(request), request.path_params["key"]
    with notifier.waiting(key) as change:  # from before the first look, so that no change is missed
        find = partial(service.result, key, site, **wanted_form(request))
        outcome = await run_in_threadpool(find)
        wait_s = wanted_wait(request)
        if not isinstance(outcome, Result) and wait_s > 0 and not notifier.stopping:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(change.wait(), wait_s)
            if change.is_set() or not notifier.hears_progress:
                site_of(request)  # it may have been revoked meanwhile
                outcome = await run_in_threadpool(find)
    if isinstance(outcome, Result):
        downloads = services_of(request).reception.downloads
        return DigestedFile(outcome.path, outcome.digest, downloads, {"X-Gathering": outcome.key})
    answer = json_response(outcome, 202)
    if outcome.lacks:
        answer.headers[api.LACKS_HEADER] = str(outcome.lacks)
    return answer


def wanted_form(request: Request) -> dict[str, Any]:
    """Return whether changes suffice for a site, and since which result."""
    text, since = request.query_params.get("changes", "0"), request.query_params.get("since")
    if text not in ("0", "1"):
        raise RefusedError(f"changes must be 0 or 1, not {text[:40]!r}", code="incomplete_request")
    if since is not None and not re.fullmatch(DIGEST_PATTERN, since):
        raise RefusedError(f"since must be a SHA-256 in hexadecimal, not {since[:40]!r}", code="incomplete_request")
    return {"changes": True, "since": since} if text == "1" else {}


def wanted_wait(request: Request) -> float:
    """Return the seconds that a site wants to wait for a result."""
    text = request.query_params.get("wait", "0")
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text):
        raise RefusedError(f"wait must be a number of seconds, not {text[:40]!r}", code="incomplete_request")
    return min(float(text), LONGEST_WAIT_S)


class DigestedFile(FileResponse):
    """Send a file whose SHA-256 is known, or a range of it."""

    def __init__(
        self,
        path: Path,
        digest: str,
        pool: BufferPool,
        headers: Mapping[str, str] | None = None,
        *,
        media_type: str = "application/octet-stream",
    ) -> None:
        headers = {"X-Content-SHA256": digest, "ETag": f'"{digest}"', "Cache-Control": "no-store", **(headers or {})}
        # Asked here, a file that is gone (old results are deleted) is the machine's trouble, and the site asks again.
        super().__init__(path, headers=headers, media_type=media_type, stat_result=path.stat())
        self._pool = pool

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name, value) for name, value in scope["headers"] if name != b"range" or is_one_range(value)]
        self._pool.opened()
        self.chunk_size = self._pool.share  # one size for all of it: the last piece is told by being shorter
        try:
            await super().__call__({**scope, "headers": headers}, receive, send)
        finally:
            self._pool.closed()


def is_one_range(value: bytes) -> bool:
    """Return whether a Range header asks for one piece of a file."""
    match = re.fullmatch(rb"bytes=([0-9]{1,15})-([0-9]{1,15})?", value)
    return match is not None and (match[2] is None or int(match[1]) <= int(match[2]))


# ------------------------------------------------------------------------------------------------------------- app
SITE_ROUTES = [
    Route("/v1/settings", get_settings),
    Route("/v1/roster", get_roster),
    Route("/v1/status", get_status),
    Route("/v1/outlooks", get_outlooks),
    Route("/v1/privacy", get_privacy),
    Route("/v1/runs/{run}", get_run),
    Route("/v1/runs/{run}/model", get_model),
    Route("/v1/runs/{run}/actions", post_action, methods=["POST"]),
    Route("/v1/failures", post_failure, methods=["POST"]),
    Route("/v1/offers/{key:path}", post_offer, methods=["POST"]),
    Route("/v1/gatherings/{key:path}", put_contribution, methods=["PUT"]),
    Route("/v1/gatherings/{key:path}", get_result, methods=["GET"]),
    *REHEARSAL_ROUTES,
]


def build_site_app(services: Services, further_routes: Sequence[Route] = (), **options: Any) -> Starlette:
    """Build an application with the routes of a site, and perhaps further ones.

    Args:
        services: Its `site` answers the requests of sites.
        options: Of Starlette.
    """
    app = Starlette(exception_handlers=HANDLERS, routes=[*SITE_ROUTES, *further_routes], **options)
    app.router.redirect_slashes = False  # it would send people wherever a Host header says
    provide(app, services)
    app.add_middleware(TrafficMeter, service=services.site)
    return app
