"""State the conclusions of a comparison and their limits, in words."""

from __future__ import annotations

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
        mixed = [one for one in ours if one.is_beyond_chance and not one.is_shown]
        parts = [
            *(_sentence(one) for one in ours if one.is_shown),
            *(_contradiction(one) for one in mixed),
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
    return f"{one.arm} is {word} than {one.reference} ({one.difference:+.3f} Dice)"


def _contradiction(one: Comparison) -> str:
    ranks_say, mean_says = ("better", "worse") if one.tendency > 0 else ("worse", "better")
    return (
        f"{one.arm} is {ranks_say} than {one.reference} by the ranks of the cases and not in the mean "
        f"({one.difference:+.3f} Dice): look at the cases in which it is far {mean_says}"
    )


def _pairs(words: str, several: Iterable[Comparison]) -> list[str]:
    names = [f"{one.arm} and {one.reference}" for one in several]
    return [f"{words} {_list(names)}"] if names else []


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _reservations(study: Study, comparisons: Mapping[Place, Sequence[Comparison]]) -> list[str]:
    reservations = []
    for place, several in comparisons.items():
        num_cases = max((one.num_cases for one in several), default=FEW_CASES)
        if num_cases < FEW_CASES:
            reservations.append(
                f"With {num_cases} test cases {PLACES[place]}, only large differences can be shown: none shown does "
                "not mean none."
            )
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
