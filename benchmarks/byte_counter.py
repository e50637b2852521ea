"""Count bytes on the network: a TCP relay between one site and the coordinator."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field

PIECE_BYTES = 1 << 16


@dataclass
class Traffic:
    """Bytes on the wire, headers of HTTP included."""

    sent: int = 0
    received: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def snapshot(self) -> tuple[int, int]:
        """Return (sent by the site, received by the site) so far."""
        with self.lock:
            return self.sent, self.received


class ByteCounter:
    """Listen on a free port of the loopback interface and pass everything on to `target`, counting.

    Use as a context manager; `port` is where the site has to connect.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.traffic = Traffic()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]

    def __enter__(self) -> ByteCounter:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                site, _ = self._listener.accept()
            except OSError:  # closed
                return
            try:
                coordinator = socket.create_connection(self.target)
            except OSError:
                site.close()
                continue
            for source, sink, direction in ((site, coordinator, "sent"), (coordinator, site, "received")):
                threading.Thread(target=self._relay, args=(source, sink, direction), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        try:
            with suppress(OSError):
                while piece := source.recv(PIECE_BYTES):
                    with self.traffic.lock:
                        setattr(self.traffic, direction, getattr(self.traffic, direction) + len(piece))
                    sink.sendall(piece)
        finally:
            for end in (source, sink):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
