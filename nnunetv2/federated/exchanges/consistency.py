"""Find where the sites' settings differ, and say so in one sentence."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nnunetv2.federated.privacy.own_networks import data_part
from nnunetv2.federated.privacy.plans_redaction import without_extrema
from nnunetv2.federated.protocol.messages import Networks
from nnunetv2.utilities.plain_text import printable

PLANS_OF_A_SITE = ("dataset_name", "image_reader_writer")
"""Fields of plans that say nothing about the network, and may differ."""

_ABSENT = object()
_SHOWN_CHARACTERS = 160
_MOST_CHARACTERS = 4000


@dataclass(frozen=True)
class Difference:
    """The first place where values differ."""

    place: str
    """Such as "labels.liver"."""
    held: Mapping[str, Sequence[str]]
    """JSON text of a value, or "absent" -> the names of those that hold it."""

    def __str__(self) -> str:
        texts = [
            f"{printable(text, most=_SHOWN_CHARACTERS)} at {', '.join(names)}" for text, names in self.held.items()
        ]
        return printable(f"{self.place} is {', '.join(texts[:-1])} and {texts[-1]}", most=_MOST_CHARACTERS)

    def without_values(self) -> str:
        """Name the groups that hold the same, without their values.

        Values of plans that a site has made tell of its data.
        """
        groups = [f"at {', '.join(names)}" for names in self.held.values()]
        return printable(
            f"{self.place} is not the same {', '.join(groups[:-1])} and {groups[-1]}", most=_MOST_CHARACTERS
        )


def first_difference(values: Mapping[str, Any], place: str) -> str | None:
    """Describe the first difference between sites: its place, values and sites.

    None if there is none.

    Args:
        values: Site -> JSON value.
        place: Name of the values, such as "labels".

    Returns:
        For example "labels.liver is 1 at A, B and 2 at C". Names and values are printable, and cut where they are long.
    """
    difference = find_difference(values, place)
    return None if difference is None else str(difference)


def first_change(before: Any, now: Any) -> str | None:
    """Describe the first change between two JSON objects; None: nothing.

    Such as "num_training_cases was 5 and is 6".
    """
    difference = find_difference({"before": before, "now": now}, "")
    if difference is None:
        return None
    was, is_now = (next(text for text, names in difference.held.items() if when in names) for when in ("before", "now"))
    was, is_now = (printable(text, most=_SHOWN_CHARACTERS) for text in (was, is_now))
    return printable(f"{difference.place.removeprefix('.') or 'it'} was {was} and is {is_now}", most=_MOST_CHARACTERS)


def find_difference(values: Mapping[str, Any], place: str) -> Difference | None:
    """Find the first place where JSON values differ.

    As deep inside of them as it can be named.
    """
    groups = _groups(values)
    if len(groups) <= 1:
        return None
    if all(isinstance(value, dict) for value in values.values()):
        for name in sorted(set().union(*values.values())):
            inside = {site: value.get(name, _ABSENT) for site, value in values.items()}
            if difference := find_difference(inside, f"{place}.{printable(name, most=_SHOWN_CHARACTERS)}"):
                return difference
    if _are_lists_of_one_length(values):
        for index in range(len(next(iter(values.values())))):
            inside = {site: value[index] for site, value in values.items()}
            if difference := find_difference(inside, f"{place}[{index}]"):
                return difference
    return Difference(place, groups)


def comparable_plans(plans: Mapping[str, Any], networks: Networks = "equal") -> dict[str, Any]:
    """Return plans without the fields that may differ between sites.

    Args:
        networks: "equal": all train the same network; "own": only the fields that the data decide are left.
    """
    plans = without_extrema(plans)
    if networks == "own":
        return data_part(plans)
    return {name: value for name, value in plans.items() if name not in PLANS_OF_A_SITE}


def _groups(values: Mapping[str, Any]) -> dict[str, list[str]]:
    """Group the sites by the JSON text of their values."""
    groups = defaultdict(list)
    for site in sorted(values):
        value = values[site]
        groups["absent" if value is _ABSENT else _as_text(value)].append(site)
    return dict(groups)


def _are_lists_of_one_length(values: Mapping[str, Any]) -> bool:
    return (
        all(isinstance(value, list) for value in values.values())
        and len({len(value) for value in values.values()}) == 1
    )


def _as_text(value: Any) -> str:
    """Return the one JSON text that equal values share, with the letters of all languages."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
