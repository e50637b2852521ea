"""Map errors to HTTP status codes and problem documents, JSON {code, message, remedy}.

A site shows message and remedy as one line. Codes are for programs, and for people who look a line up.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from nnunetv2.federated.coordinator.http.services import services_of
from nnunetv2.federated.errors import FederationError, RefusedError, reason_without_paths
from nnunetv2.federated.protocol import api
from nnunetv2.federated.protocol.strict_json import encode_json
from nnunetv2.utilities.plain_text import printable

logger = logging.getLogger(__name__)

STATUS_OF_CODE = {
    # requests that the protocol does not allow
    "invalid": 400,
    "incomplete_request": 400,
    "length_required": 411,
    "too_large": 413,
    # an upload that is to be sent again
    "damaged_in_transit": 400,
    "taken_over": 400,
    "wrong_offset": 409,
    # who asks
    "unauthorized": 401,
    "forbidden": 403,
    "not_expected": 403,
    "invitation_unknown": 403,
    "invitation_used": 403,
    "invitation_expired": 403,
    "token_reused": 409,
    "identity_missing": 403,
    "identity_taken": 409,
    "identity_changed": 409,
    "identity_repeated": 409,
    "run_key_forged": 409,
    "survivors_unconfirmed": 409,
    "name_taken": 409,
    "too_many_sites": 409,
    # not found
    "unknown_path": 404,
    "unknown_method": 405,
    "unknown_member": 404,
    "unknown_run": 404,
    "unknown_gathering": 404,
    "no_authority": 404,
    "no_model": 404,
    # conflicts with the state or the agreements of the federation
    "refused": 409,
    "too_early": 409,
    "already_closed": 409,
    "closed_without": 409,
    "not_open": 409,
    "has_rounds": 409,
    "run_stopped": 409,
    "do_not_match": 409,
    "datasets_differ": 409,
    "plans_differ": 409,
    "weights_differ": 409,
    "nothing_shared": 409,
    # masked sums
    "cohort_too_small": 409,
    "too_many_sites_for_secure": 409,
    "too_many_groups": 409,
    "min_sites_below_k": 409,
    "quorum_below_threshold": 409,
    "late_updates_masked": 409,
    "run_key_missing": 409,
    "shares_do_not_fit": 409,
    "masked_only": 409,
    "extrema_not_masked": 409,
    "sum_implausible": 409,
    # how much one member may ask for
    "too_many_requests": 429,
    "too_many_attempts": 429,
    "too_many_gatherings": 409,
    "too_many_bytes": 409,
    # trouble of the coordinator's own: asking again may help
    "internal_error": 500,
    "coordinator_trouble": 503,
    "disk_full": 507,
}
"""Status of every refusal by its code."""


def problem_of(error: Exception) -> tuple[int, api.Problem]:
    """Return the status code of an error, and the problem document that explains it."""
    if isinstance(error, RefusedError):
        status = STATUS_OF_CODE.get(error.code, 409)
        return status, api.Problem(
            code=error.code,
            message=printable(error.message[:8000])[:8000],
            remedy=printable(error.remedy[:8000])[:8000],
        )
    if isinstance(error, FederationError):
        return 400, api.Problem(code="invalid", message=printable(str(error)[:8000])[:8000])
    if isinstance(error, OSError):
        return 503, api.Problem(
            code="coordinator_trouble", message=f"trouble at the coordinator: {reason_without_paths(error)}"[:8000]
        )
    return 500, api.Problem(code="internal_error", message="an error of the coordinator itself; its log says more")


async def answer_error(request: Request, error: Exception) -> Response:
    """Answer with the problem document of an error."""
    status, problem = problem_of(error)
    services_of(request).refusals[problem.code] += 1
    if status >= 500:
        logger.error("%s %s", request.method, path_of(request), exc_info=error)
    return json_response(problem, status, {"WWW-Authenticate": "Bearer"} if status == 401 else None)


async def answer_unknown(request: Request, error: Exception) -> Response:
    """Answer a request for an unknown path, or with an unknown method."""
    code = "unknown_method" if getattr(error, "status_code", 404) == 405 else "unknown_path"
    problem = api.Problem(
        code=code,
        message=f"there is no {request.method[:20]} {path_of(request)[:200]} here",
        remedy="Use matching versions at all sites.",
    )
    return json_response(problem, STATUS_OF_CODE[code], getattr(error, "headers", None))


def path_of(request: Request) -> str:
    """Return the path of a request, also of one whose URL is malformed."""
    return printable(request.scope["path"])


async def answer_nobody(request: Request, error: Exception) -> Response:
    """End a request whose sender has gone."""
    return Response(status_code=400)


HANDLERS: dict[Any, Any] = {
    FederationError: answer_error,
    OSError: answer_error,
    HTTPException: answer_unknown,
    ClientDisconnect: answer_nobody,
    Exception: answer_error,
}
"""For every application here."""


def answer_too_many(message: str, wait_s: float) -> Response:
    """Answer that somebody has asked too much, and when to ask again."""
    seconds = max(1, math.ceil(wait_s))
    problem = api.Problem(code="too_many_requests", message=message, remedy=f"Ask again in {seconds} s.")
    return json_response(problem, 429, {"Retry-After": str(seconds)})


def json_response(model: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Answer with a message, which no cache in between may keep."""
    return Response(
        encode_json(model), status, {"Cache-Control": "no-store", **(headers or {})}, media_type="application/json"
    )
