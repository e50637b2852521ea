"""Stand between a site and its coordinator, and break connections after so many bytes."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

from nnunetv2.federated.site.credential import SiteCredential


class Cutter:
    """A connection to a coordinator that breaks after so many bytes, a few times, then works."""

    def __init__(self, url: str, *, upload: list[int] = (), download: list[int] = ()) -> None:
        self._target = ("127.0.0.1", int(url.rpartition(":")[2]))
        self._budgets = {"upload": list(upload), "download": list(download)}
        self.carried = {"upload": 0, "download": 0}
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            for direction, source, sink in (("upload", near, far), ("download", far, near)):
                threading.Thread(target=self._carry, args=(direction, source, sink), daemon=True).start()

    def _carry(self, direction: str, source: socket.socket, sink: socket.socket) -> None:
        carried_here = 0
        try:
            while data := source.recv(16384):
                carried_here += len(data)
                self.carried[direction] += len(data)
                if self._budgets[direction] and carried_here > self._budgets[direction][0]:
                    self._budgets[direction].pop(0)
                    break
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._listener.close()


def moved(credential: SiteCredential, url: str) -> SiteCredential:
    return SiteCredential(url, credential.federation, credential.site, credential.token)
