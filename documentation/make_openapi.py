"""Write openapi.json: every route of a coordinator, with the models that check what travels and every refusal.

    python documentation/make_openapi.py

The models are those of the coordinator itself. What only the routes know is written down here; a test compares both
with the application.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from nnunetv2.federated.coordinator.dashboard import curves, login_sessions, overview
from nnunetv2.federated.coordinator.http.error_responses import STATUS_OF_CODE
from nnunetv2.federated.protocol import api, messages

TARGET = Path(__file__).with_name("openapi.json")
REFERENCE = "#/components/schemas/{model}"
PUBLISHED_NAMES = {"ExchangeView": "Meeting"}
"""Class -> its name in the description, where it was called otherwise when that was published."""
EVERYBODY = ("invalid", "too_many_requests", "internal_error", "coordinator_trouble")
MEMBERS = (*EVERYBODY, "unauthorized", "forbidden")
UPLOADS = (
    *MEMBERS,
    "unknown_gathering",
    "not_expected",
    "too_early",
    "already_closed",
    "closed_without",
    "too_large",
    "too_many_gatherings",
    "too_many_bytes",
    "disk_full",
    "masked_only",
    "extrema_not_masked",
    "run_stopped",
    "run_key_forged",
    "identity_repeated",
    "survivors_unconfirmed",
    "run_key_missing",
)

REHEARSALS = ("too_large", "too_many_bytes", "refused")


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One method of one path."""

    summary: str
    who: str
    """Whose credential it takes: nobody's, any member's, or that of a role."""
    body: type[BaseModel] | str | None = None
    """A model, or "document" for a file."""
    answers: dict[int, type[BaseModel] | str | None]
    """Status -> a model, a media type, or None for no body."""
    query: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    codes: tuple[str, ...] = MEMBERS
    """Of the refusals that are to be expected."""


