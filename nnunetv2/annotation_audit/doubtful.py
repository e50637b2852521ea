"""Decide which labels are doubtful, by the distances that are usual in their dataset.

A network is never right everywhere, so a distance says something only beside those of other cases. Distances are
positive and skewed; their logarithms are roughly normal where the labels are right. Wrong labels lie on one side only,
so centre and spread of right ones are estimated robustly: the median, and the distance of the median from those below
it. With a fifth of wrong labels both hardly move (breakdown point: a half).

A case is doubtful if its score, in such spreads above the median, exceeds a cut. The cut is chosen so that of a dataset
without any wrong label, one case in a hundred would be listed: the normal quantile of 0.99, with the Sidak correction
for as many classes as a case has chances to stand out with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

FALSE_ALARMS = 0.01
"""Share of the cases of a flawless dataset that would be listed."""
LEAST_SPREAD = 0.1
"""Of logarithms: distances that differ by less than a tenth are never told apart."""
FEWEST_CASES = 10
"""With fewer, spreads mean little."""
_NORMAL = 1.4826  # median absolute deviation -> standard deviation of a normal distribution
_SMALLEST_MM = 1e-3


@dataclass(frozen=True)
class Usual:
    """Centre and spread of the distances of a class, as logarithms."""

    median: float
    spread: float

    def score(self, distance_mm: float) -> float:
        """Return how many spreads a distance lies above the median."""
        return (_log(distance_mm) - self.median) / self.spread

    def distance_mm(self, score: float) -> float:
        """Return the distance with a score."""
        return float(np.exp(self.median + score * self.spread))


def describe_usual(distances_mm: Sequence[float]) -> Usual:
    """Estimate median and spread of the distances of right labels, among which are wrong ones."""
    logs = np.array([_log(distance) for distance in distances_mm])
    median = float(np.median(logs))
    spread = _NORMAL * float(np.median(median - logs[logs <= median]))
    return Usual(median, max(spread, LEAST_SPREAD))


def describe_classes(cases: Iterable[Mapping[str, float]]) -> dict[str, Usual]:
    """Return what is usual for each class, given the distances per class of all cases."""
    by_class: dict[str, list[float]] = {}
    for distances in cases:
        for name, distance in distances.items():
            by_class.setdefault(name, []).append(distance)
    return {name: describe_usual(distances) for name, distances in by_class.items()}


def choose_cut(num_classes: int, false_alarms: float = FALSE_ALARMS) -> float:
    """Return the score above which a case is doubtful."""
    return NormalDist().inv_cdf((1 - false_alarms) ** (1 / max(1, num_classes)))


def score_case(distances_mm: Mapping[str, float], usual: Mapping[str, Usual]) -> tuple[float, str | None]:
    """Return a case's score and its most doubtful class, from which the score comes."""
    scores = {name: usual[name].score(distance) for name, distance in distances_mm.items()}
    worst = max(scores, key=lambda name: scores[name], default=None)
    return (0.0, None) if worst is None else (scores[worst], worst)


def _log(distance_mm: float) -> float:
    return float(np.log(max(distance_mm, _SMALLEST_MM)))
