"""Collect the masked weights of a round, confirm the survivors, average the sum.

Unmasking itself is the round's own exchange (`training_round.py`), whose result is the aggregate as ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunetv2.federated.aggregation.weighted_mean import write_computed
from nnunetv2.federated.errors import AggregationError
from nnunetv2.federated.exchanges.declared_privacy import Declared, entry_of_site
from nnunetv2.federated.exchanges.documents import DocumentReader, start_of
from nnunetv2.federated.exchanges.exchange import Contribution, Exchange, Policy
from nnunetv2.federated.exchanges.masked_codecs import masked_codec_of
from nnunetv2.federated.exchanges.secure_sums import (
    CHANGES,
    EARLIER,
    FIGURES,
    TRAINING,
    VALIDATED,
    RoundPlan,
    SecureSum,
    bits_of,
)
from nnunetv2.federated.exchanges.steps.base import Computed, State, closed_outcome
from nnunetv2.federated.exchanges.steps.secure_sum import ConfirmationStep, Opened, UploadStep
from nnunetv2.federated.exchanges.steps.weights import check_number
from nnunetv2.federated.privacy.secure_aggregation.fixed_point import CHANGE_BITS, decode_figure
from nnunetv2.federated.privacy.secure_aggregation.protocol import CHECK_WORDS
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.document import DTYPES, TensorSpec
from nnunetv2.federated.protocol.keys import ExchangeKey, RoundKey, SurvivorsKey, UploadKey
from nnunetv2.federated.protocol.messages import Aggregate, NextRound
from nnunetv2.federated.protocol.secure_messages import Confirmed, Survivors

_BLOCK = 1 << 15
"""Words summed at a time: they stay in the processor's cache."""


class RoundUploadStep(UploadStep[UploadKey]):
    """The sites of a round send masked weights."""

    key = UploadKey
    results = (Survivors, Aggregate)
    policy = Policy(
        pooled=True, by_quorum=True, first_stays=True, carries_weights=True, pauses_with_run=True, stops_with_run=True
    )

    def used_by(self, key: UploadKey) -> RoundKey:
        """Return the round."""
        return RoundKey(key.run, key.number)

    def prerequisite(self, key: UploadKey) -> ExchangeKey[Any, Aggregate]:
        """Return the round before; for the first, the initial weights."""
        return start_of(RoundKey(key.run, key.number))

    def check_may_begin(self, key: UploadKey, settings: FederationSettings) -> None:
        """Raise RefusedError if this federation does not mask, or runs have fewer rounds."""
        super().check_may_begin(key, settings)
        check_number(key, settings)

    def sum_of(self, key: UploadKey, reader: DocumentReader) -> SecureSum:
        """Return the masked sums of the round."""
        return reader.round_plan(RoundKey(key.run, key.number)).sum

    def cohort(self, key: UploadKey, state: State) -> frozenset[str]:
        """Name the sites that mask with each other."""
        return state.cohort(key.run, key.number)

    def expected(self, key: UploadKey, state: State) -> frozenset[str]:
        """Return the members of the run among them."""
        return self.cohort(key, state) & state.members(key.run)

    def newest(self, key: UploadKey, state: State) -> Any:
        """Return the last closed round, for sites that come when this one is over."""
        latest = state.latest_number(key.run)
        return key if latest is None or latest < key.number else RoundKey(key.run, latest)

    def describe(self, key: UploadKey) -> str:
        """Return run and number."""
        return f"run {key.run}, masked updates of round {key.number}"


