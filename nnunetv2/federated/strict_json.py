"""Read JSON from strangers: strict about encoding, numbers, repeated keys and depth."""
from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from nnunetv2.federated.errors import WireError
from nnunetv2.utilities.plain_text import printable

Model = TypeVar("Model", bound=BaseModel)
T = TypeVar("T")

MAX_DEPTH = 64
"""Brackets inside brackets. Plans have six."""


def encode_json(model: BaseModel) -> bytes:
    """Return a message that travels without tensors, as JSON."""
    return model.model_dump_json().encode()


def decode_json(model: type[Model], data: bytes) -> Model:
    """Parse a message that travels without tensors.

    Raises:
        WireError: The bytes are not JSON, or not such a message.
    """
    parse_json(data, what=f"the {model.__name__}")
    return validated(lambda: model.model_validate_json(data, strict=True), f"the {model.__name__}")


def canonical_json(value: Any) -> bytes:
    """Return the one JSON text that equal values share, whatever the order of their keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def json_digest(value: Any) -> str:
    """Return the SHA-256 of `value` as canonical JSON, as sites use it to compare plans."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def validated(parse: Callable[[], T], what: str) -> T:
    """Return what `parse` builds, or raise WireError with the first thing that a model found wrong."""
    try:
        return parse()
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"][:4])
        raise WireError(printable(f"{what} is not valid: {place}: {first['msg']}", most=500)) from None


def parse_json(data: bytes | str, *, what: str) -> Any:
    """Parse JSON strictly: UTF-8, finite numbers, no key twice, no abyss of brackets."""
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        text.encode("utf-8")  # a lone surrogate can hide in an escape sequence of the outer JSON
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite)
        _check_depth(value)
        return value
    except (ValueError, RecursionError) as error:
        raise WireError(f"{what} is not proper JSON: {str(error):.200}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key is repeated")
    return content


def _check_depth(value: Any) -> None:
    """Look at the containers layer by layer: what comes after this may well be recursive."""
    layer = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        if not layer:
            return
        layer = [child for node in layer for child in (node.values() if isinstance(node, dict) else node)
                 if isinstance(child, dict | list)]
    if layer:
        raise ValueError(f"brackets are nested more than {MAX_DEPTH} deep")


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not allowed")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.40} is too large")
    return value
