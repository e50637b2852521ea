"""Serve the operators of a federation while a job of an engine runs it."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from socket import socket

from nnunetv2.federated.coordinator.app import build_app
from nnunetv2.federated.coordinator.http.connections import GuardedServer, guarded_config
from nnunetv2.federated.coordinator.http.endpoint import Endpoint
from nnunetv2.federated.coordinator.http.listen_address import open_socket
from nnunetv2.federated.coordinator.members import LOCAL_OPERATOR
from nnunetv2.federated.coordinator.service import Coordinator
from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.site.credential import OPERATOR_FILE, SiteCredential, new_token, save_credential

HOST = "127.0.0.1"
TIMEOUT_S = 60.0


class OperatorServer:
    """A server of the page and the routes of operators, on the loopback interface.

    No site is served: none has a token.

    Args:
        coordinator: It is started and stopped with the server.
        port: 0: any free one.
    """

    def __init__(self, coordinator: Coordinator, port: int) -> None:
        self._coordinator = coordinator
        self._listener: socket = open_socket(HOST, port)
        self.url = f"http://{HOST}:{self._listener.getsockname()[1]}"
        self._server = GuardedServer(guarded_config(build_app(coordinator, Endpoint(self.url))))
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._listener]}, daemon=True, name="operators"
        )

    @property
    def _credential(self) -> Path:
        return self._coordinator.state.store.folder / OPERATOR_FILE

    def start(self) -> None:
        """Serve, and write the credential with which nnUNetv2_fed_admin --folder operates the federation."""
        self._thread.start()
        deadline = time.monotonic() + TIMEOUT_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise FederationError(f"operators cannot be served at {self.url}; the log of the job says more")
            time.sleep(0.02)
        token = new_token(LOCAL_OPERATOR)
        self._coordinator.members.appoint_local_operator(token)
        federation = self._coordinator.settings.federation
        save_credential(SiteCredential(self.url, federation, LOCAL_OPERATOR, token), self._credential)

    def stop(self) -> None:
        """Remove the credential, and stop server and coordinator."""
        self._credential.unlink(missing_ok=True)
        self._coordinator.notifier.stop()
        self._server.should_exit = True
        self._thread.join(TIMEOUT_S)
        self._listener.close()
