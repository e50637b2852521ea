"""Identify who sends a request, by its bearer token."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Scope

from nnunetv2.federated.coordinator.http.services import services_of
from nnunetv2.federated.coordinator.http.traffic_meter import traffic_of
from nnunetv2.federated.coordinator.members import Member, require_role


def bearer_token(scope: Scope) -> str:
    """Return the bearer token of a request, or ""."""
    kind, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
    return token if kind.lower() == "bearer" else ""


def member_of(request: Request) -> Member:
    """Return the member that sends a request; its traffic counts as that member's."""
    member = services_of(request).site.authenticate(bearer_token(request.scope))
    traffic_of(request.scope).member = member.name
    return member


def site_of(request: Request) -> str:
    """Return the site that sends a request; refuse members in other roles."""
    return require_role(member_of(request), "site")


def operator_of(request: Request) -> str:
    """Return the operator that sends a request; refuse members in other roles."""
    return require_role(member_of(request), "operator")