OPERATIONS: dict[str, dict[str, Operation]] = {
    "/v1/authority": {
        "get": Operation(
            summary="The private certificate authority. Compare its fingerprint with the invitation's.",
            who="nobody",
            answers={200: "application/x-pem-file"},
            codes=(*EVERYBODY, "no_authority"),
        )
    },
    "/v1/join": {
        "post": Operation(
            summary="Join with the secret of an invitation and a token of one's own. May be repeated as it is.",
            who="nobody",
            body=api.JoinRequest,
            answers={200: api.JoinAnswer},
            codes=(
                *EVERYBODY,
                "invitation_unknown",
                "invitation_used",
                "invitation_expired",
                "token_reused",
                "identity_missing",
                "identity_taken",
                "identity_changed",
                "too_large",
            ),
        )
    },
    "/v1/settings": {
        "get": Operation(summary="What holds for all sites.", who="member", answers={200: api.FederationSettings}),
        "patch": Operation(
            summary="Change settings; what is not sent stays.",
            who="operator",
            body=api.SettingsChange,
            answers={200: api.FederationSettings},
            codes=("min_sites_below_k", "quorum_below_threshold", "late_updates_masked"),
        ),
    },
    "/v1/roster": {
        "get": Operation(
            summary="The identities of the sites that have joined, where they aggregate securely. Compare the number.",
            who="member",
            answers={200: api.Roster},
        )
    },
    "/v1/status": {
        "get": Operation(
            summary="Sites, runs, open gatherings, failures, traffic.", who="member", answers={200: api.Status}
        )
    },
    "/v1/members": {
        "post": Operation(
            summary="Invite a member. An earlier invitation of the same name ends.",
            who="operator",
            body=api.InviteRequest,
            answers={200: api.InviteAnswer},
            codes=(*MEMBERS, "name_taken", "too_many_sites"),
        )
    },
    "/v1/members/{name}": {
        "delete": Operation(
            summary="Revoke a credential, at once.",
            who="operator",
            answers={204: None},
            codes=(*MEMBERS, "unknown_member"),
        )
    },
    "/v1/outlooks": {
        "get": Operation(
            summary="Which runs will have a common model, whose network it has, and why others will have none.",
            who="member",
            answers={200: api.Outlooks},
        )
    },
    "/v1/privacy": {
        "get": Operation(
            summary="What sites have declared of the differential privacy of their trainings, of runs where any has.",
            who="member",
            answers={200: api.DeclaredPrivacy},
        )
    },
    "/v1/runs/{run}": {
        "get": Operation(
            summary="How far a run is; with the name of a site's plans, how far the run is that they belong to.",
            who="member",
            query=("plans",),
            answers={200: api.RunState},
            codes=(*MEMBERS, "unknown_gathering", "incomplete_request"),
        )
    },
    "/v1/runs/{run}/model": {
        "get": Operation(
            summary="The model of a run that is over, for nnUNetv2_install_pretrained_model_from_zip.",
            who="site or operator",
            headers=("Range", "If-Range"),
            answers={200: "application/zip", 206: "application/zip", 416: None},
            codes=(*MEMBERS, "unknown_run", "no_model"),
        )
    },
    "/v1/runs/{run}/actions": {
        "post": Operation(
            summary="Steer a run (operators), or leave it and return to it (sites).",
            who="operator or site",
            body=api.RunAction,
            answers={200: api.RunState},
            codes=(*MEMBERS, "unknown_run", "has_rounds", "not_open", "too_early"),
        )
    },
    "/v1/runs/{run}/curves": {
        "get": Operation(
            summary="What the sites measured, from a round on.",
            who="observer or operator",
            query=("since", "since_validation"),
            answers={200: curves.Curves},
            codes=(*MEMBERS, "unknown_run", "incomplete_request"),
        )
    },
    "/v1/failures": {
        "post": Operation(
            summary="Say that this site cannot go on.", who="site", body=api.FailureReport, answers={204: None}
        )
    },
    "/v1/offers/{key}": {
        "post": Operation(
            summary="Ask whether a document is wanted, and from which byte on.",
            who="site",
            body=api.Offer,
            answers={200: api.Receipt, 202: api.Wanted},
            codes=UPLOADS,
        )
    },
    "/v1/rehearsal": {
        "put": Operation(
            summary="Rehearse the upload of a document: bytes without content, of which nothing is kept.",
            who="site",
            body="document",
            headers=("Content-Length", "X-Content-SHA256"),
            answers={200: api.Rehearsed},
            codes=(*MEMBERS, "incomplete_request", "length_required", "damaged_in_transit", *REHEARSALS),
        ),
        "get": Operation(
            summary="Rehearse the download of a result: as many bytes without content.",
            who="site",
            query=("size",),
            answers={200: "application/octet-stream"},
            codes=(*MEMBERS, "incomplete_request", *REHEARSALS),
        ),
    },
    "/v1/gatherings/{key}": {
        "put": Operation(
            summary="Contribute a document, or the rest of one. May be repeated.",
            who="site",
            body="document",
            headers=("Content-Length", "X-Content-SHA256", "Content-Range"),
            answers={200: api.Receipt},
            codes=(
                *UPLOADS,
                "incomplete_request",
                "length_required",
                "damaged_in_transit",
                "wrong_offset",
                "taken_over",
            ),
        ),
        "get": Operation(
            summary="The result, or whom it waits for; waits up to 55 s for it.",
            who="site",
            query=("wait", "changes", "since"),
            headers=("Range", "If-Range"),
            answers={200: "application/octet-stream", 202: api.Waiting, 206: "application/octet-stream", 416: None},
            codes=(
                *MEMBERS,
                "unknown_gathering",
                "not_expected",
                "too_early",
                "run_stopped",
                "refused",
                "datasets_differ",
                "plans_differ",
                "weights_differ",
                "nothing_shared",
                "cohort_too_small",
                "too_many_sites_for_secure",
                "too_many_groups",
                "shares_do_not_fit",
                "sum_implausible",
                "do_not_match",
                "already_closed",
                "incomplete_request",
            ),
        ),
    },
    "/v1/session": {
        "post": Operation(
            summary="Log in to the page: a cookie.",
            who="observer or operator",
            body=login_sessions.LoginRequest,
            answers={200: login_sessions.Viewer},
            codes=(
                *MEMBERS,
                "too_many_attempts",
                "incomplete_request",
                "invitation_unknown",
                "invitation_used",
                "invitation_expired",
                "token_reused",
            ),
        ),
        "get": Operation(summary="Who is logged in.", who="session", answers={200: login_sessions.Viewer}),
        "delete": Operation(summary="Log out.", who="session", answers={204: None}),
    },
    "/v1/overview": {
        "get": Operation(
            summary="What the page shows; waits up to 25 s until that is not what was seen.",
            who="observer or operator",
            query=("seen", "wait"),
            answers={200: overview.Overview},
            codes=(*MEMBERS, "incomplete_request"),
        )
    },
    "/": {
        "get": Operation(
            summary="The page. It shows nothing without a login.",
            who="nobody",
            answers={200: "text/html"},
            codes=EVERYBODY,
        )
    },
    "/metrics": {
        "get": Operation(summary="Figures for Prometheus.", who="observer or operator", answers={200: "text/plain"})
    },
}
ANYWHERE = ("unknown_path", "unknown_method")
"""Codes that belong to no operation."""


