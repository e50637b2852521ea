"""Number the classes of all sites together, where each may annotate some of them only.

Classes are matched by their exact names; a site may give them any values in its own files. Names that look like one
class in two spellings are refused, since they would be two outputs of the network. The numbers do not depend on who
came first.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from nnunetv2.federated.errors import RefusedError, WireError
from nnunetv2.utilities.plain_text import printable

BACKGROUND, IGNORE = "background", "ignore"
OPTION = "--labels union"
LabelsOfSite = Mapping[str, int | Sequence[int]]
"""Name -> value, as in dataset.json."""


@dataclass(frozen=True)
class LabelUnion:
    """The classes of all sites together."""

    labels: dict[str, int]
    """Name -> common number: background 0, the classes from 1 on without gaps, ignore behind them if a site has it."""
    annotators: dict[str, int]
    """Class -> how many sites annotate it."""


def unite_labels(labels_of: Mapping[str, LabelsOfSite]) -> LabelUnion:
    """Return the classes of all sites, with common numbers.

    If a site has all classes, the order is that of the first such site by name; else classes are ordered by the
    smallest value that a site gives them, and then by name.

    Raises:
        RefusedError: A site has regions, no background 0, one value twice, or no class in common with another site; or
            two names look like one class.
    """
    plain = {site: _plain_labels(site, labels) for site, labels in sorted(labels_of.items())}
    classes = {site: _foreground(labels) for site, labels in plain.items()}
    _check_spellings(plain)
    _check_common(classes)
    order = _order(classes)
    labels = {BACKGROUND: 0, **{name: number for number, name in enumerate(order, 1)}}
    if any(IGNORE in one for one in plain.values()):
        labels[IGNORE] = len(order) + 1
    return LabelUnion(labels, {name: sum(name in one for one in classes.values()) for name in order})


def check_within(union: LabelUnion, site: str, labels: LabelsOfSite) -> None:
    """Raise RefusedError if a late site has a class that the others have not numbered."""
    own = _plain_labels(site, labels)
    _check_spellings({"the others": union.labels, site: own})
    unknown = sorted(own.keys() - union.labels.keys())
    if unknown:
        raise _refusal(
            f"site {site} comes late with {_quoted(unknown)}, and the classes of the others are numbered already: "
            f"{_quoted(union.labels)}",
            "Plan in a new federation, with all sites from the beginning.",
        )
    if not _foreground(own):
        raise _refusal(f"site {site} has no class but {_quoted(own)}", "Annotate one of the classes of the others.")


def check_union(
    labels: Mapping[str, object] | None, annotators: Mapping[str, int], own: LabelsOfSite
) -> dict[str, int]:
    """Return the common numbers that a coordinator has sent, if they can be right.

    Args:
        own: The labels of this site.

    Raises:
        WireError: They are missing or have gaps, or lack a class of this site.
    """
    if labels is None:
        raise WireError("the coordinator has not numbered the classes of all sites: use matching versions")
    numbers = {name: value for name, value in labels.items() if isinstance(value, int)}
    classes = {name: value for name, value in numbers.items() if name not in (BACKGROUND, IGNORE)}
    expected = list(range(len(labels)))
    if len(numbers) != len(labels) or sorted(numbers.values()) != expected or numbers.get(BACKGROUND) != 0:
        raise WireError(f"the coordinator numbers the classes {_shown(labels)}, expected 0 to {len(labels) - 1}")
    if numbers.get(IGNORE, expected[-1]) != expected[-1]:
        raise WireError(f"the coordinator gives 'ignore' the number {numbers[IGNORE]}, expected the last one")
    if missing := sorted(own.keys() - numbers.keys()):
        raise WireError(f"the coordinator has not numbered {_quoted(missing)} of this site")
    if annotators.keys() != classes.keys():
        raise WireError("the coordinator does not say of each class how many sites annotate it")
    return dict(sorted(numbers.items(), key=lambda item: item[1]))


# ------------------------------------------------------------------------------------------------------------ details
def _plain_labels(site: str, labels: LabelsOfSite) -> dict[str, int]:
    regions = [name for name, value in labels.items() if not isinstance(value, int)]
    if regions:
        raise _refusal(
            f"{_quoted(regions)} of site {site} {'are regions' if len(regions) > 1 else 'is a region'} (lists of "
            "values), which may overlap: what is not annotated of them cannot be told from background",
            "Name plain classes in dataset.json, or found the federation with --labels equal.",
        )
    plain = {name: value for name, value in labels.items() if isinstance(value, int)}
    if plain.get(BACKGROUND) != 0:
        raise _refusal(f"site {site} has no label 'background' with value 0", "Mend its dataset.json.")
    first = {value: name for name, value in reversed(plain.items())}
    twice = [name for name, value in plain.items() if first[value] != name]
    if twice:
        raise _refusal(
            f"labels {_quoted([first[plain[twice[0]]], twice[0]])} of site {site} both have value {plain[twice[0]]}",
            "Mend its dataset.json.",
        )
    return plain


def _foreground(labels: Mapping[str, int]) -> dict[str, int]:
    return {name: value for name, value in labels.items() if name not in (BACKGROUND, IGNORE)}


def _order(classes: Mapping[str, Mapping[str, int]]) -> list[str]:
    everything = set().union(*classes.values())
    complete = next((one for one in classes.values() if one.keys() == everything), None)
    if complete is not None:
        return sorted(complete, key=complete.__getitem__)
    smallest = {name: min(one[name] for one in classes.values() if name in one) for name in everything}
    return sorted(everything, key=lambda name: (smallest[name], name))


def _check_common(classes: Mapping[str, Mapping[str, int]]) -> None:
    annotators = Counter(name for one in classes.values() for name in one)
    for site, own in classes.items():
        if len(classes) > 1 and not any(annotators[name] > 1 for name in own):
            others = annotators.keys() - own.keys()
            raise _refusal(
                f"site {site} annotates {_quoted(own) or 'nothing'}, and no other site does: the others annotate "
                f"{_quoted(sorted(others)) or 'nothing'}",
                "Give classes that are the same the same name in each dataset.json, or leave this site out.",
            )


def _check_spellings(labels_of: Mapping[str, Mapping[str, int]]) -> None:
    """Refuse two spellings of one class, unless one site has both.

    Such a site means two classes.
    """
    sites: dict[str, list[str]] = {}
    for site, labels in labels_of.items():
        for name in labels:
            sites.setdefault(name, []).append(site)
    # Of alike names at the same sites the first stands for all: another one clashes with the same names.
    alike: dict[str, dict[frozenset[str], str]] = {}
    for name in sorted(sites):
        for spelling in _spellings(name):
            alike.setdefault(spelling, {}).setdefault(frozenset(sites[name]), name)
    for first in alike.values():
        clash = next((pair for pair in combinations(first, 2) if pair[0].isdisjoint(pair[1])), None)
        if clash is not None:
            one, other = (first[found_at] for found_at in clash)
            raise _refusal(
                f"{_quoted([one])} at {', '.join(sites[one])} and {_quoted([other])} at {', '.join(sites[other])} look "
                "like one class in two spellings",
                "Write the name of a class in the same way in each dataset.json; if they are two classes, give them "
                "names that differ in more than case, plural or blanks.",
            )


def _spellings(name: str) -> set[str]:
    """Return the possible singulars of a name, without case and separators."""
    bare = re.sub(r"[\s_.\-]+", "", name.casefold())
    found = {bare}
    if bare.endswith("s"):
        found.add(bare[:-1])
    if bare.endswith("es"):
        found.add(bare[:-2])
    if bare.endswith("ies"):
        found.add(f"{bare[:-3]}y")
    return found - {""}


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(printable(name, most=80)) for name in names)


def _shown(labels: Mapping[str, object]) -> str:
    return printable(str(dict(labels)), most=500)


def _refusal(text: str, remedy: str) -> RefusedError:
    return RefusedError(f"{OPTION}: {text}", remedy, code="datasets_differ")
