"""Let only those fields and tensors leave that this site's allow-list names.

    ~/.config/nnunet/federated_allow.json, or the file in nnUNet_fed_allow

    {"version": 1,
     "coordinator": "https://coordinator.example:8750",
     "documents": {"update": {"fields": ["metrics.val_losses"], "tensors": ["encoder.*"], "largest_bytes": 200000000}}}

Where there is no such file, all documents of the protocol may leave; `nnUNetv2_fed_manifest` shows them, and writes a
list. Patterns are those of a shell: `*` stands for anything. A field of a field is written `a.b`; the places in a list
have no names. Null, and empty lists and objects, say nothing and are always allowed, as are `protocol` and `kind`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from nnunetv2.federated.errors import FederationError, NotAllowedError, WireError
from nnunetv2.federated.protocol.messages import Count, Part, Text

if TYPE_CHECKING:
    from pydantic import BaseModel

    from nnunetv2.federated.protocol.document import TensorSpec
    from nnunetv2.federated.protocol.messages import Message

ALLOW_VARIABLE = "nnUNet_fed_allow"
ALWAYS_ALLOWED = ("protocol", "kind")
Patterns = Annotated[tuple[Text, ...], Field(max_length=20_000)]


class AllowedDocument(Part):
    """Allowed content of documents of one kind."""

    fields: Patterns = ()
    tensors: Patterns = ()
    largest_bytes: Count | None = None
    """Of one document, all of it. None: no bound."""


class AllowList(Part):
    """Allowed documents of this site."""

    version: Literal[1] = 1
    coordinator: Text | None = None
    """Where it may go. None: to the coordinator that the site has joined, whichever that is."""
    documents: Annotated[dict[Text, AllowedDocument], Field(max_length=100)]


def allow_list_path() -> tuple[Path, bool]:
    """Return the path of this site's list, and whether it was chosen."""
    chosen = os.environ.get(ALLOW_VARIABLE)
    default = Path.home() / ".config" / "nnunet" / "federated_allow.json"
    return (Path(chosen).expanduser(), True) if chosen else (default, False)


def load_allow_list() -> AllowList | None:
    """Return this site's list, or None if it has none.

    Raises:
        FederationError: There is a list, or the environment variable names one, and it cannot be read.
    """
    from nnunetv2.federated.protocol.strict_json import decode_json

    path, is_chosen = allow_list_path()
    if not is_chosen and not path.exists():
        return None
    try:
        return decode_json(AllowList, path.read_bytes())
    except (OSError, WireError) as error:
        raise FederationError(
            f"the list of what may leave this site, {path}, cannot be read, so nothing leaves: "
            f"{error}. Write it anew with nnUNetv2_fed_manifest --write-allow-list"
        ) from error


def check_document(message: Message, specs: Mapping[str, TensorSpec], *, url: str) -> None:
    """Raise NotAllowedError, with field or tensor, if a document is not allowed.

    Args:
        url: The coordinator that it is for, or the engine that carries it there.
    """
    from nnunetv2.federated.protocol.document import document_size

    allowed = _allowed(message.kind, url)
    if allowed is None:
        return
    _check_fields(message.kind, message, allowed)
    for name in specs:
        if not _matches(name, allowed.tensors):
            raise _refusal(f"tensor {name} of a message of kind {message.kind}")
    if allowed.largest_bytes is not None and (size := document_size(message, specs)) > allowed.largest_bytes:
        raise _refusal(f"a message of kind {message.kind} with {size} bytes, more than {allowed.largest_bytes},")


def check_body(kind: str, body: BaseModel, *, url: str) -> None:
    """Do the same for a message without tensors that is no document."""
    allowed = _allowed(kind, url)
    if allowed is not None:
        _check_fields(kind, body, allowed)


def paths_of(value: Any, prefix: str = "") -> Iterator[str]:
    """Yield the path of every JSON value; list entries share their list's."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from paths_of(inner, f"{prefix}.{name}" if prefix else name)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from paths_of(inner, prefix)
    elif value is not None:
        yield prefix


def _allowed(kind: str, url: str) -> AllowedDocument | None:
    """Return the allowed content of a kind; None without a list."""
    allow = load_allow_list()
    if allow is None:
        return None
    if allow.coordinator is not None and allow.coordinator.rstrip("/") != url.rstrip("/"):
        raise _refusal(f"sending anything to {url}, for the list is for {allow.coordinator},")
    allowed = allow.documents.get(kind)
    if allowed is None:
        raise _refusal(f"a message of kind {kind}")
    return allowed


def _check_fields(kind: str, message: BaseModel, allowed: AllowedDocument) -> None:
    for path in dict.fromkeys(paths_of(message.model_dump(mode="json"))):
        if path not in ALWAYS_ALLOWED and not _matches(path, allowed.fields):
            raise _refusal(f"field {path} of a message of kind {kind}")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _refusal(what: str) -> NotAllowedError:
    return NotAllowedError(
        f"{what} is not allowed to leave this site ({allow_list_path()[0]}): nothing was sent. "
        "nnUNetv2_fed_manifest shows what a training sends"
    )
