"""Average the weights of a round, and record its contributions."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from nnunetv2.federated.aggregation import weighted_mean
from nnunetv2.federated.aggregation.codecs import int8
from nnunetv2.federated.errors import WireError
from nnunetv2.federated.exchanges.declared_privacy import entry_of_site
from nnunetv2.federated.exchanges.documents import DocumentReader, start_of
from nnunetv2.federated.exchanges.exchange import Closed, Exchange, Policy
from nnunetv2.federated.exchanges.secure_sums import SecureSum
from nnunetv2.federated.exchanges.steps.base import Computed, State, closed_outcome
from nnunetv2.federated.exchanges.steps.masked_round import abandon_round, combine_round
from nnunetv2.federated.exchanges.steps.secure_sum import Opened, UnmaskingStep, is_masked
from nnunetv2.federated.exchanges.steps.weights import WeightStep, check_number
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.document import Document, TensorSpec
from nnunetv2.federated.protocol.keys import ExchangeKey, RoundKey, SurvivorsKey, UploadKey
from nnunetv2.federated.protocol.messages import Aggregate, Update


class TrainingRoundStep(UnmaskingStep[RoundKey, Update, Aggregate], WeightStep[RoundKey]):
    """The sites of a run send trained weights, and receive the average.

    Where updates are masked (`masked_round.py`), they send the shares that unmask the sum.
    """

    key = RoundKey
    policy = Policy(
        pooled=True,
        by_quorum=True,
        first_stays=True,
        carries_weights=True,
        pauses_with_run=True,
        stops_with_run=True,
        recurs=True,
    )
    contribution_note = (
        "; the shared tensors of the site, F32, F16 or I8. With `--secure`: `unmasking_shares`; `shares` U8"
    )
    result_note = "; the same, averaged"

    def prerequisite(self, key: RoundKey) -> ExchangeKey[Any, Aggregate]:
        """Return the round before; for the first, the initial weights."""
        return start_of(key)

    def check_may_begin(self, key: RoundKey, settings: FederationSettings) -> None:
        """Raise RefusedError if runs have fewer rounds."""
        check_number(key, settings)

    def expected(self, key: RoundKey, state: State) -> frozenset[str]:
        """Return the members of the run; those whose masked updates are there, if known."""
        members = state.members(key.run)
        return super().expected(key, state) & members if is_masked(state) else members

    def upload_key(self, key: RoundKey) -> UploadKey:
        """Return the exchange of the masked weights."""
        return UploadKey(key.run, key.number)

    def survivors_key(self, key: RoundKey) -> SurvivorsKey:
        """Return the exchange of the confirmations."""
        return SurvivorsKey(key.run, key.number)

    def sum_of(self, key: RoundKey, reader: DocumentReader) -> SecureSum:
        """Return the masked sums of the round."""
        return reader.round_plan(key).sum

    def cohort(self, key: RoundKey, state: State) -> frozenset[str]:
        """Name the sites that mask with each other."""
        return state.cohort(key.run, key.number)

    def outcome(self, exchange: Exchange, now: float, state: State) -> Closed:
        """Name the sites that mask in the next round, too, where they do."""
        outcome = super().outcome(exchange, now, state)
        if not is_masked(state):
            return outcome
        assert isinstance(exchange.key, RoundKey)
        return replace(outcome, cohort=state.next_cohort(exchange.key.run, exchange.key.number, outcome.missing))

    def combine_opened(
        self, exchange: Exchange, opened: Opened, settings: FederationSettings, reader: DocumentReader
    ) -> Computed:
        """Average the updates whose sum could be unmasked."""
        return combine_round(exchange, opened, settings, reader)

    def abandon(self, exchange: Exchange, settings: FederationSettings, reader: DocumentReader) -> Computed:
        """Write the average before once more."""
        return abandon_round(exchange, settings, reader)

    def place(self, key: RoundKey, site: str, digest: str, state: State) -> RoundKey:
        """Return where an update counts.

        A late one may be carried into the round that is open now.

        A document that was carried before, and whose receipt was lost, stays where it is.
        """
        exchange = state.get(key)
        outcome = None if exchange is None else exchange.outcome
        if not isinstance(outcome, Closed) or state.settings.late_updates != "carry" or site in outcome.contributors:
            return key
        open_round = state.run_state(key.run).open_round
        last = open_round if open_round is not None else self.newest(key, state).number
        for number in range(key.number + 1, last + 1):
            later = RoundKey(key.run, number)
            exchange = state.get(later)
            held = None if exchange is None else exchange.contributions.get(site)
            if held is not None and held.digest == digest:
                return later
        return key if open_round is None else RoundKey(key.run, open_round)

    def newest(self, key: RoundKey, state: State) -> RoundKey:
        """Return the last round that is closed."""
        latest = state.latest_number(key.run)
        return key if latest is None else RoundKey(key.run, latest)

    def weights(self, key: RoundKey, site: str, reader: DocumentReader) -> Mapping[str, TensorSpec]:
        """Return the tensors that a site shares, as they travel."""
        agreement = reader.agreement(key.run)
        return agreement.codec.specs(agreement.specs_from(site))

    def check_tensors(self, document: Document[Update], expected: Mapping[str, TensorSpec]) -> None:
        """Raise WireError unless a document has these tensors.

        It says so if the precision is the reason.
        """
        for name, spec in document.specs.items():
            if name in expected and expected[name].dtype != spec.dtype:
                raise WireError(
                    f"tensor {name} travels as {expected[name].dtype} in this federation, not as {spec.dtype}: "
                    "this site needs the version of the software that the coordinator has"
                )
        super().check_tensors(document, expected)

    def check(
        self, key: RoundKey, site: str, document: Document[Update], reader: DocumentReader, settings: FederationSettings
    ) -> None:
        """Raise WireError unless the tensors that travel in eight bits are finite."""
        super().check(key, site, document, reader, settings)
        try:
            int8.check_packed_tensors(document)
        except WireError as error:
            raise WireError(f"the update of site {site} cannot be right: {error}") from error

    def describe(self, key: RoundKey) -> str:
        """Return run and number."""
        return f"run {key.run}, round {key.number}"

    def combine(
        self,
        exchange: Exchange,
        documents: Mapping[str, Document[Update]],
        settings: FederationSettings,
        reader: DocumentReader,
    ) -> Computed:
        """Average the updates, each with the weight of its site."""
        key = exchange.key
        assert isinstance(key, RoundKey)
        agreement = reader.agreement(key.run)
        weights = {site: agreement.weights[site] for site in documents}
        message = Aggregate(
            round=key.number, missing=closed_outcome(exchange).missing, contributors=dict.fromkeys(documents, 1.0)
        )
        measured = {
            site: {
                **document.message.model_dump(mode="json", include={"metrics", "earlier"}),
                **entry_of_site(agreement.privacy.get(site)),
            }
            for site, document in documents.items()
        }
        with reader.result(self.prerequisite(key)) as previous:
            done = agreement.codec.combine(
                documents,
                weights,
                message=message,
                previous=previous,
                out_path=reader.result_path(key),
                min_sites=settings.min_sites,
            )
        record = record_of_round(exchange, weights, measured, settings, done)
        remarks = (*_remarks_on_kept(key, done.kept, settings), *_remarks_on_outliers(key, record))
        return Computed(done.digest, record, remarks)


def record_of_round(
    exchange: Exchange,
    weights: Mapping[str, float],
    measured: Mapping[str, Mapping[str, Any]],
    settings: FederationSettings,
    done: weighted_mean.Aggregated,
) -> dict[str, Any]:
    """Return the record of a round.

    It lists the contributions with their times, weights and changes, and the settings.

    Args:
        measured: Site -> the metrics of its update, those of an earlier round that came with it, and the privacy that
            it has declared. Metrics stay here: the other sites do not see them.
    """
    outcome = closed_outcome(exchange)
    assert isinstance(exchange.key, RoundKey)
    contributed = {
        site: {
            "weight": weight,
            "digest": held.digest,
            "bytes": held.size,
            "received": held.received,
            **measured[site],
            "change_norm": done.changes[site].norm,
            "change_rms": done.changes[site].rms,
        }
        for site, weight in weights.items()
        for held in (exchange.contributions[site],)
    }
    return {
        "round": exchange.key.number,
        "opened": exchange.opened,
        "closed": outcome.time,
        "digest": done.digest,
        "sites": contributed,
        "missing": list(outcome.missing),
        "failed": sorted(exchange.dropped_out & set(outcome.missing)),
        "outliers": weighted_mean.outliers(done.changes),
        "kept": len(done.kept),
        "settings": settings.model_dump(mode="json", exclude={"federation", "sites"}),
    }


def _remarks_on_kept(key: RoundKey, kept: tuple[str, ...], settings: FederationSettings) -> Iterator[str]:
    """Say which tensors have come from too few sites."""
    if kept:
        yield (
            f"run {key.run}, round {key.number}: {len(kept)} tensors keep their values, since fewer than "
            f"{settings.min_sites} of the sites that have them took part: {', '.join(kept[:3])}"
            f"{', ...' if len(kept) > 3 else ''}"
        )


def _remarks_on_outliers(key: RoundKey, record: Mapping[str, Any]) -> Iterator[str]:
    """Say which updates moved conspicuously far. They count: whether a site is to go is for people to decide."""
    for site in record["outliers"]:
        changes = {name: one["change_rms"] for name, one in record["sites"].items()}
        times = _times(changes.pop(site), statistics.median(changes.values()))
        yield f"{key}: the update of site {site} moves {times} as far as the median of the others; it was counted"


def _times(value: float, reference: float) -> str:
    return f"{value / reference:.3g} times" if reference else "infinitely"


STEPS = (TrainingRoundStep(),)
