"""Read JSON from strangers: strict about size, encoding, numbers, repeated keys and depth."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from nnunetv2.federated.errors import WireError
from nnunetv2.utilities.plain_text import printable

SHOWN_FAULTS = 1000
"""A description of each takes a hundred times the bytes that are at fault."""
Model = TypeVar("Model", bound=BaseModel)
T = TypeVar("T")

MAX_DEPTH = 64
"""Brackets inside brackets. Plans have six."""
MAX_ELEMENTS = 1_000_000
"""Brackets and commas, where nothing tighter is said: a value takes up to some hundred bytes of memory for each."""
MAX_DIGITS = 400
"""Characters of a number. float64 has 17 digits, and 308 zeros at most."""


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
    """Return the model that `parse` builds.

    Raises WireError with the first error that a model found.
    """
    try:
        return parse()
    except ValidationError as error:
        if error.error_count() > SHOWN_FAULTS:
            raise WireError(f"{what} is not valid: {error.error_count()} values are not what they should be") from None
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"][:4])
        raise WireError(printable(f"{what} is not valid: {place}: {first['msg']}", most=500)) from None


def parse_json(
    data: bytes | bytearray | str, *, what: str, elements: int = MAX_ELEMENTS, quotes: int | None = None
) -> Any:
    """Parse JSON strictly: UTF-8, finite numbers, no key twice, no abyss of brackets.

    Args:
        elements: Brackets and commas that there may be, counted before anything is built: 30 MiB of empty lists are
            gigabytes of objects. Those inside of texts count too.
        quotes: Quotation marks that there may be, and only ASCII, where numbers are expected and hardly any text.
    """
    found = count_elements(data)
    if found > elements:
        raise WireError(f"{what} has {found} brackets and commas, at most {elements} are allowed")
    if quotes is not None and not _is_of_numbers(data, quotes):
        raise WireError(f"{what} holds more text than a list of numbers needs")
    try:
        if isinstance(data, str):
            data.encode("utf-8")  # a lone surrogate can hide in an escape sequence of the outer JSON
        text = data if isinstance(data, str) else data.decode("utf-8")
        del data  # as large as the text
        value = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
        _check_depth(value)
        return value
    except (ValueError, RecursionError) as error:
        raise WireError(f"{what} is not proper JSON: {error!s:.200}") from None


def count_elements(data: bytes | bytearray | str) -> int:
    """Count the opening brackets and commas, which bound the number of elements."""
    if isinstance(data, str):
        return sum(map(data.count, "[{,"))
    return sum(map(data.count, (b"[", b"{", b",")))


def _is_of_numbers(data: bytes | bytearray | str, quotes: int) -> bool:
    if not data.isascii():
        return False
    if isinstance(data, str):
        return "\\u" not in data and data.count('"') <= quotes
    return b"\\u" not in data and data.count(b'"') <= quotes


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key is repeated")
    return content


def _check_depth(value: Any) -> None:
    """Refuse deep nesting, layer by layer: later code may well be recursive."""
    layer = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        if not layer:
            return
        layer = [
            child
            for node in layer
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
    if layer:
        raise ValueError(f"brackets are nested more than {MAX_DEPTH} deep")


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not allowed")


def _integer(text: str) -> int:
    return int(_few_digits(text))  # the time grows with the square of the digits


def _few_digits(text: str) -> str:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"{text:.40}... has {len(text)} digits, at most {MAX_DIGITS} are allowed")
    return text


def _finite(text: str) -> float:
    value = float(_few_digits(text))
    if not math.isfinite(value):
        raise ValueError(f"{text:.40} is too large")
    return value
