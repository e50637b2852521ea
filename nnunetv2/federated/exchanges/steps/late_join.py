"""Let one site in after the others have begun.

They have pooled fingerprints, agreed on plans, or begun a run.

Each step is an exchange of that site alone, compared with the settled result of the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

from nnunetv2.federated.aggregation import late_join
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.exchanges import document_limits
from nnunetv2.federated.exchanges.documents import DocumentReader
from nnunetv2.federated.exchanges.exchange import Policy
from nnunetv2.federated.exchanges.label_union import check_within
from nnunetv2.federated.exchanges.secure_sums import check_count_groups, check_groups
from nnunetv2.federated.exchanges.steps.base import State, Step, messages_of
from nnunetv2.federated.exchanges.steps.census import check_same_dataset, pool_census, union_of
from nnunetv2.federated.exchanges.steps.plans import agree_on_plans
from nnunetv2.federated.exchanges.steps.registration import (
    MembershipStep,
    check_compatible,
    check_planned_alike,
    remarks_on_match,
)
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.document import Document
from nnunetv2.federated.protocol.keys import (
    AdmissionKey,
    CensusKey,
    LateCensusKey,
    LatePlansKey,
    PlansKey,
    Q,
    R,
    RegistrationKey,
)
from nnunetv2.federated.protocol.messages import Census, Match, PlansAgreement, PlansReport, PooledCensus, Registration

KeyOfSite = TypeVar("KeyOfSite", LateCensusKey, LatePlansKey, AdmissionKey)


class _StepOfOneSite(Step[KeyOfSite, Q, R]):
    """Base of the steps that one site takes with the coordinator."""

    def expected(self, key: KeyOfSite, state: State) -> frozenset[str]:
        """Return the site, if it is one of the federation."""
        return frozenset(state.settings.sites) & {key.site}


class LateCensusStep(_StepOfOneSite[LateCensusKey, Census, PooledCensus]):
    """Compare the dataset of a site that comes after the census.

    It may read the pooled fingerprint.
    """

    key = LateCensusKey
    contribution, results = Census, (PooledCensus,)
    policy = Policy(repeatable=True)
    contribution_note = ", of a site that joins after the first is closed"
    result_note = ", of the others"

    def prerequisite(self, key: LateCensusKey) -> CensusKey:
        """Return the census of the others."""
        return CensusKey()

    def pool(
        self,
        key: LateCensusKey,
        documents: Mapping[str, Document[Census]],
        settings: FederationSettings,
        reader: DocumentReader,
    ) -> PooledCensus:
        """Count the cases of the others.

        The dataset of the site that comes late must go with theirs.
        """
        before = reader.messages_of(CensusKey())
        pooled = pool_census(before, settings)
        described = {**before, **messages_of(documents)}
        if pooled.labels is None:
            check_same_dataset(described)
        else:
            check_same_dataset(described, fields=("channel_names",))
            check_within(union_of(pooled), key.site, documents[key.site].message.labels)
        return pooled

    def describe_closing(self, key: LateCensusKey) -> str:
        """Say that the site plans late."""
        return f"site {key.site} plans late, from the pooled fingerprint, of which its own cases are no part"


class LatePlansStep(_StepOfOneSite[LatePlansKey, PlansReport, PlansAgreement]):
    """A site that comes after the agreement compares its plans."""

    key = LatePlansKey
    contribution, results = PlansReport, (PlansAgreement,)
    policy = Policy(repeatable=True)
    header = document_limits.PLANS
    contribution_note = ", of a site that joins after the agreement"

    def prerequisite(self, key: LatePlansKey) -> PlansKey:
        """Return the agreement of the others."""
        return PlansKey(key.plans)

    def pool(
        self,
        key: LatePlansKey,
        documents: Mapping[str, Document[PlansReport]],
        settings: FederationSettings,
        reader: DocumentReader,
    ) -> PlansAgreement:
        """Return the digest of the plans, if they are those of the others."""
        reported = {**reader.messages_of(self.prerequisite(key)), **messages_of(documents)}
        return agree_on_plans({site: message.plans for site, message in reported.items()}, settings.networks)

    def describe_closing(self, key: LatePlansKey) -> str:
        """Say that the plans of the site agree."""
        return f"site {key.site} has planned late, and its plans go with those of the others"


class AdmissionStep(_StepOfOneSite[AdmissionKey, Registration, Match], MembershipStep[AdmissionKey]):
    """A site joins a run that has begun, or had begun to register."""

    key = AdmissionKey
    policy = Policy(compared=True, settles_members=True)
    contribution_note = ", of a late site"

    def prerequisite(self, key: AdmissionKey) -> RegistrationKey:
        """Return the registration of the others."""
        return RegistrationKey(key.run)

    def newcomer(self, key: AdmissionKey) -> str:
        """Return the site."""
        return key.site

    def pool(
        self,
        key: AdmissionKey,
        documents: Mapping[str, Document[Registration]],
        settings: FederationSettings,
        reader: DocumentReader,
    ) -> Match:
        """Return the match of the run with this site."""
        registration, registered = documents[key.site].message, reader.registrations(key.run)
        if key.site in registered:
            raise RefusedError(f"site {key.site} takes part in run {key.run} already", code="already_closed")
        check_compatible({**registered, key.site: registration}, settings.networks)
        admitted = late_join.admit(key.site, registration, reader.agreement(key.run).match, registered)
        if settings.secure is not None:
            check_planned_alike({**registered, key.site: registration}, settings.networks)
            check_groups(admitted.shared)
            check_count_groups(admitted.annotated)
        return admitted

    def remarks(
        self, key: AdmissionKey, documents: Mapping[str, Document[Registration]], result: Match
    ) -> Iterator[str]:
        """Return a line on the weight of the site."""
        return remarks_on_match(key, messages_of(documents), result, with_shares=False)


STEPS = (LateCensusStep(), LatePlansStep(), AdmissionStep())
