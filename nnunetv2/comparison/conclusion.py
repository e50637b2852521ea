"""State the conclusions of a comparison and their limits, in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from nnunetv2.comparison.scores import PLACES, Place
from nnunetv2.comparison.significance import Comparison
from nnunetv2.comparison.study import Study

FEW_CASES = 20
FEW_SEEDS = 3


def conclude(study: Study, comparisons: Mapping[Place, Sequence[Comparison]]) -> str:
    """Return a few sentences for readers.

    They say which federated arms differ from which others beyond chance, where, and the reservations.
    """
    federated = {arm.name for arm in study.arms if arm.is_federated}
    told = []
    for place, several in comparisons.items():
        ours = [one for one in several if one.arm in federated]
        parts = [
            *(_sentence(one) for one in ours if one.is_shown),
            *(_objection(one) for one in ours if one.is_beyond_chance and not one.is_shown),
            *_pairs("no difference is shown between", (o for o in ours if o.is_tested and not o.is_beyond_chance)),
            *_pairs("there are too few cases to compare", (one for one in ours if not one.is_tested)),
        ]
        if parts:
            told.append(f"{PLACES[place].capitalize()}: {'; '.join(parts)}.")
    if not told:
        return "There is no federated arm beside another arm: nothing is compared."
    return " ".join([*told, *_reservations(study, comparisons)])


def _sentence(one: Comparison) -> str:
    word = "better" if one.difference > 0 else "worse"
    return f"{one.arm} is {word} than {one.reference} ({_size(one)})"


def _objection(one: Comparison) -> str:
    return f"between {one.arm} and {one.reference} ({_size(one)}) nothing is shown, as {one.objection}"


def _size(one: Comparison) -> str:
    interval = "" if math.isnan(one.low) else f", {one.low:+.3f} to {one.high:+.3f}"
    return f"{one.difference:+.3f} Dice{interval}"


def _pairs(words: str, several: Iterable[Comparison]) -> list[str]:
    names = [f"{one.arm} and {one.reference}" for one in several]
    return [f"{words} {_list(names)}"] if names else []


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _reservations(study: Study, comparisons: Mapping[Place, Sequence[Comparison]]) -> list[str]:
    reservations = []
    for place, several in comparisons.items():
        num_cases = min((one.fewest_cases for one in several), default=FEW_CASES)
        if num_cases < FEW_CASES:
            reservations.append(
                f"With {num_cases} test case{'' if num_cases == 1 else 's'} of a site {PLACES[place]}, only large "
                "differences can be shown: none shown does not mean none."
            )
    reservations.append("Intervals and p are about other test cases, not about other trainings: look at the seeds.")
    if study.seeds < FEW_SEEDS:
        reservations.append(
            f"With {study.seeds} training{'s' if study.seeds > 1 else ''} of each kind, chance of the training "
            f"itself is hardly averaged out: take --seeds {FEW_SEEDS} or more before you decide."
        )
    reservations.append(
        "All this holds for networks of this size and length, for these scans and scanners; a longer training may "
        "bring the arms closer together."
    )
    return reservations
