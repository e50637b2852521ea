"""Build the application that serves a coordinator: sites, members, the dashboard.

Routes of sites are in `http/site_routes.py`, of operators in `http/member_routes.py`, of people who look on in
`dashboard/pages.py`. Errors are JSON {code, message, remedy}.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.types import Scope

from nnunetv2.federated.coordinator.dashboard.pages import Dashboard
from nnunetv2.federated.coordinator.http.authentication import bearer_token
from nnunetv2.federated.coordinator.http.endpoint import Endpoint
from nnunetv2.federated.coordinator.http.member_routes import MemberRoutes
from nnunetv2.federated.coordinator.http.rate_limits import Limits, RateLimiter
from nnunetv2.federated.coordinator.http.services import Services
from nnunetv2.federated.coordinator.http.site_routes import build_site_app
from nnunetv2.federated.coordinator.service import Coordinator
from nnunetv2.federated.errors import RefusedError

DAY_S = 86_400.0


async def remove_old_uploads_daily(coordinator: Coordinator) -> None:
    """Remove old uploads once a day; the start removes them too."""
    while True:
        await asyncio.sleep(DAY_S)
        try:
            await run_in_threadpool(coordinator.uploads.remove_old)
        except OSError as error:
            words = f"old uploads cannot be removed at the moment: {error}"
            await run_in_threadpool(coordinator.state.log, words)  # which a blocked output may hold up


def build_app(
    coordinator: Coordinator,
    endpoint: Endpoint,
    *,
    limits: Limits = Limits(),  # noqa: B008 - frozen
) -> Starlette:
    """Build the application that serves a coordinator at an endpoint.

    It starts and stops it too.
    """
    services = Services(coordinator)
    dashboard = Dashboard(coordinator, services, url=endpoint.url)

    def identify(scope: Scope) -> str | None:
        try:
            return coordinator.authenticate(bearer_token(scope)).name
        except RefusedError:
            return dashboard.identify(scope)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        coordinator.notifier.bind()
        coordinator.start()
        tasks = dashboard.log_head_daily(), remove_old_uploads_daily(coordinator)
        daily = [asyncio.create_task(task) for task in tasks]
        yield
        for task in daily:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        services.reception.close()
        await run_in_threadpool(coordinator.stop)

    routes = [*MemberRoutes(coordinator, endpoint).routes(), *dashboard.routes()]
    app = build_site_app(services, routes, lifespan=lifespan)
    app.add_middleware(RateLimiter, limits=limits, identify=identify)
    return app
