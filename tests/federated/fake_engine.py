"""An engine in this process: channels that can be slow, cut or away, and gateways in front of a coordinator."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from nnunetv2.federated.coordinator.http.authentication import bearer_token
from nnunetv2.federated.coordinator.http.site_routes import SITE_ROUTES
from nnunetv2.federated.coordinator.service import Coordinator
from nnunetv2.federated.engine.channel import Request, decode_frame
from nnunetv2.federated.engine.gateway import build_gateway_app
from nnunetv2.federated.engine.remote import RemoteCoordinator
from nnunetv2.federated.engine.responder import Responder
from nnunetv2.federated.errors import RefusedError


class FakeChannel:
    """The way of one site through an engine of this process."""

    def __init__(self, responder: Responder, site: str) -> None:
        self.responder = responder
        self.site = site
        self.is_away = False
        self.bytes_per_s = float("inf")
        self.fault: Callable[[Request], bool] = lambda request: False
        """Tells whether a request is lost on its way."""
        self.lose_answer: Callable[[Request], bool] = lambda request: False
        self.asked: list[Request] = []
        self.sent_bytes = 0
        self._line = threading.Lock()

    def ask(self, frame: bytes, *, timeout_s: float, is_piece: bool = False) -> bytes:
        request, content = decode_frame(Request, frame)
        assert is_piece == (request.op in ("piece", "read"))
        self.asked.append(request)
        if self.is_away or self.fault(request):
            raise ConnectionError("the engine is away")
        with self._line:
            time.sleep(len(frame) / self.bytes_per_s)
        self.sent_bytes += len(content)
        answer = self.responder.answer(self.site, frame)
        if self.lose_answer(request):
            raise ConnectionError("the answer was lost")
        return answer


class Gateways:
    """An application in front of a coordinator's: requests of sites go through gateways, all others to it.

    A gateway serves one site. Here they all have the address of the coordinator, and are told apart by the token.
    """

    def __init__(self, app: ASGIApp, coordinator: Coordinator, folder: Path) -> None:
        self._app = app
        self._coordinator = coordinator
        self._folder = folder
        self.responder = Responder(coordinator)
        self.remotes: dict[str, RemoteCoordinator] = {}
        self._apps: dict[str, ASGIApp] = {}
        coordinator.notifier.subscribe(self._push)

    def close(self) -> None:
        for remote in self.remotes.values():
            remote.notifier.stop()
            remote.close()
        self.responder.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and any(route.matches(scope)[0] is not Match.NONE for route in SITE_ROUTES):
            app = self._gateway(bearer_token(scope)) or app
        await app(scope, receive, send)

    def _gateway(self, token: str) -> ASGIApp | None:
        try:
            member = self._coordinator.authenticate(token)
        except RefusedError:
            return self._apps.get(token)
        if member.role != "site":
            return None
        if token not in self._apps:
            channel = FakeChannel(self.responder, member.name)
            folder = self._folder / f"gateway{len(self._apps)}"
            remote = self.remotes[token] = RemoteCoordinator(channel, site=member.name, token=token, folder=folder)
            remote.notifier.bind()
            self._apps[token] = build_gateway_app(remote)
        return self._apps[token]

    def _push(self, key: str) -> None:
        for remote in list(self.remotes.values()):
            remote.notifier.notify(key)
