"""Pool the sites' validations of an aggregate, and choose the best aggregate.

Voxels are summed over the sites before the Dice is computed, as one centre would, so a site with little data weighs
little. The score is nnU-Net's pseudo Dice: a moving average with factor 0.9 over the rounds that were validated. Counts
of fewer sites than the federation asks for are not pooled: they would tell the others of a single one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.protocol.messages import PooledValidation, Validation

MEMORY = 0.9
"""Share of the earlier average in the new one."""


def pool(
    number: int,
    contributed: Mapping[str, Validation],
    *,
    before: PooledValidation | None,
    min_sites: int = 1,
    annotated: Mapping[str, Collection[int]] = MappingProxyType({}),
) -> PooledValidation:
    """Return the pooled validation of round `number`, given the one before.

    With fewer than `min_sites` contributions, the best round stays, and this one has no Dice. Nor has a class that
    fewer sites annotate.

    Args:
        annotated: Site -> the foreground labels that it annotates; empty where all annotate the same. The voxels that a
            site counts of others are 0.

    Raises:
        RefusedError: The sites counted different numbers of classes.
    """
    lengths = {site: len(found.tp) for site, found in contributed.items()}
    if len(set(lengths.values())) > 1:
        raise RefusedError(f"the sites validated different numbers of classes: {lengths}", code="datasets_differ")
    found = list(contributed.values())
    dice = dice_per_class(*(_sum([getattr(one, name) for one in found]) for name in ("tp", "fp", "fn")))
    if len(found) < min_sites:
        dice = (None,) * len(dice)
    if annotated:
        counting = [sum(label in annotated.get(site, ()) for site in contributed) for label in range(1, len(dice) + 1)]
        dice = tuple(value if number >= min_sites else None for value, number in zip(dice, counting, strict=True))
    mean = mean_of_known(dice)
    average = moving_average(None if before is None else before.ema_dice, mean)
    best_round, best = (None, None) if before is None else (before.best_round, before.best_ema_dice)
    if mean is not None and average is not None and (best is None or average > best):
        best_round, best = number, average
    return PooledValidation(
        round=number,
        dice=dice,
        mean_dice=mean,
        ema_dice=average,
        best_round=best_round,
        best_ema_dice=best,
        dice_of_site={site: dice_per_class(one.tp, one.fp, one.fn) for site, one in contributed.items()},
        loss_of_site={site: one.loss for site, one in contributed.items()},
    )


def dice_per_class(tp: Sequence[float], fp: Sequence[float], fn: Sequence[float]) -> tuple[float | None, ...]:
    """Return 2 TP / (2 TP + FP + FN) per class.

    None where there is neither foreground nor a prediction of it.
    """
    return tuple(2 * t / (2 * t + p + n) if 2 * t + p + n > 0 else None for t, p, n in zip(tp, fp, fn))


def mean_of_known(values: Sequence[float | None]) -> float | None:
    """Return the mean of the known values, or None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def moving_average(before: float | None, value: float | None) -> float | None:
    """Return the next moving average; a round without a value leaves it as it was."""
    if value is None or before is None:
        return value if before is None else before
    return MEMORY * before + (1 - MEMORY) * value


def _sum(columns: Sequence[Sequence[float]]) -> list[float]:
    return [sum(values) for values in zip(*columns)]
