"""Serve the commands of a site on its own machine, in front of an engine."""

from __future__ import annotations

import shutil
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from socket import socket
from time import monotonic, sleep

from starlette.applications import Starlette

from nnunetv2.federated.coordinator.http.connections import GuardedServer, guarded_config
from nnunetv2.federated.coordinator.http.listen_address import open_socket
from nnunetv2.federated.coordinator.http.services import Services
from nnunetv2.federated.coordinator.http.site_routes import build_site_app
from nnunetv2.federated.engine.channel import Channel
from nnunetv2.federated.engine.remote import RemoteCoordinator
from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.privacy.identities import public_of
from nnunetv2.federated.privacy.require_secure import check_settings
from nnunetv2.federated.site.credential import SiteCredential, load_credential, new_token, save_credential
from nnunetv2.federated.site.identity import make_identity

HOST = "127.0.0.1"
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5


class Gateway:
    """A site's gateway to a coordinator that an engine reaches.

    Args:
        channel: The way to the coordinator.
        site: Who the site is, as the engine knows it.
        through: Name of the engine's network and the federation; see `SiteCredential.through`.
        credential: The file that is written for the commands of this site, and removed at the end. Files that belong
            to it, such as the site's identity, lie beside it and stay.
        folder: For documents under way; gone after `stop`.
    """

    def __init__(self, channel: Channel, *, site: str, through: str, credential: Path, folder: Path) -> None:
        self._site = site
        self._through = through
        self._credential = credential
        self._folder = folder
        self._token = new_token(site)
        self.remote = RemoteCoordinator(channel, site=site, token=self._token, folder=folder)
        self._server: GuardedServer | None = None
        self._thread: threading.Thread | None = None
        self._listener: socket | None = None

    def start(self) -> SiteCredential:
        """Begin to serve, tell who the site is, and write the credential.

        Raises:
            NotAllowedError: The federation protects less than this site requires.
            FederationError: The gateway does not start, or another credential is in the way.
            OSError: The engine is away.
        """
        _check_place(self._credential, self._through)
        settings = self.remote.settings
        check_settings(settings, None)
        if settings.secure is not None:
            self.remote.identify(public_of(make_identity(self._credential)))
        self._listener = listener = open_socket(HOST, 0)
        app = build_gateway_app(self.remote)
        self._server = GuardedServer(guarded_config(app, timeout_graceful_shutdown=STOP_TIMEOUT_S))
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listener]}, daemon=True, name="gateway"
        )
        self._thread.start()
        deadline = monotonic() + START_TIMEOUT_S
        while not self._server.started:
            if not self._thread.is_alive() or monotonic() > deadline:
                raise FederationError("the gateway does not start; the log of the job says more")
            sleep(0.02)
        credential = SiteCredential(
            f"http://{HOST}:{listener.getsockname()[1]}",
            settings.federation,
            self._site,
            self._token,
            through=self._through,
        ).agreeing_with(settings)
        save_credential(credential, self._credential)
        return credential

    def notify(self, key: str) -> None:
        """Wake the commands that wait for an exchange."""
        self.remote.notifier.notify(key)

    def stop(self) -> None:
        """Remove the credential, and stop to serve."""
        if self._server is not None and _is_of(self._credential, self._token):
            self._credential.unlink(missing_ok=True)
        self.remote.notifier.stop()
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(2 * STOP_TIMEOUT_S)
        if self._listener is not None:
            self._listener.close()
        self.remote.close()
        shutil.rmtree(self._folder, ignore_errors=True)  # documents under way are with the coordinator, or come again


def build_gateway_app(remote: RemoteCoordinator) -> Starlette:
    """Build the application that serves a site's commands."""
    services = Services(remote)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        remote.notifier.bind()
        yield
        services.reception.close()

    return build_site_app(services, lifespan=lifespan)


def _check_place(path: Path, through: str) -> None:
    """Raise FederationError if the credential of another federation would be lost."""
    if path.exists() and load_credential(path).through != through:
        raise FederationError(
            f"{path} holds the credential of another federation: move it away, or give this one another folder"
        )


def _is_of(path: Path, token: str) -> bool:
    """Tell whether a credential is that of this gateway: a newer job may have written its own."""
    return path.exists() and load_credential(path).token == token