class RoundSurvivorsStep(ConfirmationStep[SurvivorsKey]):
    """The sites of a round sign whose masked weights are there."""

    key = SurvivorsKey
    results = (Confirmed, Aggregate)
    policy = Policy(first_stays=True, stops_with_run=True)

    def upload_key(self, key: SurvivorsKey) -> UploadKey:
        """Return the exchange of the masked weights."""
        return UploadKey(key.run, key.number)

    def sum_of(self, key: SurvivorsKey, reader: DocumentReader) -> SecureSum:
        """Return the masked sums of the round."""
        return reader.round_plan(RoundKey(key.run, key.number)).sum

    def cohort(self, key: SurvivorsKey, state: State) -> frozenset[str]:
        """Name the sites that mask with each other."""
        return state.cohort(key.run, key.number)

    def newest(self, key: SurvivorsKey, state: State) -> Any:
        """Return the last closed round, for sites that come when this one is over."""
        latest = state.latest_number(key.run)
        return key if latest is None or latest < key.number else RoundKey(key.run, latest)

    def describe(self, key: SurvivorsKey) -> str:
        """Return run and number."""
        return f"run {key.run}, survivors of round {key.number}"


# ---------------------------------------------------------------------------------------------------- the aggregate
def combine_round(exchange: Exchange, opened: Opened, settings: FederationSettings, reader: DocumentReader) -> Computed:
    """Write the mean of the weights that can be unmasked; the others keep their values."""
    key = exchange.key
    assert isinstance(key, RoundKey)
    plan, outcome, agreement = reader.round_plan(key), closed_outcome(exchange), reader.agreement(key.run)
    figures = pooled_figures(opened)
    message = Aggregate(
        round=key.number,
        missing=outcome.missing,
        contributors=dict.fromkeys(outcome.contributors, 1.0),
        next_round=next_round(outcome.cohort, agreement.weights, typical_change=figures.change),
    )
    places = _places(plan, opened, agreement.specs, min_sites=settings.min_sites)
    codec = masked_codec_of(agreement.match.precision)
    with reader.result(start_of(key)) as before:

        def value_of(name: str) -> np.ndarray:
            if name not in places:
                return before.read(name)
            group, begin = places[name]
            spec, total = before.spec(name), opened.total_weight(group)
            mean = np.empty(spec.size, DTYPES[spec.dtype])
            start = np.empty(min(_BLOCK, spec.size), DTYPES[spec.dtype])
            for at, words in zip(
                range(0, spec.size, _BLOCK), opened.parts(group, begin, spec.size, _BLOCK), strict=True
            ):
                held = start[: words.size]
                before.read_into(name, at, held)
                mean[at : at + _BLOCK] = codec.decode(
                    words, held, total=total, bits=plan.weight_bits, exponent=plan.exponents[name]
                )
            if not np.isfinite(mean).all():
                raise AggregationError("the mean is not finite")
            return mean.reshape(spec.shape)

        digest = write_computed(reader.result_path(key), message, before.specs, value_of)
    kept = len(before.specs) - len(places)
    record = _record_of_round(
        exchange,
        opened,
        settings,
        digest=digest,
        figures=figures,
        kept=kept,
        uploads=reader.exchange(UploadKey(key.run, key.number)),
        trust=agreement.trust,
        privacy=agreement.privacy,
    )
    return Computed(digest, record, tuple(_remarks(key, kept, figures.conspicuous)))


def next_round(
    cohort: tuple[str, ...], weights: Mapping[str, float], *, typical_change: float | None = None
) -> NextRound:
    """Return the next round's cohort, and the range of its integers."""
    return NextRound(
        cohort=cohort, weight_bits=bits_of(weights[site] for site in cohort), typical_change=typical_change
    )


def abandon_round(exchange: Exchange, settings: FederationSettings, reader: DocumentReader) -> Computed:
    """Write the aggregate before as the result of a round that nobody contributes to.

    Args:
        exchange: With the outcome that it will have.
    """
    key, outcome = exchange.key, closed_outcome(exchange)
    assert isinstance(key, RoundKey)
    weights = reader.agreement(key.run).weights
    with reader.result(start_of(key)) as before:
        message = Aggregate(
            round=key.number, missing=outcome.missing, contributors={}, next_round=next_round(outcome.cohort, weights)
        )
        digest = write_computed(reader.result_path(key), message, before.specs, before.read)
        record = {
            "round": key.number,
            "opened": exchange.opened or outcome.time,
            "closed": outcome.time,
            "digest": digest,
            "sites": {},
            "missing": list(outcome.missing),
            "failed": [],
            "outliers": [],
            "kept": len(before.specs),
            "abandoned": True,
            "settings": settings.model_dump(mode="json", exclude={"federation", "sites"}),
        }
    return Computed(digest, record)


