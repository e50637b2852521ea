"""Attack small trainings: can somebody tell from the weights whether a patient took part?

    python -m benchmarks.privacy_membership [--trainings 200] [--epsilon 1] [--confidence 0.95]

A canary is a patient with labels of its own, unlike all others. A tiny network is trained many times with it and as
often without, by the same steps as `nnUNetTrainerDP`: lots, one backward pass per patient, clipping, noise. Who attacks
knows everything but the noise and the lots, and asks how well each network knows the canary. The error rates of the
best threshold bound epsilon from below (Jagielski et al., NeurIPS 2020; intervals of Clopper and Pearson). With noise
that bound may not exceed the epsilon that the accountant gives; without noise it should.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import beta

from nnunetv2.federated.privacy.accounting import NoisySteps, epsilon_of, find_sigma
from nnunetv2.training.differential_privacy.gradients import ClippedSum
from nnunetv2.training.differential_privacy.lots import PoissonSampler, secret_generator

NUM_PATIENTS, LOT, STEPS, DELTA, CLIP, RATE = 20, 5, 20, 1e-3, 1.0, 0.5
CANARY = "canary"


@dataclass(frozen=True)
class Attack:
    """The result of attacking many trainings."""

    declared: float
    """Epsilon of the accountant; infinite without noise."""
    at_least: float
    """Epsilon that the attack shows, with the confidence asked for."""


def make_patients(seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return patients whose labels follow from their images, and a canary whose labels contradict them."""
    generator = torch.Generator().manual_seed(seed)
    patients = {}
    for number in range(NUM_PATIENTS):
        image = torch.randn(1, 1, 8, 8, generator=generator)
        patients[f"P{number:02}"] = image, (image > 0).long()[:, 0]
    image = torch.zeros(1, 1, 8, 8)
    image[..., ::2] = 5.0
    patients[CANARY] = image, (image <= 0).long()[:, 0]
    return patients


def make_network() -> torch.nn.Module:
    """Return the network that all trainings begin with."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.LeakyReLU(), torch.nn.Conv2d(4, 2, 1))


def train(patients: dict, *, sigma: float) -> float:
    """Train once, and return how badly the network knows the canary."""
    network = make_network()
    optimizer = torch.optim.SGD(network.parameters(), RATE, momentum=0.9)
    total = ClippedSum(network.parameters(), clip_norm=CLIP)
    sampler = PoissonSampler(list(patients), rate=LOT / NUM_PATIENTS, generator=secret_generator())
    generator = secret_generator()
    for _ in range(STEPS):
        for name in sampler.draw():
            image, labels = patients[name]
            total.add(torch.nn.functional.cross_entropy(network(image), labels))
        total.release_(sigma=sigma, lot=LOT, generator=generator)
        optimizer.step()
    image, labels = make_patients()[CANARY]
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(network(image), labels))


def attack(*, epsilon: float | None, trainings: int, confidence: float = 0.95) -> Attack:
    """Train with and without the canary, and return the evidence of the losses.

    The threshold is chosen on the first half of the trainings, and counted on the second.

    Args:
        epsilon: Of each training; None: without noise.
        trainings: With the canary, and as many without.
    """
    sigma, declared = 0.0, math.inf
    if epsilon is not None:
        found = find_sigma([], rate=LOT / NUM_PATIENTS, count=STEPS, epsilon=epsilon, delta=DELTA)
        assert found is not None
        sigma, declared = found, epsilon_of([NoisySteps(LOT / NUM_PATIENTS, found, STEPS)], DELTA)
    everybody = make_patients()
    others = {name: content for name, content in everybody.items() if name != CANARY}
    with_canary = np.array([train(everybody, sigma=sigma) for _ in range(trainings)])
    without = np.array([train(others, sigma=sigma) for _ in range(trainings)])
    half = trainings // 2
    thresholds = np.unique(np.concatenate([with_canary[:half], without[:half]]))
    best = max(thresholds, key=lambda t: _epsilon(with_canary[:half] <= t, without[:half] <= t, confidence))
    return Attack(declared, _epsilon(with_canary[half:] <= best, without[half:] <= best, confidence))


def _epsilon(hits: np.ndarray, false_alarms: np.ndarray, confidence: float) -> float:
    """Return the epsilon that these rates exclude to be smaller, 0 if they exclude none."""
    risk = (1 - confidence) / 2
    bounds = [0.0]
    for hit, false in ((hits, false_alarms), (~false_alarms, ~hits)):
        least = beta.ppf(risk, hit.sum(), len(hit) - hit.sum() + 1) if hit.any() else 0.0
        most = beta.ppf(1 - risk, false.sum() + 1, len(false) - false.sum()) if not false.all() else 1.0
        if least > DELTA:
            bounds.append(math.log((least - DELTA) / most))
    return max(bounds)


def main(argv: Sequence[str] | None = None) -> int:
    """Attack trainings with and without noise, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainings", type=int, default=200)
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--confidence", type=float, default=0.95)
    arguments = parser.parse_args(argv)
    for epsilon in (None, arguments.epsilon):
        found = attack(epsilon=epsilon, trainings=arguments.trainings, confidence=arguments.confidence)
        print(f"declared epsilon {found.declared:.3g}, shown by the attack: at least {found.at_least:.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
