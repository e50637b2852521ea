"""State the conclusions of a comparison and their limits, in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from nnunetv2.comparison.scores import PLACES, Place
from nnunetv2.comparison.significance import Comparison
from nnunetv2.comparison.study import Study

FEW_CASES = 20
FEW_SEEDS = 3


def conclude(study: Study, comparisons: Mapping[Place, Sequence[Comparison]]) -> str:
    """Return a few sentences for readers.

    They say which federated arms differ from which others: a paragraph for each place, and one of the reservations.
    """
    federated = {arm.name for arm in study.arms if arm.is_federated}
    told = []
    for place, several in comparisons.items():
        ours = [one for one in several if one.arm in federated]
        parts = [
            *_by_reference((one for one in ours if one.is_shown and one.difference > 0), "better than", with_size=True),
            *_by_reference((one for one in ours if one.is_shown and one.difference < 0), "worse than", with_size=True),
            *_by_reference((one for one in ours if one.is_tested and not one.is_shown), "not shown to differ from"),
            *_by_reference((one for one in ours if not one.is_tested), "tested in too few cases to compare with"),
        ]
        if parts:
            told.append(f"{PLACES[place].capitalize()}: {'; '.join(parts)}.")
    if not told:
        return "There is no federated arm beside another arm: nothing is compared."
    return "\n\n".join([*told, " ".join(_reservations(study, comparisons))])


def _by_reference(several: Iterable[Comparison], relation: str, *, with_size: bool = False) -> list[str]:
    """Return a clause for each reference, which names the arms in that relation to it."""
    arms: dict[str, list[str]] = defaultdict(list)
    for one in several:
        arms[one.reference].append(f"{one.arm} ({one.difference:+.3f} Dice)" if with_size else one.arm)
    return [
        f"{_list(names)} {'is' if len(names) == 1 else 'are'} {relation} {reference}"
        for reference, names in arms.items()
    ]


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _reservations(study: Study, comparisons: Mapping[Place, Sequence[Comparison]]) -> list[str]:
    reservations = []
    num_cases = min((one.fewest_cases for several in comparisons.values() for one in several), default=FEW_CASES)
    if num_cases < FEW_CASES:
        reservations.append(
            f"A site has {num_cases} test case{'' if num_cases == 1 else 's'} only: with so few, only large "
            "differences can be shown, and none shown does not mean none."
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
