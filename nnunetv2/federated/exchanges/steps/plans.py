"""Compare the plans that the sites have made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.exchanges import document_limits
from nnunetv2.federated.exchanges.consistency import comparable_plans, find_difference
from nnunetv2.federated.exchanges.documents import DocumentReader
from nnunetv2.federated.exchanges.exchange import Policy
from nnunetv2.federated.exchanges.steps.base import Step
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.document import Document
from nnunetv2.federated.protocol.keys import PlansKey
from nnunetv2.federated.protocol.messages import PlansAgreement, PlansReport
from nnunetv2.federated.protocol.strict_json import json_digest


class PlansStep(Step[PlansKey, PlansReport, PlansAgreement]):
    """The sites make sure that all hold the same plans."""

    key = PlansKey
    contribution, results = PlansReport, (PlansAgreement,)
    policy = Policy(missable=True, compared=True)
    header = document_limits.PLANS

    def pool(
        self,
        key: PlansKey,
        documents: Mapping[str, Document[PlansReport]],
        settings: FederationSettings,
        reader: DocumentReader,
    ) -> PlansAgreement:
        """Return the digest of the plans, if they are the same."""
        return agree_on_plans({site: document.message.plans for site, document in documents.items()})


def agree_on_plans(plans: Mapping[str, Mapping[str, Any]]) -> PlansAgreement:
    """Return the digest of the plans that all sites hold.

    Raises RefusedError with the first difference.
    """
    comparable = {site: comparable_plans(content) for site, content in plans.items()}
    difference = find_difference(comparable, "plans")
    if difference:
        # The values stay here: those of plans that a site has made alone tell of its data.
        raise RefusedError(
            f"the plans differ: {difference.without_values()}",
            "Plan again at all sites, with the same options and the same version: "
            "nnUNetv2_plan_and_preprocess --federated.",
            code="plans_differ",
        )
    return PlansAgreement(digest=json_digest(next(iter(comparable.values()))))


STEPS = (PlansStep(),)
