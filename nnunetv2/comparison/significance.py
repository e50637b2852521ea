"""Say how sure a difference is: bootstrap intervals, paired Wilcoxon signed-rank tests, Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nnunetv2.comparison.scores import CaseValues

RESAMPLES = 2000
CONFIDENCE = 0.95
LEAST_CASES = 6
"""Of fewer pairs no two-sided signed-rank test can be below 0.05, whatever they show."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float
    num_cases: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An arm against another one on the same test cases."""

    arm: str
    reference: str
    difference: float
    """Arm minus reference, the mean over datasets of their mean over cases, as in all tables."""
    tendency: float
    """Sum of the signed ranks. Its sign is the direction that the test speaks for."""
    num_cases: int
    p: float
    """Of the two-sided Wilcoxon signed-rank test; NaN with too few cases."""
    p_holm: float = math.nan
    """The same, corrected for all comparisons of the place."""

    @property
    def is_beyond_chance(self) -> bool:
        """Tell whether the arms differ at the level of 0.05, in whatever direction."""
        return self.p_holm < 0.05

    @property
    def is_shown(self) -> bool:
        """Tell whether the difference is beyond chance, and the ranks agree with its sign.

        They may speak for an arm whose mean is lower: a little better in many cases, far worse in a few.
        """
        return self.is_beyond_chance and self.difference * self.tendency > 0

    @property
    def is_tested(self) -> bool:
        """Tell whether there were enough cases for a test."""
        return not math.isnan(self.p)


def estimate_mean(datasets: Mapping[int, Mapping[str, float]], seed: int = 0) -> Estimate:
    """Estimate the mean over datasets of their mean over cases.

    Cases are drawn anew within each dataset.

    Seeds of trainings are inside the values. With one case in a dataset there is no interval.
    """
    from scipy.stats import bootstrap

    samples = [np.array(list(cases.values())) for cases in datasets.values()]
    num_cases = sum(map(len, samples))
    mean = float(np.mean([sample.mean() for sample in samples])) if samples else math.nan
    if not samples or min(map(len, samples)) < 2:
        return Estimate(mean=mean, low=math.nan, high=math.nan, num_cases=num_cases)
    if all(np.ptp(sample) == 0 for sample in samples):
        return Estimate(mean=mean, low=mean, high=mean, num_cases=num_cases)

    def mean_of_means(*drawn: np.ndarray, axis: int) -> np.ndarray:
        return np.mean([one.mean(axis=axis) for one in drawn], axis=0)

    interval = bootstrap(
        samples,
        mean_of_means,
        vectorized=True,
        paired=False,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(mean=mean, low=float(interval.low), high=float(interval.high), num_cases=num_cases)


def compare_arms(values: CaseValues, references: Sequence[str]) -> list[Comparison]:
    """Compare every arm with every reference arm, and correct for the number of comparisons.

    Each case counts once, with the mean of its seeds, so that trainings are not counted as patients.
    """
    present = [reference for reference in references if reference in values]
    comparisons = [
        _compare(values, arm, reference)
        for number, reference in enumerate(present)
        for arm in values
        if arm != reference and arm not in present[:number]
    ]
    corrected = holm([one.p for one in comparisons])
    return [replace(one, p_holm=p) for one, p in zip(comparisons, corrected)]


def _compare(values: CaseValues, arm: str, reference: str) -> Comparison:
    from scipy.stats import rankdata, wilcoxon

    ours, theirs = values[arm], values[reference]
    per_dataset = [
        np.array([ours[dataset][case] - theirs[dataset][case] for case in shared])
        for dataset in sorted(ours.keys() & theirs.keys())
        if (shared := sorted(ours[dataset].keys() & theirs[dataset].keys()))
    ]
    differences = np.concatenate([np.empty(0), *per_dataset])
    if len(differences) < LEAST_CASES:
        p = math.nan
    elif not differences.any():
        p = 1.0
    else:
        p = float(wilcoxon(differences, zero_method="pratt").pvalue)
    return Comparison(
        arm=arm,
        reference=reference,
        difference=float(np.mean([one.mean() for one in per_dataset])) if per_dataset else math.nan,
        tendency=float(np.sign(differences) @ rankdata(np.abs(differences))),
        num_cases=len(differences),
        p=p,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for their number (Holm, Scand J Stat 6:65, 1979).

    NaN stays and does not count.

    The smallest is multiplied by their number, the next by one less, and so on; none gets below the one before.
    """
    tested = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    corrected = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, p * (len(tested) - rank)))
        corrected[index] = largest
    return corrected
