"""Receive a file over HTTP in as many connections as it takes.

Each goes on where the one before broke off.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2.utilities.size_limits import check_size

if TYPE_CHECKING:
    from requests import Response

PIECE_BYTES = 256 << 10
"""Bytes that are received at a time; less than that is lost when a connection breaks."""


class PartialDownload:
    """A file as far as it has arrived, hashed on its way.

    For one process, which removes the file if it gives up.

    Args:
        path: Where the file is written.
        largest: Bytes that it may have.
    """

    def __init__(self, path: Path, *, largest: int | None = None) -> None:
        self.path = path
        self.largest = largest
        self.forget()

    def forget(self) -> None:
        """Begin anew with the next answer."""
        self.size = 0
        self._digest = hashlib.sha256()
        self._tag: str | None = None

    def headers(self) -> dict[str, str]:
        """Return the headers that ask for the rest of the file.

        Or for all of it where there is nothing to go on from.
        """
        headers = {"Accept-Encoding": "identity"}  # else places in the file and on the line differ
        if self.size and self._tag is not None:
            headers |= {"Range": f"bytes={self.size}-", "If-Range": self._tag}
        return headers

    def receive(
        self,
        response: Response,
        *,
        tag: str | None,
        piece_bytes: int = PIECE_BYTES,
        watch: Callable[[int], object] = lambda size: None,
    ) -> str:
        """Append the body of a good answer; return the whole file's SHA-256.

        Args:
            response: With status 206 if it is the rest that was asked for, else with the whole file.
            tag: The strong ETag of the content, for If-Range; None where the server sends none.
            watch: Called after every piece with the bytes received so far; an exception from it ends the download.

        Raises:
            requests.ConnectionError: The body is cut off, or is not the rest. The received bytes stay; ask again.
            OversizedError: More than `largest` bytes are announced, or sent; none above it is written.
        """
        import requests

        if response.status_code != 206:
            self.forget()
        elif _first_byte(response) != self.size:
            self.forget()
            raise requests.ConnectionError(f"{response.url} sends another part of the file than was asked for")
        self._tag = tag
        announced = announced_size(response)
        if announced is not None:
            self._check_size(announced)
        with self.path.open("r+b" if self.size else "wb") as file:
            file.seek(self.size)
            for piece in response.iter_content(piece_bytes):
                self._check_size(self.size + len(piece))
                file.write(piece)
                self._digest.update(piece)
                self.size += len(piece)
                watch(self.size)
        if announced is not None and self.size < announced:  # old versions of urllib3 do not look
            raise requests.ConnectionError(f"{response.url} broke off after {self.size} of {announced} bytes")
        return self._digest.hexdigest()

    def _check_size(self, size: int) -> None:
        if self.largest is not None:
            check_size(size, self.largest)


def announced_size(response: Response) -> int | None:
    """Return the size of the whole file in bytes, if the server tells it.

    An encoded body has another size.
    """
    if "Content-Encoding" in response.headers:
        return None
    if response.status_code == 206:
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        total = response.headers.get("Content-Length", "")
    return int(total) if re.fullmatch("[0-9]{1,19}", total) else None


def strong_tag(response: Response) -> str | None:
    """Return the server's strong tag of this content.

    None if it says nothing to rely on.
    """
    tag = response.headers.get("ETag", "")
    is_strong = tag.startswith('"') and "Content-Encoding" not in response.headers
    return tag if is_strong else None


def _first_byte(response: Response) -> int | None:
    match = re.match("bytes ([0-9]{1,19})-", response.headers.get("Content-Range", ""))
    return None if match is None else int(match[1])
