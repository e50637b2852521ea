"""Find where the sites' settings differ, and say so in one sentence."""
from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from nnunetv2.utilities.plain_text import printable

_ABSENT = object()
_SHOWN_CHARACTERS = 160
_MOST_CHARACTERS = 4000


def first_difference(values: Mapping[str, Any], place: str, *, with_values: bool = True) -> str | None:
    """Say where the first difference between sites is, and which sites have what; None if there is none.

    Args:
        values: Site -> JSON value.
        place: What the values are, such as "labels".
        with_values: Whether everybody may see the values; else only which sites have the same.

    Returns:
        For example "labels.liver is 1 at A, B and 2 at C", or "labels.liver is not the same at A, B and at C".
        Names and values are printable, and cut where they are long.
    """
    if len(_groups(values)) <= 1:
        return None
    if all(isinstance(value, dict) for value in values.values()):
        for name in sorted(set().union(*values.values())):
            inside = {site: value.get(name, _ABSENT) for site, value in values.items()}
            within = f"{place}.{printable(name, most=_SHOWN_CHARACTERS)}"
            if difference := first_difference(inside, within, with_values=with_values):
                return difference
    if _are_lists_of_one_length(values):
        for index in range(len(next(iter(values.values())))):
            inside = {site: value[index] for site, value in values.items()}
            if difference := first_difference(inside, f"{place}[{index}]", with_values=with_values):
                return difference
    if not with_values:
        groups = [f"at {', '.join(sites)}" for sites in _groups(values).values()]
        return printable(f"{place} is not the same {', '.join(groups[:-1])} and {groups[-1]}", most=_MOST_CHARACTERS)
    held = [f"{printable(text, most=_SHOWN_CHARACTERS)} at {', '.join(sites)}" for text, sites in
            _groups(values).items()]
    return printable(f"{place} is {', '.join(held[:-1])} and {held[-1]}", most=_MOST_CHARACTERS)


def _groups(values: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return which sites hold which value, as JSON text."""
    groups = defaultdict(list)
    for site in sorted(values):
        value = values[site]
        groups["absent" if value is _ABSENT else _as_text(value)].append(site)
    return dict(groups)


def _are_lists_of_one_length(values: Mapping[str, Any]) -> bool:
    return (all(isinstance(value, list) for value in values.values())
            and len({len(value) for value in values.values()}) == 1)


def _as_text(value: Any) -> str:
    """Return the one JSON text that equal values share, with the letters of all languages."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
