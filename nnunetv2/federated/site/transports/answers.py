"""Tell a coordinator's answers from those of proxies, login pages and other servers.

A coordinator answers with JSON that says so, and with its own messages; its refusals have `code`, `message` and
`remedy`, all three. Anything else speaks for nobody in the federation, whatever its status.
"""

from __future__ import annotations

from typing import Protocol, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from nnunetv2.federated.errors import FederationError, WireError
from nnunetv2.federated.protocol.api import Problem
from nnunetv2.federated.protocol.strict_json import decode_json, parse_json

Model = TypeVar("Model", bound=BaseModel)

LONGEST_TARGET = 100
"""Characters of the address that an answer points to, in a message."""


class Headers(Protocol):
    """Headers of the standard library or of `requests`; names in any case."""

    def get(self, name: str, default: str, /) -> str: ...


class ForeignAnswerError(FederationError):
    """An answer does not come from the coordinator."""


def decode_answer(model: type[Model], content: bytes, headers: Headers) -> Model:
    """Parse the body of a good answer.

    Raises:
        ForeignAnswerError: Something else than a coordinator has answered.
        WireError: The coordinator has, but it speaks another version: its message has fields that are unknown here.
    """
    try:
        if not is_json(headers):
            raise WireError("no JSON")
        return decode_json(model, content)
    except WireError as error:
        if is_json(headers) and _is_of_another_version(model, content):
            raise
        raise ForeignAnswerError(str(error)) from error


def find_problem(content: bytes, headers: Headers) -> Problem | None:
    """Return the refusal of a coordinator, or None if this is none."""
    try:
        problem = decode_answer(Problem, content, headers)
    except (ForeignAnswerError, WireError):
        return None
    return problem if problem.model_fields_set == Problem.model_fields.keys() else None


def is_json(headers: Headers) -> bool:
    """Tell whether an answer says that it is JSON."""
    return headers.get("Content-Type", "").partition(";")[0].strip().lower() == "application/json"


def describe_foreign(url: str, status: int, reason: str, headers: Headers) -> str:
    """Describe in one line an answer that is not the coordinator's, and its cause."""
    content = headers.get("Content-Type", "").partition(";")[0].strip()
    details = [content] if content else []
    target = urlsplit(headers.get("Location", "")[:LONGEST_TARGET])
    if target.netloc:
        details.append(f"it points to {target.scheme}://{target.netloc}")
    # The same line for all requests: the path behind /v1 says nothing about the server.
    line = ", ".join(
        [
            f"{url.partition('/v1/')[0]} answers with status {status}" + (f" ({reason})" if reason else ""),
            *details,
            "not as a coordinator would",
        ]
    )
    line = "".join(character if character.isprintable() else "?" for character in line)  # a stranger's words
    return f"{line}: {_CAUSES[status]}" if status in _CAUSES else line


_CAUSES = {
    413: "something on the way bounds the size of uploads. The coordinating site has to lift that "
    "(client_max_body_size 0 in nginx)",
    407: "a proxy wants a login",
    511: "the network wants a login",
}
"""Status -> its cause, between site and coordinator."""


def _is_of_another_version(model: type[BaseModel], content: bytes) -> bool:
    """Tell whether unknown fields alone keep a body from being this message."""
    try:
        value = parse_json(content, what="the answer")
        model.model_validate_json(content, strict=True)
    except WireError:
        return False
    except ValidationError as error:
        return (
            isinstance(value, dict)
            and bool(value.keys() & model.model_fields.keys())
            and all(one["type"] == "extra_forbidden" for one in error.errors())
        )
    return False
