"""Compare the sites' datasets before anything is pooled, and count all cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.exchanges.consistency import first_difference
from nnunetv2.federated.exchanges.documents import DocumentReader
from nnunetv2.federated.exchanges.exchange import Policy
from nnunetv2.federated.exchanges.label_union import LabelUnion, unite_labels
from nnunetv2.federated.exchanges.steps.base import Step, comparable, messages_of
from nnunetv2.federated.privacy.identities import check_run_keys
from nnunetv2.federated.privacy.secure_aggregation.protocol import check_size
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.document import Document
from nnunetv2.federated.protocol.keys import CensusKey, LateCensusKey
from nnunetv2.federated.protocol.messages import Census, PooledCensus, TrainingData

WITH_UNION = (
    "Sites that annotate different classes can train together where the coordinator was founded with --labels union."
)


class CensusStep(Step[CensusKey, Census, PooledCensus]):
    """The sites compare channels and labels, and learn how many cases all have."""

    key = CensusKey
    contribution, results = Census, (PooledCensus,)
    policy = Policy(pooled=True, missable=True, compared=True)

    def check(
        self,
        key: CensusKey,
        site: str,
        document: Document[Census],
        reader: DocumentReader,
        settings: FederationSettings,
    ) -> None:
        """Raise RefusedError unless a site can mask its statistics, where it is to."""
        if settings.secure is not None:
            check_can_be_masked(site, document.message)

    def compared(
        self, key: CensusKey, before: Census, now: Census, reader: DocumentReader
    ) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Compare all but keys: a site forgets its own when the fingerprint is there."""
        without_keys = {"keys": None}
        return comparable(before.model_copy(update=without_keys)), comparable(now.model_copy(update=without_keys))

    def pool(
        self,
        key: CensusKey,
        documents: Mapping[str, Document[Census]],
        settings: FederationSettings,
        reader: DocumentReader,
    ) -> PooledCensus:
        """Add up the cases, and hand out the sites' keys where they mask."""
        contributed = messages_of(documents)
        pooled = pool_census(contributed, settings)
        if settings.secure is None:
            return pooled
        check_size(len(contributed))
        signed = {site: census.keys for site, census in contributed.items() if census.keys is not None}
        check_run_keys(signed, federation=settings.federation, gathering=str(key))
        return pooled.model_copy(update={"keys": signed})


def pool_census(contributed: Mapping[str, Census], settings: FederationSettings) -> PooledCensus:
    """Add up the cases, if channels and labels agree; number classes where these may differ."""
    num_cases = sum(census.num_cases for census in contributed.values())
    if settings.labels == "equal":
        check_same_dataset(contributed)
        return PooledCensus(num_cases=num_cases)
    check_same_dataset(contributed, fields=("channel_names",))
    union = unite_labels({site: census.labels for site, census in contributed.items()})
    return PooledCensus(num_cases=num_cases, labels={**union.labels}, annotators=union.annotators)


def union_of(pooled: PooledCensus) -> LabelUnion:
    """Return the classes of all sites, of a census that has numbered them."""
    labels = {name: value for name, value in (pooled.labels or {}).items() if isinstance(value, int)}
    return LabelUnion(labels, dict(pooled.annotators))


def check_can_be_masked(site: str, census: Census) -> None:
    """Raise RefusedError if a site shares extrema, or has no key."""
    if census.share_extrema:
        raise RefusedError(
            f"site {site} wants to share its smallest and largest voxels, and this federation adds up masked "
            "statistics: a smallest voxel is no sum",
            "Plan again without --share_extrema.",
            code="extrema_not_masked",
        )
    if census.keys is None:
        raise RefusedError(
            f"site {site} has no key with which to mask its statistics, as this federation wants",
            "Use matching versions of the software at all sites.",
            code="run_key_missing",
        )


def check_same_dataset(
    described: Mapping[str, Census | TrainingData],
    fields: Sequence[str] = ("channel_names", "labels", "regions_class_order"),
) -> None:
    """Raise RefusedError, naming the difference, unless all sites have the same channels and labels."""
    for field in fields:
        values = {site: message.model_dump(mode="json")[field] for site, message in described.items()}
        difference = first_difference(values, field)
        if difference is None and field == "labels" and any(m.regions_class_order for m in described.values()):
            # Regions are numbered by their place in the file.
            difference = first_difference({site: list(labels) for site, labels in values.items()}, "order of labels")
        if difference:
            raise RefusedError(
                f"the sites' datasets do not go together: {difference}",
                "Make dataset.json (and the segmentations) agree, then run the command again."
                + ("" if field == "channel_names" else f" {WITH_UNION}"),
                code="datasets_differ",
            )


def settled_labels(site: str, reader: DocumentReader) -> Mapping[str, Any] | None:
    """Return the common numbers of classes with which a site has planned, or None."""
    for key in (CensusKey(), LateCensusKey(site)):
        if reader.has_contributed(key, site) and reader.is_closed(key):
            with reader.result(key) as document:
                return document.message.labels
    return None


def planned_cases(site: str, reader: DocumentReader) -> int | None:
    """Return how many cases a site had when it planned with the others.

    None if it has not.
    """
    for key in (CensusKey(), LateCensusKey(site)):
        if reader.has_contributed(key, site):
            with reader.contribution(key, site) as document:
                return document.message.num_cases
    return None


STEPS = (CensusStep(),)
