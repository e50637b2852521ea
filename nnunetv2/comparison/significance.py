"""Say how sure a difference is: bootstrap intervals, paired Wilcoxon signed-rank tests, Holm's correction.

A rank test counts all cases alike, so a site with most of them decides it; the differences of the tables count all
sites alike. And both are about test cases, not about trainings. So a difference counts as shown where the test, the
interval of the difference and every seed agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nnunetv2.comparison.scores import CaseValues

RESAMPLES = 2000
CONFIDENCE = 0.95
LEVEL = 0.05
LEAST_CASES, LEAST_CASES_OF_A_DATASET = 6, 3
"""Of fewer cases, bootstrap intervals are far too narrow. With these they hold the true mean in nearly nine of ten."""


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
    low: float
    """End of the 95 % interval of the difference, from a bootstrap over pairs; NaN with too few cases."""
    high: float
    per_seed: tuple[float, ...] = ()
    """The difference in each seed that both arms have."""
    tendency: float
    """Sum of the signed ranks. Its sign is the direction that the test speaks for."""
    num_cases: int
    fewest_cases: int
    """Cases of the dataset with fewest."""
    p: float
    """Of the two-sided Wilcoxon signed-rank test; NaN if with so few cases no corrected p could be below 0.05."""
    p_holm: float = math.nan
    """The same, corrected for all comparisons of the place."""

    @property
    def is_beyond_chance(self) -> bool:
        """Tell whether the test says that the arms differ on these cases, in whatever direction."""
        return self.p_holm < LEVEL

    @property
    def is_shown(self) -> bool:
        """Tell whether test, interval and seeds agree on the direction."""
        return self.is_beyond_chance and self.objection is None

    @property
    def objection(self) -> str | None:
        """Return the reason not to believe the test, in words."""
        if self.difference * self.tendency <= 0:
            return "the ranks contradict the mean"
        if math.isnan(self.low):
            return "there are too few cases for an interval"
        if self.low * self.high <= 0:
            return "the interval holds 0"
        if any(one * self.difference <= 0 for one in self.per_seed):
            return "seeds disagree"
        return None

    @property
    def is_tested(self) -> bool:
        """Tell whether there were enough cases for a test."""
        return not math.isnan(self.p)


def estimate_mean(datasets: Mapping[int, Mapping[str, float]], seed: int = 0) -> Estimate:
    """Estimate the mean over datasets of their mean over cases.

    Cases are drawn anew within each dataset, from deviations that are scaled by sqrt(n / (n - 1)), since the plain
    bootstrap of a mean of n cases is too narrow by that factor (Rao and Wu, J Am Stat Assoc 83:231, 1988).

    Seeds of trainings are inside the values. With too few cases there is no interval.
    """
    samples = [np.array(list(cases.values())) for cases in datasets.values()]
    return _estimate(samples, seed)


def _estimate(samples: Sequence[np.ndarray], seed: int = 0) -> Estimate:
    from scipy.stats import bootstrap

    num_cases = sum(map(len, samples))
    mean = _mean_of_means(samples)
    if num_cases < LEAST_CASES or min(map(len, samples)) < LEAST_CASES_OF_A_DATASET:
        return Estimate(mean=mean, low=math.nan, high=math.nan, num_cases=num_cases)
    if all(np.ptp(sample) == 0 for sample in samples):
        return Estimate(mean=mean, low=mean, high=mean, num_cases=num_cases)

    def mean_of_means(*drawn: np.ndarray, axis: int) -> np.ndarray:
        return np.mean([one.mean(axis=axis) for one in drawn], axis=0)

    scaled = [
        sample.mean() + (sample - sample.mean()) * math.sqrt(len(sample) / (len(sample) - 1)) for sample in samples
    ]
    interval = bootstrap(
        scaled,
        mean_of_means,
        vectorized=True,
        paired=False,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(mean=mean, low=float(interval.low), high=float(interval.high), num_cases=num_cases)


def _mean_of_means(samples: Sequence[np.ndarray]) -> float:
    return float(np.mean([sample.mean() for sample in samples])) if samples else math.nan


def compare_arms(
    values: CaseValues, references: Sequence[str], per_seed: Sequence[CaseValues] = ()
) -> list[Comparison]:
    """Compare every arm with every reference arm, and correct for the number of comparisons.

    Each case counts once, with the mean of its seeds, so that trainings are not counted as patients.

    Args:
        per_seed: The values of each seed.
    """
    present = [reference for reference in references if reference in values]
    pairs = [
        (arm, reference)
        for number, reference in enumerate(present)
        for arm in values
        if arm != reference and arm not in present[:number]
    ]
    comparisons = [_compare(values, arm, reference, per_seed, len(pairs)) for arm, reference in pairs]
    corrected = holm([one.p for one in comparisons])
    return [replace(one, p_holm=p) for one, p in zip(comparisons, corrected)]


def _compare(
    values: CaseValues, arm: str, reference: str, per_seed: Sequence[CaseValues], num_comparisons: int
) -> Comparison:
    from scipy.stats import rankdata, wilcoxon

    per_dataset = _paired_differences(values, arm, reference)
    differences = np.concatenate([np.empty(0), *per_dataset])
    estimate = _estimate(per_dataset)
    if smallest_p(len(differences)) * num_comparisons >= LEVEL:
        p = math.nan
    elif not differences.any():
        p = 1.0
    else:
        p = float(wilcoxon(differences, zero_method="pratt").pvalue)
    seeds = [_mean_of_means(_paired_differences(one, arm, reference)) for one in per_seed]
    return Comparison(
        arm=arm,
        reference=reference,
        difference=estimate.mean,
        low=estimate.low,
        high=estimate.high,
        per_seed=tuple(one for one in seeds if not math.isnan(one)),
        tendency=float(np.sign(differences) @ rankdata(np.abs(differences))),
        num_cases=len(differences),
        fewest_cases=min(map(len, per_dataset), default=0),
        p=p,
    )


def smallest_p(num_cases: int) -> float:
    """Return the smallest p that a two-sided signed-rank test of so many pairs can have."""
    return min(1.0, 2 * 0.5**num_cases)


def _paired_differences(values: CaseValues, arm: str, reference: str) -> list[np.ndarray]:
    """Return the differences of the cases that both arms have, an array per dataset with any."""
    ours, theirs = values.get(arm, {}), values.get(reference, {})
    return [
        np.array([ours[dataset][case] - theirs[dataset][case] for case in shared])
        for dataset in sorted(ours.keys() & theirs.keys())
        if (shared := sorted(ours[dataset].keys() & theirs[dataset].keys()))
    ]


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
