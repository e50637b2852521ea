"""Count the bytes of requests and responses for the members that send the requests."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nnunetv2.federated.coordinator.site_service import SiteService

_KEY = "nnunetv2.traffic"


@dataclass
class RequestTraffic:
    """The part of the traffic of a request that only its handlers know."""

    member: str | None = None
    """Who sends it; None: a stranger, for whom nothing is counted."""
    bypassed: int = 0
    """Bytes of its body that did not come through `receive`."""


def traffic_of(scope: Scope) -> RequestTraffic:
    """Return the traffic of a request."""
    traffic: RequestTraffic = scope.setdefault(_KEY, RequestTraffic())
    return traffic


class TrafficMeter:
    """Count the bytes of every request and its response for the member that sent it."""

    def __init__(self, app: ASGIApp, service: SiteService) -> None:
        self.app = app
        self._service = service

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

        traffic = traffic_of(scope)
        try:
            await self.app(scope, counting_receive, counting_send)
        finally:
            if traffic.member is not None:
                key = scope.get("path_params", {}).get("key", "")
                received += traffic.bypassed
                self._service.count_traffic(traffic.member, key, received=received, sent=sent)
