"""Build a run's curves: metrics per site and round, their means, validations.

Lists (Dice per class in every round) stay in the store; of them, the last validation is enough to look at. Metrics
that sites measure after their updates have left come with the next round: the newest round is complete once that is
closed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from nnunetv2.federated.aggregation.pooled_validation import mean_of_known
from nnunetv2.federated.coordinator.state import FederationState
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.exchanges.exchange import Closed
from nnunetv2.federated.protocol.keys import RegistrationKey
from nnunetv2.federated.protocol.messages import (
    MAX_LABELS,
    MAX_SITES,
    Count,
    Finite,
    Part,
    Registration,
    SiteName,
    SiteNames,
    Text,
)

ROUNDS_AT_ONCE = 200
"""More are asked for with a higher `since`."""
CHARACTERS_AT_ONCE = 4 << 20
"""Of their records, as JSON; with more, an answer has fewer rounds, but two."""

ALL_SITES = ""
"""In the place of a site: no site has an empty name."""
Scalars = Annotated[dict[Text, Finite | None], Field(max_length=2_000_000)]
"""Metrics that came with an update and after it; pooled, under the names that any site has."""


class CurvePoint(Part):
    """The contribution of one site to one round."""

    weight: Finite
    bytes: Count
    received: Finite
    metrics: Scalars = {}


class CurveRound(Part):
    """A round that is closed."""

    round: Count
    opened: Finite
    """Time of its first contribution, in seconds since 1970."""
    closed: Finite
    sites: Annotated[dict[SiteName, CurvePoint], Field(max_length=MAX_SITES)]
    missing: SiteNames = ()
    failed: SiteNames = ()
    outliers: SiteNames = ()
    """Sites whose updates moved conspicuously far."""
    conspicuous: Count = 0
    """How many did, where updates are masked and nobody knows which."""
    pooled: Scalars = {}
    """Mean of the sites' metrics, each counted by its weight."""


class CurveValidation(Part):
    """The scores of a round's aggregate."""

    round: Count
    mean_dice: Finite | None
    """Over all sites' voxels together, then over classes."""
    ema_dice: Finite | None
    dice_of_site: Annotated[dict[SiteName, Finite | None], Field(max_length=MAX_SITES)]
    """Mean over the classes, on the site's own data."""
    loss_of_site: Annotated[dict[SiteName, Finite | None], Field(max_length=MAX_SITES)]


class ClassDice(Part):
    """The last validation, class by class."""

    round: Count
    names: Annotated[tuple[Text, ...], Field(max_length=MAX_LABELS)]
    pooled: Annotated[tuple[Finite | None, ...], Field(max_length=MAX_LABELS)]
    sites: dict[SiteName, Annotated[tuple[Finite | None, ...], Field(max_length=MAX_LABELS)]]


class Curves(Part):
    """A run from some round on."""

    version: Literal[1] = 1
    run: Text
    rounds: Annotated[tuple[CurveRound, ...], Field(max_length=ROUNDS_AT_ONCE)]
    validations: Annotated[tuple[CurveValidation, ...], Field(max_length=ROUNDS_AT_ONCE)]
    classes: ClassDice | None = None
    more: bool = False
    """Whether there are later rounds or validations, to be asked for."""


def build_curves(state: FederationState, run: str, *, since: int = 0, since_validation: int = 0) -> Curves:
    """Return rounds and validations of a run, at most `ROUNDS_AT_ONCE` of each.

    Raises:
        RefusedError: There is no such run; the code is `unknown_run`.
    """
    if not state.registry.has_run(run):
        raise RefusedError(f"there is no run {run[:200]!r}", code="unknown_run")
    store = state.store
    rounds = store.load_rounds(run, since, ROUNDS_AT_ONCE + 1, characters=CHARACTERS_AT_ONCE)
    validations = store.load_validations(run, since_validation, ROUNDS_AT_ONCE, characters=CHARACTERS_AT_ONCE)
    later, rounds = metrics_that_followed(rounds) | pooled_that_followed(rounds), rounds[:ROUNDS_AT_ONCE]
    latest, last_validation = state.registry.latest_number(run), store.load_last_validation(run)
    last_validated = None if last_validation is None else last_validation["round"]
    return Curves(
        run=run,
        rounds=tuple(_round(record, later) for record in rounds),
        validations=tuple(map(_validation, validations)),
        classes=_classes(state, run, last_validation) if validations and last_validation is not None else None,
        more=_is_before(rounds, latest) or _is_before(validations, last_validated),
    )


