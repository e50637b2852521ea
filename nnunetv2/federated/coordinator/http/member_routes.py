"""Serve the requests of operators: members and settings.

GET    /v1/authority             the private certificate authority, in PEM; sites know its fingerprint
POST   /v1/join                  {invitation, token, identity} -> {federation, site, settings}; all else needs the token
POST   /v1/members               {name, role, lifetime_s} -> {name, role, invitation, expires}
DELETE /v1/members/<name>        revoke a credential
PATCH  /v1/settings              change settings while the federation is at work
"""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nnunetv2.federated.coordinator.http.authentication import operator_of
from nnunetv2.federated.coordinator.http.endpoint import Endpoint
from nnunetv2.federated.coordinator.http.error_responses import json_response
from nnunetv2.federated.coordinator.http.request_bodies import read_json
from nnunetv2.federated.coordinator.service import Coordinator
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.protocol import api


class MemberRoutes:
    """The routes by which members join, and operators manage them.

    Args:
        endpoint: Where the coordinator is reached, for invitations.
    """

    def __init__(self, coordinator: Coordinator, endpoint: Endpoint) -> None:
        self._coordinator = coordinator
        self._endpoint = endpoint

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/v1/authority", self.get_authority),
            Route("/v1/join", self.post_join, methods=["POST"]),
            Route("/v1/members", self.post_member, methods=["POST"]),
            Route("/v1/members/{name}", self.delete_member, methods=["DELETE"]),
            Route("/v1/settings", self.patch_settings, methods=["PATCH"]),
        ]

    async def get_authority(self, request: Request) -> Response:
        """Send the private authority of this coordinator to anybody."""
        authority = self._endpoint.authority
        if authority is None:
            raise RefusedError("this coordinator has no certificate authority of its own", code="no_authority")
        return Response(authority, media_type="application/x-pem-file")

    async def post_join(self, request: Request) -> Response:
        """Let a member join."""
        join = await read_json(request, api.JoinRequest)
        return json_response(await run_in_threadpool(self._coordinator.join, join))

    async def post_member(self, request: Request) -> Response:
        """Invite somebody."""
        operator, coordinator = operator_of(request), self._coordinator
        wanted = await read_json(request, api.InviteRequest)
        secret = await run_in_threadpool(
            coordinator.invite, wanted.name, wanted.role, by=operator, lifetime_s=wanted.lifetime_s
        )
        return json_response(
            api.InviteAnswer(
                name=wanted.name,
                role=wanted.role,
                expires=coordinator.state.clock() + wanted.lifetime_s,
                invitation=secret  # empty where none is needed
                and self._endpoint.invitation(
                    coordinator.settings.federation,
                    wanted.name,
                    secret,
                    with_identity=coordinator.members.needs_identity(wanted.name),
                ),
            )
        )

    async def delete_member(self, request: Request) -> Response:
        """Revoke a credential."""
        operator = operator_of(request)
        await run_in_threadpool(self._coordinator.revoke, request.path_params["name"], by=operator)
        return Response(status_code=204)

    async def patch_settings(self, request: Request) -> Response:
        """Change settings of a federation at work."""
        operator = operator_of(request)
        change = await read_json(request, api.SettingsChange)
        return json_response(await run_in_threadpool(self._coordinator.change_settings, change, by=operator))
