"""Find where the sites' settings differ, and say so in one sentence."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from nnunetv2.federated.strict_json import canonical_json

_ABSENT = object()
_SHOWN_CHARACTERS = 160


def first_difference(values: Mapping[str, Any], place: str, *, with_values: bool = True) -> str | None:
    """Say where the first difference between sites is, and which sites have what; None if there is none.

    Args:
        values: Site -> JSON value.
        place: What the values are, such as "labels".
        with_values: Whether everybody may see the values; else only which sites have the same.

    Returns:
        For example "labels.liver is 1 at A, B and 2 at C", or "labels.liver is not the same at A, B and at C".
    """
    if len(_groups(values)) <= 1:
        return None
    if all(isinstance(value, dict) for value in values.values()):
        for name in sorted(set().union(*values.values())):
            inside = {site: value.get(name, _ABSENT) for site, value in values.items()}
            if difference := first_difference(inside, f"{place}.{name}", with_values=with_values):
                return difference
    if _are_lists_of_one_length(values):
        for index in range(len(next(iter(values.values())))):
            inside = {site: value[index] for site, value in values.items()}
            if difference := first_difference(inside, f"{place}[{index}]", with_values=with_values):
                return difference
    if not with_values:
        groups = [f"at {', '.join(sites)}" for sites in _groups(values).values()]
        return f"{place} is not the same {', '.join(groups[:-1])} and {groups[-1]}"
    held = [f"{_shorten(text)} at {', '.join(sites)}" for text, sites in _groups(values).items()]
    return f"{place} is {', '.join(held[:-1])} and {held[-1]}"


def _groups(values: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return which sites hold which value, as JSON text."""
    groups = defaultdict(list)
    for site in sorted(values):
        value = values[site]
        groups["absent" if value is _ABSENT else canonical_json(value).decode()].append(site)
    return dict(groups)


def _are_lists_of_one_length(values: Mapping[str, Any]) -> bool:
    return (all(isinstance(value, list) for value in values.values())
            and len({len(value) for value in values.values()}) == 1)


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS - 3] + "..."