def _places(
    plan: RoundPlan, opened: Opened, specs: Mapping[str, TensorSpec], *, min_sites: int
) -> dict[str, tuple[str, int]]:
    """Return, per tensor that is averaged, its group and the word at which it begins.

    Args:
        min_sites: The operator may have raised it since masks were bound to k.
    """
    places = {}
    for group in plan.groups:
        if group.name in opened.masks and len(opened.survivors[group.name]) >= min_sites:
            begin = CHECK_WORDS
            for name in group.tensors:
                places[name] = group.name, begin
                begin += specs[name].size
    return places


@dataclass(frozen=True)
class Pooled:
    """The figures that came with the updates of a round, of all sites together."""

    metrics: Mapping[str, float]
    """Means over the training cases, of the round itself,"""
    earlier: Mapping[str, float]
    """and of the validation of the round before."""
    change: float | None
    """Mean over the training cases of the distances that the sites have moved (root mean square)."""
    conspicuous: int
    """Sites that have moved more than three times as far as the sites did in the round before."""


def pooled_figures(opened: Opened) -> Pooled:
    """Return the figures whose sums could be unmasked."""

    def means(lane: str) -> dict[str, float]:
        found = opened.small(lane)
        total = 0 if found is None else opened.total_weight(lane)
        return {name: decode_figure(word, total) for name, word in zip(FIGURES[lane], found or ())}

    changes = opened.small(CHANGES)
    return Pooled(
        metrics={**means(TRAINING), **means(VALIDATED)},
        earlier=means(EARLIER),
        change=None if changes is None else decode_figure(changes[0], opened.total_weight(CHANGES), bits=CHANGE_BITS),
        conspicuous=0 if changes is None else changes[1],
    )


def _record_of_round(
    exchange: Exchange,
    opened: Opened,
    settings: FederationSettings,
    *,
    digest: str,
    figures: Pooled,
    kept: int,
    uploads: Exchange,
    trust: Mapping[str, str | None],
    privacy: Declared,
) -> dict[str, Any]:
    """Return the record of a masked round: its sites and pooled figures."""
    outcome = closed_outcome(exchange)
    assert isinstance(exchange.key, RoundKey)
    number = exchange.key.number
    return {
        "round": number,
        "opened": uploads.opened,
        "closed": outcome.time,
        "digest": digest,
        "sites": {
            site: {
                "weight": float(opened.found.weights[site]),
                "trust": trust[site],
                **entry_of_site(privacy.get(site)),
                **_about(uploads.contributions[site]),
            }
            for site in outcome.contributors
        },
        "missing": list(outcome.missing),
        "failed": sorted(uploads.dropped_out & set(outcome.missing)),
        "outliers": [],
        "kept": kept,
        "pooled": {
            "metrics": dict(figures.metrics),
            "earlier": {"round": number - 1, "metrics": dict(figures.earlier)} if figures.earlier else None,
            "change_rms": figures.change,
            "conspicuous": figures.conspicuous,
        },
        "settings": settings.model_dump(mode="json", exclude={"federation", "sites"}),
    }


def _about(held: Contribution) -> dict[str, Any]:
    """Return the record of a masked update: digest, size and time."""
    return {"digest": held.digest, "bytes": held.size, "received": held.received}


def _remarks(key: RoundKey, kept: int, number: int) -> Iterator[str]:
    if kept:
        yield f"run {key.run}, round {key.number}: {kept} tensors keep their values, since too few sites sent them"
    if number:
        yield (
            f"{key}: {number} site{'' if number == 1 else 's'} moved more than three times as far as the sites did in "
            "the round before; which, only the sites themselves know. They were counted"
        )


STEPS = (RoundUploadStep(), RoundSurvivorsStep())
