"""Find where the sites' settings differ, and say so in one sentence."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nnunetv2.federated.strict_json import canonical_json
from nnunetv2.federated.voxel_extrema import without_extrema

PLANS_OF_A_SITE = ("dataset_name", "image_reader_writer")
"""Fields of plans that say nothing about the network, and may differ."""

_ABSENT = object()
_SHOWN_CHARACTERS = 160


@dataclass(frozen=True)
class Difference:
    """The first place where values differ."""

    place: str
    """Such as "labels.liver"."""
    held: Mapping[str, Sequence[str]]
    """JSON text of a value, or "absent" -> the names of those that hold it."""

    def __str__(self) -> str:
        texts = [f"{_shorten(text)} at {', '.join(names)}" for text, names in self.held.items()]
        return f"{self.place} is {', '.join(texts[:-1])} and {texts[-1]}"


def first_difference(values: Mapping[str, Any], place: str) -> str | None:
    """Say where the first difference between sites is, and which sites have what; None if there is none.

    Args:
        values: Site -> JSON value.
        place: What the values are, such as "labels".

    Returns:
        For example "labels.liver is 1 at A, B and 2 at C".
    """
    difference = find_difference(values, place)
    return None if difference is None else str(difference)


def first_change(before: Any, now: Any) -> str | None:
    """Say what has changed between two JSON objects, such as "num_training_cases was 5 and is 6"; None: nothing."""
    difference = find_difference({"before": before, "now": now}, "")
    if difference is None:
        return None
    was, is_now = (next(text for text, names in difference.held.items() if when in names) for when in ("before", "now"))
    return f"{difference.place.removeprefix('.') or 'it'} was {_shorten(was)} and is {_shorten(is_now)}"


def find_difference(values: Mapping[str, Any], place: str) -> Difference | None:
    """Find the first place where JSON values differ, as deep inside of them as it can be named."""
    groups = _groups(values)
    if len(groups) <= 1:
        return None
    if all(isinstance(value, dict) for value in values.values()):
        for name in sorted(set().union(*values.values())):
            inside = {site: value.get(name, _ABSENT) for site, value in values.items()}
            if difference := find_difference(inside, f"{place}.{name}"):
                return difference
    if _are_lists_of_one_length(values):
        for index in range(len(next(iter(values.values())))):
            inside = {site: value[index] for site, value in values.items()}
            if difference := find_difference(inside, f"{place}[{index}]"):
                return difference
    return Difference(place, groups)


def comparable_plans(plans: Mapping[str, Any]) -> dict[str, Any]:
    """Return plans without what may differ between sites that train the same network."""
    return {name: value for name, value in without_extrema(plans).items() if name not in PLANS_OF_A_SITE}


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
