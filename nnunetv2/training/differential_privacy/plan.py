"""Choose lots and noise so that patients stay within the budget of their site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nnunetv2.federated.privacy import accounting
from nnunetv2.federated.privacy.accounting import NoisySteps
from nnunetv2.federated.privacy.ledger import Budget, BudgetError, Ledger
from nnunetv2.training.differential_privacy.options import LARGEST_LOT, PrivacyOptions

LEAST_LEFT = 0.05
"""Of the budget, with which a training may begin: with less, it would learn noise."""
RUINOUS = 4.0
"""Times more noise than an earlier epoch had, and the next one would ruin the network."""


def spare_epochs(epochs: int) -> int:
    """Return how many epochs may be trained again without more noise for the others."""
    return 1 + epochs // 50


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """The content of every step of a training, and its cost at the end."""

    lot: int
    """Patients of a lot, on average."""
    rate: float
    """Chance of each patient to be in a lot."""
    clip: float
    patches: int
    sigma: float
    steps: int
    """Of an epoch."""
    epochs: int
    """To come."""
    epsilon: float
    """After the last epoch, of everything in the ledger; an upper bound."""
    limit: float
    """Which epsilon must not exceed."""
    delta: float

    @property
    def epoch(self) -> NoisySteps:
        """Return the noisy steps of an epoch, which the accountant composes."""
        return NoisySteps(self.rate, self.sigma, self.steps)

    def describe(self) -> str:
        """Return the plan in one line."""
        return (
            f"lots of {self.lot} patients on average (chance {self.rate:.4g}), {self.patches} patch"
            f"{'' if self.patches == 1 else 'es'} each, clipped to {self.clip:g}, noise multiplier {self.sigma:.4g}; "
            f"after {self.epochs} epochs of {self.steps} steps epsilon {self.epsilon:.4g} of {self.limit:g}, delta "
            f"{self.delta:g}"
        )


def make_plan(
    options: PrivacyOptions,
    ledger: Ledger,
    *,
    num_patients: int,
    epochs: int,
    steps: int,
    training: str,
    sigma_before: float | None = None,
) -> PrivacyPlan:
    """Return the plan of the epochs to come.

    Noise that is found leaves room for a few epochs that a crash lets be trained again.

    Args:
        options: The wishes of the user.
        ledger: The steps charged already, and the budget.
        num_patients: Of the training split.
        epochs: How many are to come; 0 for a training that is over, which costs nothing.
        steps: Of each.
        training: Its name in messages, such as "3d_fullres fold 1".
        sigma_before: Noise multiplier of its earlier epochs; None for a training that begins.

    Raises:
        BudgetError: There is no budget, or the plan does not fit into it. The message has one that does.
        ValueError: More patients are asked for in each step than there are, or delta says nothing.
    """
    budget, limit = _limits(options, ledger, num_patients=num_patients)
    lot = options.lot or max(1, min(LARGEST_LOT, num_patients // 4))
    if lot > num_patients:
        raise ValueError(f"--dp_lot {lot} is more than the {num_patients} patients of the training split")
    rate = lot / num_patients
    spent, delta = ledger.spent, budget.delta
    name = (training, ledger.path.parent.name)
    sigma = _choose_sigma(
        options, spent, rate, epochs=epochs, steps=steps, epsilon=limit, delta=delta, sigma_before=sigma_before
    )
    if sigma is None:
        raise BudgetError(_nothing_left(spent, limit=limit, delta=delta, name=name, is_begun=sigma_before is not None))
    epoch = NoisySteps(rate, sigma, steps)
    epsilon = accounting.epsilon_of([*spent, NoisySteps(rate, sigma, steps * epochs)], delta)
    if epochs and epsilon > limit:
        raise BudgetError(_over_budget(spent, epoch, epochs, epsilon, limit=limit, delta=delta, name=name))
    return PrivacyPlan(
        lot=lot,
        rate=rate,
        clip=options.clip or 1.0,
        patches=options.patches or 1,
        sigma=sigma,
        steps=steps,
        epochs=epochs,
        epsilon=epsilon,
        limit=limit,
        delta=delta,
    )


def _limits(options: PrivacyOptions, ledger: Ledger, *, num_patients: int) -> tuple[Budget, float]:
    """Return the budget and the epsilon that a training may reach.

    Raises:
        BudgetError: Nobody has allowed a budget, or more is asked for than it has.
        ValueError: Its delta says nothing about so many patients.
    """
    dataset = ledger.path.parent.name
    budget = ledger.budget
    if budget is None:
        raise BudgetError(
            f"{dataset} has no privacy budget yet: somebody has to allow one, such as "
            f"nnUNetv2_fed_privacy -d {dataset} --budget 8 {1 / (10 * num_patients):.2g} --by NAME"
        )
    if budget.delta >= 1 / num_patients:
        raise ValueError(
            f"the budget's delta of {budget.delta:g} would allow to publish one of {num_patients} patients: choose "
            f"{1 / (10 * num_patients):.2g} or less (nnUNetv2_fed_privacy -d {dataset} --budget)"
        )
    limit = budget.epsilon if options.epsilon is None else options.epsilon
    if limit > budget.epsilon:
        raise BudgetError(
            f"--dp_epsilon {limit:g} is more than the budget of {dataset}, epsilon {budget.epsilon:g}: raise the "
            f"budget first, nnUNetv2_fed_privacy -d {dataset} --budget {limit:g} {budget.delta:g} --by NAME"
        )
    return budget, limit


def _choose_sigma(
    options: PrivacyOptions,
    spent: Sequence[NoisySteps],
    rate: float,
    *,
    epochs: int,
    steps: int,
    epsilon: float,
    delta: float,
    sigma_before: float | None,
) -> float | None:
    """Return the noise multiplier of the epochs to come; None if nothing is left for them."""
    if not epochs:  # the training is over: it may have spent everything, and its record keeps the noise that it had
        return sigma_before or options.sigma or accounting.LARGEST_SIGMA
    if options.sigma is not None:
        return options.sigma
    count = (epochs + spare_epochs(epochs)) * steps
    return _find_sigma(spent, rate, count, epsilon=epsilon, delta=delta, sigma_before=sigma_before)


def _find_sigma(
    spent: Sequence[NoisySteps], rate: float, count: int, *, epsilon: float, delta: float, sigma_before: float | None
) -> float | None:
    """Return the noise multiplier with which so many steps fit; None if they do not, or only with ruinous noise."""
    if sigma_before is None and epsilon - accounting.epsilon_of(spent, delta) < LEAST_LEFT * epsilon:
        return None
    sigma = accounting.find_sigma(spent, rate=rate, count=count, epsilon=epsilon, delta=delta)
    if sigma is not None and sigma_before is not None and sigma > RUINOUS * sigma_before:
        return None
    return sigma


def _nothing_left(
    spent: Sequence[NoisySteps], *, limit: float, delta: float, name: tuple[str, str], is_begun: bool
) -> str:
    """Say that the budget is spent, and how a training can be had all the same."""
    training, dataset = name
    now = accounting.epsilon_of(spent, delta)
    return (
        f"the patients of {dataset} are at epsilon {now:.4g} of {limit:g}: nothing is left for {training}. "
        "Raise --dp_epsilon or the budget (nnUNetv2_fed_privacy)"
        + (", or use the model as it is (-chk checkpoint_latest.pth)" if is_begun else "")
    )


def _over_budget(
    spent: Sequence[NoisySteps],
    epoch: NoisySteps,
    epochs: int,
    epsilon: float,
    *,
    limit: float,
    delta: float,
    name: tuple[str, str],
) -> str:
    """Say how far a plan goes over the budget, and which ones fit."""
    training, dataset = name
    fitting = accounting.most_epochs(spent, epoch, at_most=epochs - 1, epsilon=limit, delta=delta)
    sigma = accounting.find_sigma(spent, rate=epoch.rate, count=epoch.count * epochs, epsilon=limit, delta=delta)
    remedies = [
        *([f"train {fitting} epochs instead of {epochs}"] if fitting else []),
        *([f"choose a larger noise multiplier (--dp_sigma {_rounded_up(sigma)})"] if sigma is not None else []),
        "raise the budget (nnUNetv2_fed_privacy)",
    ]
    return (
        f"{training} would bring the patients of {dataset} to epsilon {epsilon:.3g} of {limit:g}: "
        f"{', or '.join(remedies)}"
    )


def _rounded_up(sigma: float) -> str:
    """Return a multiplier with three digits, not below it."""
    text = f"{sigma:.3g}"
    return text if float(text) >= sigma else f"{sigma * 1.005:.3g}"
