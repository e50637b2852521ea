"""Carry frames between the jobs of sites and server, through the cells of NVIDIA FLARE.

Built on internals of NVFlare 2.9. A piece of a document is one message of its core cells, without the streams and
downloads above them, which cut messages into chunks, copy them once more and keep unacknowledged ones. Messages that
may be larger than a piece take the streams.

A site is known by the origin of its message, which the root server has compared with the token of the sender; never by
the peer context, which the sender writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.cellnet.utils import make_reply, new_cell_message

from nnunetv2.federated.engine.channel import check_origins

CHANNEL = "nnunet_federated"
ASK, CHANGED = "ask", "changed"
LONGEST_KEY = 4000
Frame = bytes | bytearray | memoryview


class CellChannel:
    """A `Channel` from the job of a site to the job of the server."""

    def __init__(self, cell: Any, job: str) -> None:
        self._cell = cell
        self._server = FQCN.join([FQCN.ROOT_SERVER, job])

    def ask(self, frame: bytes, *, timeout_s: float, is_piece: bool = False) -> bytes:
        """Send a frame to the server's job and return that of its answer; see `Channel`."""
        reply = (self._cell.core_cell if is_piece else self._cell).send_request(
            channel=CHANNEL,
            topic=ASK,
            target=self._server,
            request=new_cell_message({}, frame),
            timeout=timeout_s,
            optional=True,
        )
        if reply is None:
            raise ConnectionError("NVFlare has no answer")
        code = reply.get_header(MessageHeaderKey.RETURN_CODE)
        if code != ReturnCode.OK or not isinstance(reply.payload, bytes | bytearray | memoryview):
            raise ConnectionError(f"NVFlare says {code} {reply.get_header(MessageHeaderKey.ERROR) or ''}".strip())
        return bytes(reply.payload)

    def on_change(self, notify: Callable[[str], None]) -> None:
        """Call a function with the key of every change that the server tells."""

        def changed(message: Any) -> None:
            if FQCN.is_ancestor(FQCN.ROOT_SERVER, message.get_header(MessageHeaderKey.ORIGIN, "")):
                notify(bytes(message.payload or b"")[:LONGEST_KEY].decode(errors="replace"))

        self._cell.core_cell.register_request_cb(CHANNEL, CHANGED, changed)


class CellServer:
    """The other end, in the job of the server.

    Args:
        sites: Name of each site's cell -> the site.
        answer: Returns the frame that answers a frame of a site.
        warn: Called with a line per refused request or lost notification.
    """

    def __init__(
        self,
        cell: Any,
        job: str,
        sites: dict[str, str],
        answer: Callable[[str, Frame], bytes],
        warn: Callable[[str], None],
    ) -> None:
        self._cell = cell
        self._job = job
        self._sites = sites
        self._answer = answer
        self._warn = warn
        self._is_closed = False

    def start(self) -> None:
        """Begin to answer."""
        self._cell.register_request_cb(channel=CHANNEL, topic=ASK, cb=self._handle)  # for streams and core cells

    def close(self) -> None:
        """Answer nobody any more."""
        self._is_closed = True

    def push(self, key: str) -> None:
        """Tell all sites of a change, without waiting.

        Sites that miss it ask in a while.
        """
        if not key or self._is_closed:
            return
        try:
            targets = [FQCN.join([cell, self._job]) for cell in self._sites]
            message = new_cell_message({}, key.encode())
            self._cell.core_cell.fire_and_forget(CHANNEL, CHANGED, targets, message, optional=True)
        except Exception as error:  # noqa: BLE001 - the engine's; sites that miss it ask
            self._warn(f"the sites were not told of {key}: {error}")

    def _handle(self, message: Any) -> Any:
        origin = str(message.get_header(MessageHeaderKey.ORIGIN, ""))
        site = site_of(origin, self._sites, self._job)
        if site is None or self._is_closed:
            self._warn(f"a request from {origin[:200]!r} is refused: that is no site of this job")
            return make_reply(ReturnCode.UNAUTHENTICATED)
        if not isinstance(message.payload, bytes | bytearray | memoryview):
            return make_reply(ReturnCode.INVALID_REQUEST)
        return make_reply(ReturnCode.OK, body=self._answer(site, message.payload))


def site_of(origin: str, sites: dict[str, str], job: str) -> str | None:
    """Return the site whose job in this run a message comes from, or None."""
    cell, _, last = origin.rpartition(FQCN.SEPARATOR)
    return sites.get(cell) if last == job else None


def sites_of(clients: Iterable[Any]) -> dict[str, str]:
    """Return the sites by the names of their cells.

    Behind a relay, the name of a cell begins with that of the relay.
    """
    return {str(client.get_fqcn()): str(client.name) for client in clients}


def check_is_safe(cell: Any, *, is_secure: bool) -> None:
    """Raise FederationError unless the origin of a message proves who has sent it."""
    check_origins(is_secure=is_secure, allows_adhoc=bool(cell.core_cell.connector_manager.adhoc_allowed))
