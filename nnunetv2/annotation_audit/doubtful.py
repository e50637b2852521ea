"""Decide which labels are doubtful, by comparison within their dataset.

A network is never right everywhere, so a figure of a case says something only beside those of others. Two figures are
taken of every class: the distance of label and prediction, and the offset between their boundaries, which is large if
a label is too small or too large all around.

Distances are positive and skewed; their logarithms are roughly normal where the labels are right. Wrong labels lie on
one side only, so centre and spread of right ones are estimated robustly: the median, and the distance of the median
from those below it. Offsets have two sides: the median, and the median distance from it. With a fifth of wrong labels
none of them moves much (breakdown point: a half).

A case is doubtful if a figure of it lies so many spreads from the median that of a dataset without any wrong label, one
case in a hundred would be listed: the normal quantile of 0.99, with the Sidak correction for the sides on which a case
can stand out: three per class.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from nnunetv2.annotation_audit.disagreement import Figures

FALSE_ALARMS = 0.01
"""Share of the cases of a flawless dataset that would be listed."""
LEAST_SPREAD = 0.1
"""Distances that differ by less than a tenth are never told apart, nor offsets by a tenth of the usual distance."""
FEWEST_CASES = 10
"""With fewer, spreads mean little."""
_SIDES = 3  # farther apart, too small, too large
_NORMAL = 1.4826  # median absolute deviation -> standard deviation of a normal distribution
_SMALLEST_MM = 1e-3


@dataclass(frozen=True)
class Usual:
    """Centre and spread of the figures of a class."""

    log_distance: float
    log_distance_spread: float
    offset_mm: float
    offset_spread_mm: float

    @property
    def distance_mm(self) -> float:
        """Return the median distance."""
        return float(np.exp(self.log_distance))

    def score_distance(self, distance_mm: float) -> float:
        """Return how many spreads a distance lies above the median."""
        return (_log(distance_mm) - self.log_distance) / self.log_distance_spread

    def score_offset(self, offset_mm: float) -> float:
        """Return how many spreads an offset lies from the median."""
        return abs(offset_mm - self.offset_mm) / self.offset_spread_mm

    def score(self, figures: Figures) -> float:
        """Return the score of the figure that stands out most."""
        return max(self.score_distance(figures.distance_mm), self.score_offset(figures.offset_mm))

    def doubtful_from_mm(self, cut: float) -> float:
        """Return the distance from which on a case is doubtful."""
        return float(np.exp(self.log_distance + cut * self.log_distance_spread))


def describe_usual(figures: Sequence[Figures]) -> Usual:
    """Estimate centre and spread of the figures of right labels, among which are wrong ones."""
    logs = np.array([_log(one.distance_mm) for one in figures])
    offsets = np.array([one.offset_mm for one in figures])
    log_distance, offset = float(np.median(logs)), float(np.median(offsets))
    below = log_distance - logs[logs <= log_distance]
    return Usual(
        log_distance,
        max(_NORMAL * float(np.median(below)), LEAST_SPREAD),
        offset,
        max(_NORMAL * float(np.median(np.abs(offsets - offset))), LEAST_SPREAD * float(np.exp(log_distance))),
    )


def describe_classes(cases: Iterable[Mapping[str, Figures]]) -> dict[str, Usual]:
    """Return the usual figures of each class, from those of all cases."""
    by_class: dict[str, list[Figures]] = {}
    for classes in cases:
        for name, figures in classes.items():
            by_class.setdefault(name, []).append(figures)
    return {name: describe_usual(figures) for name, figures in by_class.items()}


def choose_cut(num_classes: int, false_alarms: float = FALSE_ALARMS) -> float:
    """Return the score above which a case is doubtful."""
    return NormalDist().inv_cdf((1 - false_alarms) ** (1 / (_SIDES * max(1, num_classes))))


def score_case(figures: Mapping[str, Figures], usual: Mapping[str, Usual]) -> tuple[float, str | None]:
    """Return a case's score and its most doubtful class, from which the score comes."""
    scores = {name: usual[name].score(one) for name, one in figures.items()}
    worst = max(scores, key=lambda name: scores[name], default=None)
    return (0.0, None) if worst is None else (scores[worst], worst)


def _log(distance_mm: float) -> float:
    return float(np.log(max(distance_mm, _SMALLEST_MM)))
