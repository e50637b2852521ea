"""Compute the differential privacy that noisy steps of training cost patients.

A step draws every patient with the same chance (Poisson sampling), sums their contributions, each clipped to norm C,
and adds normal noise of standard deviation sigma C. Epsilon and delta are those of adding or removing one patient. All
steps are composed by their privacy loss distributions (PLD; Koskela et al., AISTATS 2020; Doroshenko et al., PoPETs
2022), as the library dp-accounting does it; its figures are upper bounds.

The library is imported where it is used: only trainings with differential privacy need it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from nnunetv2.federated.errors import FederationError

INTERVAL = 1e-4
"""Grid on which privacy losses are counted. A coarser one is faster, and its upper bounds are higher."""
PRECISION = 2e-3
"""How much larger a noise multiplier may be than the smallest that does, relatively."""
LEAST_SIGMA, LARGEST_SIGMA = 0.3, 1e5
"""Below the one, epsilon says nothing any more; above the other, the steps are nothing but noise."""


@dataclass(frozen=True)
class NoisySteps:
    """A number of steps of one kind."""

    rate: float
    """Chance of each patient to be in a lot."""
    sigma: float
    """Noise multiplier: standard deviation of the noise, in clipping norms."""
    count: int


def epsilon_of(steps: Iterable[NoisySteps], delta: float) -> float:
    """Return the epsilon of all steps together, an upper bound; 0 for none.

    Raises:
        FederationError: The library dp-accounting is not installed.
    """
    return _epsilon(_grouped(steps), delta)


def find_sigma(spent: Sequence[NoisySteps], *, rate: float, count: int, epsilon: float, delta: float) -> float | None:
    """Return the smallest noise multiplier that keeps further steps within epsilon, or None.

    Args:
        spent: Earlier steps on the same patients.
        rate: Chance of each patient to be in one of the further steps.
        count: Number of the further steps.
        epsilon: Of all steps together.
    """
    from scipy.optimize import brentq

    left = epsilon - epsilon_of(spent, delta)
    if left <= 0:
        return None

    def excess(sigma: float) -> float:
        return epsilon_of([*spent, NoisySteps(rate, sigma, count)], delta) - epsilon

    # Near the result: the noise of one Gaussian mechanism (Abadi et al., CCS 2016, theorem 1).
    guess = rate * math.sqrt(count * 2 * math.log(1.25 / delta)) / left
    low, high = (min(max(guess * factor, LEAST_SIGMA), LARGEST_SIGMA) for factor in (0.8, 1.25))
    while excess(high) > 0:
        if high == LARGEST_SIGMA:
            return None
        low, high = high, min(1.5 * high, LARGEST_SIGMA)
    while excess(low) <= 0:
        if low == LEAST_SIGMA:
            return low
        low, high = max(low / 1.5, LEAST_SIGMA), low
    # Over the logarithm, in which epsilon is nearly straight, and the tolerance relative.
    sigma = math.exp(brentq(lambda x: excess(math.exp(x)), math.log(low), math.log(high), xtol=PRECISION))
    while excess(sigma) > 0:
        sigma *= 1 + PRECISION
    return min(sigma, high)


def most_epochs(spent: Sequence[NoisySteps], epoch: NoisySteps, *, at_most: int, epsilon: float, delta: float) -> int:
    """Return how many epochs of such steps stay within epsilon, 0 to `at_most`."""

    def fits(number: int) -> bool:
        return epsilon_of([*spent, NoisySteps(epoch.rate, epoch.sigma, number * epoch.count)], delta) <= epsilon

    low, high = 0, at_most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def accountant_name() -> str:
    """Return the library and its version, for records."""
    from importlib.metadata import version

    _library()
    return f"dp-accounting {version('dp-accounting')}, PLD"


def _grouped(steps: Iterable[NoisySteps]) -> tuple[NoisySteps, ...]:
    """Add up steps of the same kind."""
    counts: Counter[tuple[float, float]] = Counter()
    for one in steps:
        counts[one.rate, one.sigma] += one.count
    return tuple(NoisySteps(rate, sigma, count) for (rate, sigma), count in sorted(counts.items()) if count)


@lru_cache(maxsize=256)
def _epsilon(steps: tuple[NoisySteps, ...], delta: float) -> float:
    return float(_accountant().compose(_event(steps)).get_epsilon(delta)) if steps else 0.0


def _event(steps: tuple[NoisySteps, ...]) -> Any:
    dp = _library()
    return dp.ComposedDpEvent(
        [
            dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(one.rate, dp.GaussianDpEvent(one.sigma)), one.count)
            for one in steps
        ]
    )


def _accountant() -> Any:
    relation = _library().NeighboringRelation.ADD_OR_REMOVE_ONE  # first: it says so where the library is missing
    from dp_accounting.pld import PLDAccountant

    return PLDAccountant(relation, INTERVAL)


def _library() -> Any:
    try:
        import dp_accounting
    except ImportError as error:
        raise FederationError(
            "differential privacy is accounted for by the library dp-accounting, which is not installed here: "
            "pip install 'nnunetv2[dp]', or pip install dp-accounting"
        ) from error
    return dp_accounting
