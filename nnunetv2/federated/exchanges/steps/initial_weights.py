"""Settle the weights that all sites of a run start from.

Each tensor is that of the site that owns it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from nnunetv2.federated.aggregation import weighted_mean
from nnunetv2.federated.aggregation.given_weights import given_names
from nnunetv2.federated.exchanges.documents import DocumentReader
from nnunetv2.federated.exchanges.exchange import Closed, Exchange, Policy
from nnunetv2.federated.exchanges.steps.base import Computed, State, closed_outcome
from nnunetv2.federated.exchanges.steps.masked_round import next_round
from nnunetv2.federated.exchanges.steps.secure_sum import is_masked
from nnunetv2.federated.exchanges.steps.weights import WeightStep
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.document import Document, TensorSpec
from nnunetv2.federated.protocol.keys import InitialKey, RegistrationKey
from nnunetv2.federated.protocol.messages import Aggregate, Update


class InitialWeightsStep(WeightStep[InitialKey]):
    """The owners of tensors send their values; all receive their shared tensors."""

    key = InitialKey
    policy = Policy(
        pooled=True, by_quorum=True, first_stays=True, carries_weights=True, pauses_with_run=True, stops_with_run=True
    )
    contribution_note = "; the tensors owned by the site, F32"
    result_note = "; all shared tensors of the site"

    def prerequisite(self, key: InitialKey) -> RegistrationKey:
        """Return the registration."""
        return RegistrationKey(key.run)

    def expected(self, key: InitialKey, state: State) -> frozenset[str]:
        """Return the sites that have registered and not left."""
        return (frozenset(state.settings.sites) & state.contributors(RegistrationKey(key.run))) - state.left(key.run)

    def outcome(self, exchange: Exchange, now: float, state: State) -> Closed:
        """Name the sites that mask in the first round, too, where they do."""
        outcome = super().outcome(exchange, now, state)
        if not is_masked(state):
            return outcome
        assert isinstance(exchange.key, InitialKey)
        return replace(outcome, cohort=state.next_cohort(exchange.key.run, -1, outcome.missing))

    def required(self, key: InitialKey, reader: DocumentReader) -> set[str]:
        """Return the sites that own a tensor."""
        return set(reader.agreement(key.run).match.initial_owner.values())

    def weights(self, key: InitialKey, site: str, reader: DocumentReader) -> Mapping[str, TensorSpec]:
        """Return the tensors that a site owns.

        They are sent once, and all begin with them: in full precision.
        """
        return reader.agreement(key.run).specs_owned_by(site)

    def combine(
        self,
        exchange: Exchange,
        documents: Mapping[str, Document[Update]],
        settings: FederationSettings,
        reader: DocumentReader,
    ) -> Computed:
        """Write the owners' tensors, or the operator's in their place."""
        assert isinstance(exchange.key, InitialKey)
        agreement, outcome = reader.agreement(exchange.key.run), closed_outcome(exchange)
        owner_of = agreement.match.initial_owner
        owners = set(owner_of.values())
        message = Aggregate(
            round=None,
            missing=outcome.missing,
            contributors={site: 1.0 for site in documents if site in owners},
            next_round=next_round(outcome.cohort, agreement.weights) if outcome.cohort else None,
        )
        out_path = reader.result_path(exchange.key)
        if settings.initial_weights is None:
            return Computed(weighted_mean.collect_from_owners(documents, owner_of, message=message, out_path=out_path))
        with reader.given_weights(settings.initial_weights) as weights:
            names = given_names(agreement.match, agreement.specs, weights.specs)
            return Computed(
                weighted_mean.collect_from_owners(
                    documents,
                    owner_of,
                    message=message,
                    out_path=out_path,
                    given=lambda name: weights.read(names[name]) if name in names else None,
                )
            )


STEPS = (InitialWeightsStep(),)
