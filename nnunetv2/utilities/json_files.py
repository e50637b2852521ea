"""Read hand-edited JSON files, with messages that name the fault."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

KINDS = {
    dict: "names in braces, {...}",
    list: "a list, [...]",
    str: "a text",
    int: "a whole number",
    float: "a number with decimals",
    bool: "true or false",
    type(None): "null",
}
"""Types of JSON in words."""
_REMEDY = "Remedy: correct the file with an editor that shows errors in JSON"


class JsonFileError(ValueError):
    """A file is no JSON, or holds something else than expected."""


PLANS: Mapping[str, type] = MappingProxyType({"configurations": dict})
DATASET: Mapping[str, type] = MappingProxyType({"labels": dict})
"""The keys that plans, and a dataset.json, must have at least."""


def read_json(
    file: str | os.PathLike[str],
    kind: type = dict,
    *,
    required: Mapping[str, type] = MappingProxyType({}),
    refuse_duplicates: bool = False,
    if_missing: str | None = None,
) -> Any:
    """Return the content of a JSON file in UTF-8.

    A byte order mark at its beginning is allowed.

    Args:
        kind: The type of the whole content.
        required: Keys that it must have, and the types of their values.
        refuse_duplicates: Refuse keys that occur twice in the same braces, of which a parser keeps the last only.
        if_missing: The message if there is no such file, best with a remedy. Default: Python's own.

    Raises:
        JsonFileError: It is no valid JSON, of another type, or lacks a key.
        OSError: It cannot be read.
    """
    if if_missing is not None and not Path(file).is_file():
        raise FileNotFoundError(if_missing)
    data = Path(file).read_bytes()
    if not data.strip():
        raise JsonFileError(
            f"{os.fspath(file)} is empty, where JSON is expected. Remedy: restore the file, or make it anew"
        )
    try:
        content: Any = json.loads(
            data.decode("utf-8-sig"), object_pairs_hook=_unique_keys if refuse_duplicates else None
        )
    except UnicodeDecodeError as error:
        raise JsonFileError(f"{os.fspath(file)} is not encoded in UTF-8: {error}. Remedy: save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise JsonFileError(f"{os.fspath(file)} is not valid JSON: {error}. {_REMEDY}") from error
    except RecursionError as error:
        raise JsonFileError(f"{os.fspath(file)} is nested too deeply to be read. {_REMEDY}") from error
    except _DuplicateKeyError as error:
        raise JsonFileError(
            f"{os.fspath(file)}: {error} occurs twice in the same braces. Remedy: keep one of them, or "
            "give the other its own name"
        ) from error
    if not isinstance(content, kind):
        raise JsonFileError(f"{os.fspath(file)} holds {kind_of(content)}, but must hold {KINDS[kind]}. {_REMEDY}")
    for key, kind_of_value in required.items():
        if not isinstance(content.get(key), kind_of_value):
            found = kind_of(content[key]) if key in content else "nothing"
            raise JsonFileError(
                f"{os.fspath(file)} must hold {KINDS[kind_of_value]} under {key!r}, it holds {found}. "
                "Is it another file than its name says? Remedy: restore it, or make it anew"
            )
    return content


def kind_of(value: object) -> str:
    """Return the kind of a JSON value, in words."""
    return KINDS.get(type(value), type(value).__name__)


class _DuplicateKeyError(Exception):
    """A key occurs twice in a JSON object."""


def _unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKeyError(repr(next(key for key in keys if keys.count(key) > 1)))
    return content