def build() -> dict[str, Any]:
    """Return the description as OpenAPI 3.1."""
    union = messages.document_messages()
    models = {
        part
        for methods in OPERATIONS.values()
        for operation in methods.values()
        for part in (operation.body, *operation.answers.values())
        if isinstance(part, type)
    }
    models |= {api.Problem, *union}
    ordered = sorted(models, key=lambda model: model.__name__)
    _, schemas = models_json_schema([(model, "validation") for model in ordered], ref_template=REFERENCE)
    schemas = _with_published_names(schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Coordinator of an nnU-Net federation",
            "version": str(messages.PROTOCOL),
            "description": "Explained in documentation/wire-protocol.md; written by make_openapi.py beside it.",
        },
        "paths": {
            path: {method: _describe(path, operation) for method, operation in methods.items()}
            for path, methods in OPERATIONS.items()
        },
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer"},
                "session": {"type": "apiKey", "in": "cookie", "name": "nnunet_fed_*"},
            },
        },
        "x-documents": sorted(model.__name__ for model in union),
        "x-status-of-code": dict(sorted(STATUS_OF_CODE.items())),
    }


def _with_published_names(schemas: dict[str, Any]) -> dict[str, Any]:
    """Return schemas under the names that earlier versions of the description have."""
    text = json.dumps(schemas)
    for name, published in PUBLISHED_NAMES.items():
        text = text.replace(f'{name}"', f'{published}"')
    return {"$defs": dict(sorted(json.loads(text)["$defs"].items()))}


def _describe(path: str, operation: Operation) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in ("key", "name", "run")
        if f"{{{name}}}" in path
    ]
    parameters += [{"name": name, "in": "query", "schema": {"type": "string"}} for name in operation.query]
    parameters += [{"name": name, "in": "header", "schema": {"type": "string"}} for name in operation.headers]
    described: dict[str, Any] = {
        "summary": operation.summary,
        "x-who": operation.who,
        "parameters": parameters,
        "responses": _responses(operation),
    }
    if operation.who != "nobody":
        cookie = operation.who in ("session", "observer or operator") and path != "/metrics"
        described["security"] = [{"token": []}, *([{"session": []}] if cookie else [])]
    if operation.body is not None:
        described["requestBody"] = {
            "required": True,
            "content": _content("application/octet-stream" if operation.body == "document" else operation.body),
        }
    return described


def _responses(operation: Operation) -> dict[str, Any]:
    responses = {
        str(status): {"description": "done", **({"content": _content(what)} if what else {})}
        for status, what in operation.answers.items()
    }
    codes_of: dict[int, list[str]] = {}
    for code in operation.codes:
        codes_of.setdefault(STATUS_OF_CODE[code], []).append(code)
    for status, codes in sorted(codes_of.items()):
        responses[str(status)] = {
            "description": f"refused: {', '.join(sorted(codes))}",
            "content": _content(api.Problem),
        }
    return responses


def _content(what: type[BaseModel] | str) -> dict[str, Any]:
    if isinstance(what, str):
        return {what: {"schema": {"type": "string"}}}
    return {"application/json": {"schema": {"$ref": REFERENCE.format(model=what.__name__)}}}


if __name__ == "__main__":
    TARGET.write_text(json.dumps(build(), indent=1) + "\n", encoding="utf-8")
