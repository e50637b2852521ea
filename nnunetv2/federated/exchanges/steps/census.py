"""Compare the sites' datasets before anything is pooled, and count all cases."""

from __future__ import annotations

from collections.abc import Mapping

from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.exchanges.consistency import first_difference
from nnunetv2.federated.exchanges.documents import DocumentReader
from nnunetv2.federated.exchanges.exchange import Policy
from nnunetv2.federated.exchanges.steps.base import Step, messages_of
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.document import Document
from nnunetv2.federated.protocol.keys import CensusKey, LateCensusKey
from nnunetv2.federated.protocol.messages import Census, PooledCensus, TrainingData


class CensusStep(Step[CensusKey, Census, PooledCensus]):
    """The sites compare channels and labels, and learn how many cases all have."""

    key = CensusKey
    contribution, results = Census, (PooledCensus,)
    policy = Policy(pooled=True, missable=True, compared=True)

    def pool(
        self,
        key: CensusKey,
        documents: Mapping[str, Document[Census]],
        settings: FederationSettings,
        reader: DocumentReader,
    ) -> PooledCensus:
        """Add up the cases, if the datasets go together."""
        return pool_census(messages_of(documents))


def pool_census(contributed: Mapping[str, Census]) -> PooledCensus:
    """Add up the cases, if channels and labels agree."""
    check_same_dataset(contributed)
    return PooledCensus(num_cases=sum(census.num_cases for census in contributed.values()))


def check_same_dataset(described: Mapping[str, Census | TrainingData]) -> None:
    """Raise RefusedError, naming the difference, unless all sites have the same channels and labels."""
    for field in ("channel_names", "labels", "regions_class_order"):
        values = {site: message.model_dump(mode="json")[field] for site, message in described.items()}
        difference = first_difference(values, field)
        if difference is None and field == "labels" and any(m.regions_class_order for m in described.values()):
            # Regions are numbered by their place in the file.
            difference = first_difference({site: list(labels) for site, labels in values.items()}, "order of labels")
        if difference:
            raise RefusedError(
                f"the sites' datasets do not go together: {difference}",
                "Make dataset.json (and the segmentations) agree, then run the command again.",
                code="datasets_differ",
            )


def planned_cases(site: str, reader: DocumentReader) -> int | None:
    """Return how many cases a site had when it planned with the others.

    None if it has not.
    """
    for key in (CensusKey(), LateCensusKey(site)):
        if reader.has_contributed(key, site):
            with reader.contribution(key, site) as document:
                return document.message.num_cases
    return None
