"""Rehearse a round with bytes without content, and measure the line.

Bytes take the way of weights. The headers announce the whole size, so that size limits on the way show, also on lines
too slow to carry all of it within the time that there is.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nnunetv2.federated.site.transports.http_requests import NoAnswerError, translated_errors
from nnunetv2.utilities.resumable_download import PIECE_BYTES

if TYPE_CHECKING:
    from nnunetv2.federated.site.transports.http import HttpTransport

SMALL_BYTES = 64 << 10
GROWTH = 8
"""By which one body is larger than the one before."""
BLOCK_BYTES = 1 << 20
"""Random bytes that a body repeats; too many for compression on the way."""


@dataclass(frozen=True, kw_only=True)
class Passage:
    """The part of a body that came through within the time given."""

    num_bytes: int
    seconds: float
    is_whole: bool

    @property
    def bytes_per_s(self) -> float:
        """Return the speed of the line."""
        return self.num_bytes / max(self.seconds, 1e-6)


class _TimeIsUpError(Exception):
    """Enough was measured."""


class RandomBody:
    """A body of random bytes that ends a request when its time is up.

    Args:
        size: Bytes.
        limit_s: Seconds from the first read on.
    """

    def __init__(self, size: int, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.position = 0
        self._size, self._limit_s, self._clock = size, limit_s, clock
        self._block = secrets.token_bytes(min(size, BLOCK_BYTES))
        self._begun: float | None = None

    def __len__(self) -> int:
        return self._size

    def digest(self) -> str:
        """Return the SHA-256 of all of it."""
        digest = hashlib.sha256()
        for begin in range(0, self._size, BLOCK_BYTES):
            digest.update(self._block[: self._size - begin])
        return digest.hexdigest()

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes.

        Raises:
            _TimeIsUpError: The time is up.
        """
        now = self._clock()
        self._begun = now if self._begun is None else self._begun
        if now - self._begun > self._limit_s:
            raise _TimeIsUpError
        begin = self.position % BLOCK_BYTES
        wanted = len(self._block) - begin if size < 0 else size
        piece = self._block[begin : begin + min(wanted, self._size - self.position)]
        self.position += len(piece)
        return piece

    def tell(self) -> int:
        """Return the number of bytes that were read."""
        return self.position

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.read, b"")


def send(transport: HttpTransport, size: int, *, limit_s: float) -> Passage:
    """Send a body, or as much of it as the time allows.

    Raises:
        NoAnswerError: It did not arrive, or something on the way refused it.
        RefusedError: The coordinator does not take it.
    """
    body = RandomBody(size, limit_s)
    digest = body.digest()
    begun = time.monotonic()
    try:
        answer = transport.rehearse_upload(body, digest)
    except _TimeIsUpError:
        return Passage(num_bytes=body.position, seconds=time.monotonic() - begun, is_whole=False)
    if answer.digest != digest or answer.size != size:
        raise NoAnswerError(
            "the coordinator has received other bytes than were sent: something on the way changes them"
        )
    return Passage(num_bytes=size, seconds=time.monotonic() - begun, is_whole=True)


def measure_upload(transport: HttpTransport, size: int, *, limit_s: float) -> Passage:
    """Send ever larger bodies, up to a size; return the last passage.

    Only bodies that have arrived tell a speed: bytes handed to the system may still be on their way.

    Raises:
        NoAnswerError: One did not arrive, or something on the way refused it.
        RefusedError: The coordinator does not take it.
    """
    passage = send(transport, min(size, SMALL_BYTES), limit_s=limit_s)
    while passage.is_whole and passage.num_bytes < size and GROWTH * passage.seconds < limit_s / 2:
        passage = send(transport, min(size, GROWTH * passage.num_bytes), limit_s=limit_s)
    return passage


def fetch(transport: HttpTransport, size: int, *, limit_s: float) -> Passage:
    """Fetch a body, or as much of it as the time allows.

    Raises:
        NoAnswerError: It did not come whole.
        RefusedError: The coordinator does not send it.
    """
    digest, received, begun = hashlib.sha256(), 0, time.monotonic()
    with _broken_off_after(lambda: received), transport.rehearse_download(size) as response:
        expected = response.headers["X-Content-SHA256"]
        for piece in response.iter_content(PIECE_BYTES):
            digest.update(piece)
            received += len(piece)
            if received < size and time.monotonic() - begun > limit_s:
                return Passage(num_bytes=received, seconds=time.monotonic() - begun, is_whole=False)
    if received != size or digest.hexdigest() != expected:
        raise NoAnswerError(f"of {size:,} bytes asked for, {received:,} came, or others than were sent")
    return Passage(num_bytes=size, seconds=time.monotonic() - begun, is_whole=True)


@contextmanager
def _broken_off_after(received: Callable[[], int]) -> Iterator[None]:
    """Add the received bytes to the error of a broken download."""
    try:
        with translated_errors():
            yield
    except NoAnswerError as error:
        if not received():
            raise
        raise NoAnswerError(f"{error}, after {received():,} bytes") from error
