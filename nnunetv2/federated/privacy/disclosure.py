"""Describe documents before they leave, and derive their allow-list."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

from nnunetv2.federated.privacy.allow_list import AllowedDocument, AllowList
from nnunetv2.federated.protocol.document import TensorSpec, document_size
from nnunetv2.federated.protocol.messages import Message, Part, PrivacyDeclaration
from nnunetv2.federated.protocol.strict_json import encode_json

UNKNOWN = "known only later"
ALLOWANCE = 1 << 20
"""Bytes by which a document may be larger than its description, at least."""
SHOWN = 500
"""Characters of a value, or of the names in it."""


@dataclass(frozen=True, kw_only=True)
class Disclosure:
    """A document of this site, and the part that others see."""

    when: str
    message: Message | Part
    specs: Mapping[str, TensorSpec] = field(default_factory=dict)
    passed_on: str
    """Part of it that reaches the other sites."""
    known: bool = True
    """Whether the values are the real ones."""

    @property
    def kind(self) -> str:
        """Return the kind of the message."""
        return self.message.kind if isinstance(self.message, Message) else "failure_report"

    @property
    def size(self) -> int:
        """Return the bytes that travel."""
        return (
            document_size(self.message, self.specs)
            if isinstance(self.message, Message)
            else len(encode_json(self.message))
        )


# ------------------------------------------------------------------------------------------------------- describing
def describe_fields(message: Part, prefix: str = "", *, known: bool = True) -> Iterator[str]:
    """Yield path and value, or number of values, of every filled field."""
    for name in type(message).model_fields:
        value, path = getattr(message, name), f"{prefix}{name}"
        if isinstance(value, Part):
            yield from describe_fields(value, f"{path}.", known=known and not isinstance(value, PrivacyDeclaration))
        elif name == "plans" and known:  # some of its fields tell of the data: people decide by their values
            yield from (f"{path}.{key}: {_shortened(_as_json(one))}" for key, one in value.items())
        elif value not in (None, (), {}):
            yield f"{path}: {_describe_value(value, known or path in ('protocol', 'kind'))}"


def _describe_value(value: Any, known: bool) -> str:
    if isinstance(value, Mapping):
        text = _as_json(dict(value))
        return text if known and len(text) <= SHOWN else f"{count(value)}: {_shortened(', '.join(map(str, value)))}"
    if isinstance(value, tuple) and isinstance(value[0], Part):
        return f"{count(value)} of {', '.join(type(value[0]).model_fields)}"
    if isinstance(value, tuple):
        return count(value) if not known or len(value) > 8 else _as_json(value)
    return _as_json(value) if known else UNKNOWN


def _as_json(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def count(values: Sized, what: str = "value") -> str:
    """Return the number of values in words."""
    return f"{len(values)} {what}{'' if len(values) == 1 else 's'}"


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."


# ------------------------------------------------------------------------------------------------------- allow-list
def allow_list_of(documents: Sequence[Disclosure], *, coordinator: str | None) -> AllowList:
    """Return the allow-list of exactly these documents' fields and tensors.

    Args:
        coordinator: Its address, if nothing may go elsewhere.
    """
    by_kind: dict[str, list[Disclosure]] = {}
    for document in documents:
        by_kind.setdefault(document.kind, []).append(document)
    return AllowList(
        coordinator=coordinator, documents={kind: _allow(group) for kind, group in sorted(by_kind.items())}
    )


def _allow(documents: Sequence[Disclosure]) -> AllowedDocument:
    size = max(document.size for document in documents)
    fields = {path for document in documents for path in field_patterns(document.message)}
    tensors = {tensor_pattern(name) for document in documents for name in document.specs}
    return AllowedDocument(
        fields=tuple(sorted(fields)), tensors=tuple(sorted(tensors)), largest_bytes=size + max(size // 4, ALLOWANCE)
    )


def field_patterns(message: Part, prefix: str = "") -> Iterator[str]:
    """Yield a pattern per filled field; `.*` where names below are data."""
    for name in type(message).model_fields:
        value, path = getattr(message, name), f"{prefix}{name}"
        parts = [one for one in (value if isinstance(value, tuple) else (value,)) if isinstance(one, Part)]
        if parts:
            yield from {pattern for part in parts for pattern in field_patterns(part, f"{path}.")}
        elif isinstance(value, Mapping):
            yield from (f"{path}.{key}" for key in value) if name == "metrics" else (f"{path}.*",)
        elif value not in (None, ()):
            yield path


def tensor_pattern(name: str) -> str:
    """Return the pattern of a tensor's part: `encoder.stages.0.weight` -> `encoder.*`."""
    head, dot, _ = name.partition(".")
    return f"{head}{dot}*"
