"""Hold the services that the handlers of an application share."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from starlette.applications import Starlette
from starlette.requests import HTTPConnection

from nnunetv2.federated.coordinator.http.rehearsal_budget import Rehearsals
from nnunetv2.federated.coordinator.http.request_bodies import Reception
from nnunetv2.federated.coordinator.site_service import SiteService


@dataclass(frozen=True)
class Services:
    """Everything that the handlers of an application share."""

    site: SiteService
    reception: Reception = field(default_factory=Reception)
    rehearsals: Rehearsals = field(default_factory=Rehearsals)
    refusals: Counter[str] = field(default_factory=Counter)
    """Requests that were refused since the start, by code."""


def provide(app: Starlette, services: Services) -> None:
    """Give an application the services of its handlers."""
    app.state.services = services


def services_of(request: HTTPConnection) -> Services:
    """Return the services of the application that a request is for."""
    services: Services = request.app.state.services
    return services