def _is_before(records: Sequence[Mapping[str, Any]], last: int | None) -> bool:
    """Return whether records end before the last one."""
    return bool(records) and last is not None and records[-1]["round"] < last


def metrics_that_followed(records: Iterable[Mapping[str, Any]]) -> dict[tuple[int, str], Mapping[str, Any]]:
    """Return metrics that came with a later update: (round, site) -> metrics."""
    return {
        (earlier["round"], site): earlier["metrics"]
        for record in records
        for site, held in record["sites"].items()
        if (earlier := held.get("earlier"))
    }


def pooled_that_followed(records: Iterable[Mapping[str, Any]]) -> dict[tuple[int, str], Mapping[str, Any]]:
    """Return pooled metrics that came with later masked updates: (round, ALL_SITES) -> metrics."""
    return {
        (earlier["round"], ALL_SITES): earlier["metrics"]
        for record in records
        if (earlier := (record.get("pooled") or {}).get("earlier"))
    }


def _round(record: Mapping[str, Any], later: Mapping[tuple[int, str], Mapping[str, Any]]) -> CurveRound:
    def point(site: str, held: Mapping[str, Any]) -> CurvePoint:
        metrics = {**later.get((record["round"], site), {}), **held.get("metrics", {})}
        return CurvePoint(
            weight=held["weight"], bytes=held["bytes"], received=held["received"], metrics=scalars(metrics)
        )

    sites = {site: point(site, held) for site, held in record["sites"].items()}
    masked = record.get("pooled") or {}  # where updates are masked, metrics are known of all sites together only
    return CurveRound(
        round=record["round"],
        opened=record["opened"],
        closed=record["closed"],
        sites=sites,
        missing=record["missing"],
        failed=record["failed"],
        outliers=record.get("outliers", ()),
        conspicuous=masked.get("conspicuous", 0),
        pooled=scalars({**later.get((record["round"], ALL_SITES), {}), **masked["metrics"]})
        if masked
        else pooled((point.weight, point.metrics) for point in sites.values()),
    )


def scalars(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the metrics that are single numbers."""
    return {name: value for name, value in metrics.items() if value is None or isinstance(value, int | float)}


def pooled(weighted: Iterable[tuple[float, Mapping[str, float | None]]]) -> dict[str, float | None]:
    """Return the mean of every metric over its sites, counted by weight."""
    sums: dict[str, list[float]] = {}
    for weight, metrics in weighted:
        for name, value in metrics.items():
            if value is not None:
                total = sums.setdefault(name, [0.0, 0.0])
                total[0] += weight * value
                total[1] += weight
    means = {name: total / weight for name, (total, weight) in sums.items()}
    return {name: mean for name, mean in means.items() if math.isfinite(mean)}  # a sum of huge numbers may not be


def _validation(record: Mapping[str, Any]) -> CurveValidation:
    return CurveValidation(
        round=record["round"],
        mean_dice=record["mean_dice"],
        ema_dice=record["ema_dice"],
        dice_of_site={site: mean_of_known(dice) for site, dice in record["dice_of_site"].items()},
        loss_of_site=record["loss_of_site"],
    )


def _classes(state: FederationState, run: str, record: Mapping[str, Any]) -> ClassDice:
    names = _names_of_classes(state, run)
    if len(names) != len(record["dice"]):
        names = [f"class {number}" for number in range(1, len(record["dice"]) + 1)]
    return ClassDice(round=record["round"], names=tuple(names), pooled=record["dice"], sites=record["dice_of_site"])


def _names_of_classes(state: FederationState, run: str) -> list[str]:
    """Return the names of a run's classes or regions, in the order of Dice."""
    key = RegistrationKey(run)
    registered = state.registry.get(key)
    if registered is None or not isinstance(registered.outcome, Closed):
        return []
    with state.documents.contribution(key, registered.outcome.contributors[0]) as document:
        return names_of_classes(document.message)


def names_of_classes(registration: Registration) -> list[str]:
    """Return the names of the scored labels, without background and ignore label."""
    labels = registration.dataset_json.labels
    scored = [name for name, value in labels.items() if name != "ignore" and value not in (0, (0,))]
    if registration.dataset_json.regions_class_order or any(isinstance(labels[name], tuple) for name in scored):
        return scored
    return sorted(scored, key=lambda name: labels[name])
