"""Keep masked documents until they have counted, and promises for good.

    outbox/<exchange>.safetensors    a masked document, from before its first byte leaves until its sum is known
    spent.jsonl                      a line per promise, on the disk before the promised document or shares leave

Two masks over two values would show their difference, and shares for two sets of survivors both seeds of a site. So a
masked document is made once: also after a crash, the same bytes are sent again. And a site answers for one set of
survivors per exchange, ever. That holds for several processes of one site together, such as one that was started twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nnunetv2.federated.errors import FederationError, RefusedError
from nnunetv2.federated.protocol.document import Document, TensorSpec, open_document, write_document
from nnunetv2.federated.protocol.messages import Message
from nnunetv2.federated.site.private_files import locked
from nnunetv2.utilities.atomic_write import flush_to_disk

SPENT_FILE = "spent.jsonl"
LOCK_FILE = "lock"
Promise = Literal["masked", "answered", "closed", "anew"]


@dataclass(frozen=True)
class _Line:
    """One promise: an exchange's mask context, its survivors, or its end."""

    kind: Promise
    exchange: str
    digest: str


class Outbox:
    """The masked documents and promises of one run, or of one pooling.

    Args:
        folder: Of this run alone; made if it is not there.

    Raises:
        FederationError: The promises cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._documents = folder / "outbox"
        self._documents.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lines: list[_Line] = []
        with self._alone():  # which reads them, while nobody appends one
            pass

    # ------------------------------------------------------------------------------------------------ documents
    def held(self, exchange: str) -> Document[Any] | None:
        """Open the document that was made for an exchange; None if there is none."""
        path = self._path(exchange)
        return open_document(path) if path.exists() else None

    def put(
        self,
        exchange: str,
        context: str,
        message: Message,
        specs: Mapping[str, TensorSpec],
        tensors: Iterable[np.ndarray],
    ) -> Document[Any]:
        """Write a masked document, promise that there will be no other, and open it.

        Where another process of this site was quicker, its document is opened.

        Args:
            context: Digest of all that its masks are bound to.
        """
        with self._alone():
            if (document := self.held(exchange)) is not None:
                self._check_context(exchange, context)
                return document
            self.check_unspent(exchange, context)
            write_document(self._path(exchange), message, specs, tensors)
            flush_to_disk(self._documents)
            self._append(_Line("masked", exchange, context))
            return open_document(self._path(exchange))

    def drop(self, exchange: str) -> None:
        """Delete the document of an exchange that is over, for good."""
        with self._alone():
            if not self.is_closed(exchange):
                self._append(_Line("closed", exchange, ""))
            self._path(exchange).unlink(missing_ok=True)

    def drop_others(self, keep: Iterable[str]) -> None:
        """Delete the documents of all exchanges but some."""
        kept = {file_stem(exchange) for exchange in keep}
        for path in self._documents.glob("*.safetensors"):
            if path.stem not in kept:
                path.unlink(missing_ok=True)

    def _path(self, exchange: str) -> Path:
        return self._documents / f"{file_stem(exchange)}.safetensors"

    # ------------------------------------------------------------------------------------------------- promises
    def check_unspent(self, exchange: str, context: str) -> None:
        """Raise RefusedError, `round_spent`, if this site may not mask for an exchange.

        It has masked something else for it before, or the exchange is over.
        """
        masked_before = any(line.kind == "masked" and line.digest == context for line in self._lines)
        if masked_before or self._of("masked", exchange) or self.is_closed(exchange):
            state = "is over" if self.is_closed(exchange) else "has been answered"
            raise RefusedError(
                f"{exchange} {state} as far as this site knows, and what it has sent then is no longer here: it does "
                "not answer a second time, since two masked updates would show their difference",
                "With a quorum, the others go on. Else let the coordinating site close this round without a result: "
                "nnUNetv2_fed_admin abandon.",
                code="round_spent",
            )

    def check_context(self, exchange: str, context: str) -> None:
        """Raise RefusedError, `round_spent`, if the held document has another context."""
        with self._alone():
            self._check_context(exchange, context)

    def _check_context(self, exchange: str, context: str) -> None:
        found = self._of("masked", exchange)
        if not found:  # the machine went down when the document was there and the promise was not
            self._append(_Line("masked", exchange, context))
        elif context not in found:
            raise RefusedError(
                f"{exchange} has come a second time, with other weights or sites than before: what was masked then "
                "cannot be used, and nothing else is masked for it",
                "The coordinator was reset, or restored from a backup. Let the coordinating site close this round "
                "without a result: nnUNetv2_fed_admin abandon.",
                code="round_spent",
            )

    def promise_survivors(self, exchange: str, digest: str) -> None:
        """Promise to give shares for this set of survivors only.

        Raises:
            RefusedError: Shares for another set were promised before; its code is `second_set`.
        """
        with self._alone():
            before = self._of("answered", exchange)
            if any(one != digest for one in before):
                raise RefusedError(
                    f"THE COORDINATOR NAMES A SECOND SET OF SURVIVORS FOR {exchange}: with shares for both it could "
                    "read single updates. Nothing was given",
                    "Show this to the coordinating site and to the other sites.",
                    code="second_set",
                )
            if not before:
                self._append(_Line("answered", exchange, digest))

    def is_closed(self, exchange: str) -> bool:
        """Tell whether an exchange is over as far as this site knows."""
        return bool(self._of("closed", exchange))

    @property
    def has_promises(self) -> bool:
        """Tell whether anything was masked here since the run began, or began anew."""
        return bool(self._lines) and self._lines[-1].kind != "anew"

    def start_anew(self) -> None:
        """Let exchanges of the same names come again, with other keys.

        A person has to say so. All the same, nothing is masked twice in one context.
        """
        with self._alone():
            for path in self._documents.glob("*.safetensors"):
                path.unlink(missing_ok=True)
            self._append(_Line("anew", "", ""))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Lock out other processes for the block, and load all promises."""
        with locked(self._folder / LOCK_FILE):
            self._lines = self._load()
            yield

    def _of(self, kind: Promise, exchange: str) -> list[str]:
        """Return the digests that were promised for an exchange since the run began anew."""
        begin = max((number for number, line in enumerate(self._lines) if line.kind == "anew"), default=0)
        return [line.digest for line in self._lines[begin:] if line.kind == kind and line.exchange == exchange]

    def _append(self, line: _Line) -> None:
        """Append a line; it is on the disk before this returns."""
        path = self._folder / SPENT_FILE
        is_new = not path.exists()
        content = json.dumps(line.__dict__, separators=(",", ":")) + "\n"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, content.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if is_new:
            flush_to_disk(self._folder)
        self._lines.append(line)

    def _load(self) -> list[_Line]:
        path = self._folder / SPENT_FILE
        try:
            content = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        whole, _, torn = content.rpartition("\n")
        if torn:  # the machine went down while it was written, so nothing that it promises has left
            with path.open("r+b") as file:
                file.truncate(len(content.encode()) - len(torn.encode()))
        try:
            return [_Line(**json.loads(line)) for line in whole.splitlines()]
        except (TypeError, ValueError) as error:
            raise FederationError(
                f"{path} cannot be read, which says what this site has masked already: nothing is sent before it is "
                "brought back. Else ask the coordinating site to begin the run anew, in a new federation"
            ) from error


def file_stem(exchange: str) -> str:
    """Return the name of an exchange's file, without its ending."""
    return exchange.replace("/", "~")
