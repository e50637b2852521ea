"""What steps cost: against published figures, a numerical lower bound, and Opacus where it is installed."""

from __future__ import annotations

import builtins
import math

import numpy as np
import pytest

from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.privacy import accounting
from nnunetv2.federated.privacy.accounting import NoisySteps, epsilon_of, find_sigma, most_epochs

GRID = [(0.01, 1.0, 1000, 1e-4), (0.1, 4.0, 2500, 1e-4), (0.25, 8.0, 500, 1e-3), (0.04, 1.2, 2500, 5e-4)]


def lower_bound(steps: NoisySteps, delta: float, *, samples: int = 1_000_000) -> float:
    """Return an epsilon that the true one exceeds with near certainty, from samples of the privacy loss.

    Of removing a patient: x ~ (1 - q) N(0, s^2) + q N(1, s^2), loss = log of its density over that of N(0, s^2); delta
    of epsilon is the mean of max(0, 1 - exp(epsilon - loss)). Four standard errors below that, epsilon still holds.
    """
    rng = np.random.default_rng(0)
    loss = np.zeros(samples)
    for _ in range(steps.count):
        x = rng.normal(0, steps.sigma, samples) + (rng.random(samples) < steps.rate)
        loss += np.log1p(steps.rate * np.expm1((2 * x - 1) / (2 * steps.sigma**2)))

    def surely_exceeded(epsilon: float) -> bool:
        values = np.maximum(0, -np.expm1(np.minimum(epsilon - loss, 0)))
        return values.mean() - 4 * values.std() / math.sqrt(samples) > delta

    low, high = 0.0, 50.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if surely_exceeded(middle) else (low, middle)
    return low


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "delta"),
    [(NoisySteps(0.2, 1.0, 10), 1e-2), (NoisySteps(0.1, 0.8, 20), 1e-3), (NoisySteps(1, 4, 8), 1e-3)],
)
def test_epsilon_is_never_below_what_samples_of_the_privacy_loss_show(steps, delta):
    bound = lower_bound(steps, delta)
    found = epsilon_of([steps], delta)
    assert bound <= found <= 1.1 * bound + 0.02


@pytest.mark.slow
def test_known_figures_come_out():
    """Those of the design, computed by dp-accounting 0.6.0 on another machine."""
    assert epsilon_of([NoisySteps(0.01, 1.0, 10_000)], 1e-4) == pytest.approx(5.392, rel=0.01)
    assert epsilon_of([NoisySteps(0.1, 4.0, 2500)], 1e-5) == pytest.approx(6.0, rel=0.05)


@pytest.mark.parametrize(("rate", "sigma", "count", "delta"), GRID)
def test_opacus_agrees_within_one_percent(rate, sigma, count, delta):
    prv = pytest.importorskip("opacus.accountants").PRVAccountant()
    prv.history = [(sigma, rate, count)]
    found = epsilon_of([NoisySteps(rate, sigma, count)], delta)
    assert found == pytest.approx(prv.get_epsilon(delta, eps_error=0.01, delta_error=delta / 1000), rel=0.01)


def test_nothing_costs_nothing():
    assert epsilon_of([], 1e-5) == 0.0


def test_steps_of_one_kind_add_up():
    one, two = NoisySteps(0.1, 10.0, 30), NoisySteps(0.1, 10.0, 60)
    assert epsilon_of([one, one], 1e-5) == epsilon_of([two], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("spent", [[], [NoisySteps(0.2, 10.0, 50)]])
def test_the_noise_that_is_found_keeps_to_epsilon_and_hardly_exceeds_what_is_needed(spent):
    sigma = find_sigma(spent, rate=0.2, count=100, epsilon=2.0, delta=1e-3)
    further = [*spent, NoisySteps(0.2, sigma, 100)]
    assert epsilon_of(further, 1e-3) <= 2.0
    assert epsilon_of([*spent, NoisySteps(0.2, sigma / 1.01, 100)], 1e-3) > 2.0


def test_no_noise_is_enough_where_all_is_spent():
    spent = [NoisySteps(0.2, 10.0, 100)]
    epsilon = epsilon_of(spent, 1e-3)
    assert find_sigma(spent, rate=0.2, count=1, epsilon=epsilon, delta=1e-3) is None


def test_the_most_epochs_are_the_last_number_that_fits():
    epoch = NoisySteps(0.2, 10.0, 10)
    found = most_epochs([], epoch, at_most=100, epsilon=1.0, delta=1e-3)
    assert epsilon_of([NoisySteps(0.2, 10.0, 10 * found)], 1e-3) <= 1.0
    assert epsilon_of([NoisySteps(0.2, 10.0, 10 * (found + 1))], 1e-3) > 1.0
    assert most_epochs([], epoch, at_most=3, epsilon=1.0, delta=1e-3) == 3


def test_without_the_library_it_says_what_to_install(monkeypatch):
    importing = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("dp_accounting"):
            raise ImportError(name)
        return importing(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    accounting._epsilon.cache_clear()
    with pytest.raises(FederationError, match=r"pip install 'nnunetv2\[dp\]'"):
        epsilon_of([NoisySteps(0.1, 1.0, 10)], 1e-5)
