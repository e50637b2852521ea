"""Define the requests and answers that an engine carries between gateways and coordinator.

    frame    4 bytes: length n of the JSON | n bytes of JSON, a `Request` or an `Answer` | content, if any

The gateway asks, the coordinator answers; nothing else is sent, but for hints that something has changed. Documents
travel as the content of requests (`piece`) and answers (`read`), 2 MiB at a time, so that a transfer that breaks
goes on at its last piece. Who asks, the engine says: nothing in a request does.
"""

from __future__ import annotations

from typing import Annotated, Literal, Protocol, TypeVar

from pydantic import Field

from nnunetv2.federated.errors import FederationError, WireError
from nnunetv2.federated.protocol.api import Problem, Receipt, Waiting
from nnunetv2.federated.protocol.messages import Count, Digest, Part, PublicKey, Text
from nnunetv2.federated.protocol.strict_json import decode_json, encode_json

Head = TypeVar("Head", "Request", "Answer")

PIECE_BYTES = 2 << 20
"""Content of one frame, at most. At 1 Mbit/s it takes a quarter of a minute; some transports of NVFlare drop a
connection that carries messages of 4 MiB."""
LARGEST_JSON = 32 << 20
"""Bytes of the JSON of a frame: a status lists sites for every run and open exchange."""
LENGTH_BYTES = 4

Operation = Literal[
    "identify",
    "settings",
    "roster",
    "status",
    "outlooks",
    "declared_privacy",
    "run_state",
    "run_of_plans",
    "act",
    "report_failure",
    "offer",
    "piece",
    "result",
    "model",
    "read",
]


class Request(Part):
    """A question of a site's gateway."""

    op: Operation
    name: Annotated[str, Field(max_length=4000)] = ""
    """The exchange or the run that it is about; whether there is any such, the coordinator says."""
    plans: Annotated[str, Field(max_length=4000)] = ""
    digest: Digest | None = None
    """SHA-256 of the document that is offered, sent or read."""
    size: Count = 0
    """Bytes of that document."""
    offset: Count = 0
    """The byte at which a piece begins."""
    changes: bool = False
    """Whether the changes since the result before suffice."""
    since: Digest | None = None
    """SHA-256 of that result, as the site has received it."""
    identity: PublicKey | None = None
    body: Annotated[str, Field(max_length=64 << 10)] = ""
    """A further message, as JSON."""


class Held(Part):
    """The part of a document that the coordinator holds."""

    receipt: Receipt | None = None
    offset: Count = 0
    """Bytes that have arrived."""
    is_storing: bool = False
    """All of it has arrived and is being checked and stored: ask again for the receipt."""


class Available(Part):
    """A file that the site may read."""

    name: Text
    """The exchange that it comes from."""
    digest: Digest
    size: Count


class Answer(Part):
    """The answer of the coordinator: one of these, or content alone."""

    problem: Problem | None = None
    body: str = ""
    """A message of `protocol.api`, as JSON."""
    held: Held | None = None
    file: Available | None = None
    waiting: Waiting | None = None
    lacks: Count = 0
    """`Waiting.lacks`, which does not travel within."""


class Channel(Protocol):
    """The way through an engine from one site to its coordinator. Used by many threads."""

    def ask(self, frame: bytes, *, timeout_s: float, is_piece: bool = False) -> bytes:
        """Send a frame and return the frame of its answer.

        Args:
            timeout_s: How long the engine may make no progress.
            is_piece: Whether it is about a piece of a document, so that neither frame is larger than that.

        Raises:
            OSError: No answer came; the request may have arrived, or not.
        """
        ...


def encode_frame(head: Head, content: bytes | memoryview = b"") -> bytes:
    """Return a frame."""
    json = encode_json(head)
    return b"".join((len(json).to_bytes(LENGTH_BYTES, "big"), json, content))


def decode_frame(model: type[Head], frame: bytes | bytearray | memoryview) -> tuple[Head, memoryview]:
    """Return the message and the content of a frame, the latter as a view.

    Raises:
        WireError: It is no such frame.
    """
    view = memoryview(frame)
    size = int.from_bytes(view[:LENGTH_BYTES], "big")
    content = view[LENGTH_BYTES + size :]
    if len(view) < LENGTH_BYTES + size or size > LARGEST_JSON or len(content) > PIECE_BYTES:
        raise WireError(f"a frame of {len(view)} bytes, of which {size} are to be JSON, is none of the engine's")
    return decode_json(model, bytes(view[LENGTH_BYTES : LENGTH_BYTES + size])), content


def check_origins(*, is_secure: bool, allows_adhoc: bool) -> None:
    """Refuse a network whose messages do not prove their sender.

    Raises:
        FederationError: The network runs without certificates, or lets jobs connect past its server.
    """
    if not is_secure:
        raise FederationError("this NVFlare network runs without certificates, so nobody is who he says: provision it")
    if allows_adhoc:
        raise FederationError(
            "this NVFlare network allows ad-hoc connections, which go past the check of who sends a message: remove "
            "allow_adhoc_conns from comm_config.json"
        )
