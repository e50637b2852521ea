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
from nnunetv2.federated.privacy.own_networks import OF_PATCH
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.document import Document
from nnunetv2.federated.protocol.keys import PlansKey
from nnunetv2.federated.protocol.messages import Networks, PlansAgreement, PlansReport
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
        return agree_on_plans({site: document.message.plans for site, document in documents.items()}, settings.networks)


def agree_on_plans(plans: Mapping[str, Mapping[str, Any]], networks: Networks = "equal") -> PlansAgreement:
    """Return the digest of the plans that all sites hold.

    Args:
        networks: "own" compares only the fields that the data decide.

    Raises:
        RefusedError: They differ; it names the first field that does.
    """
    comparable = {site: comparable_plans(content, networks) for site, content in plans.items()}
    check_equal(comparable, networks)
    return PlansAgreement(digest=json_digest(next(iter(comparable.values()))))


def check_equal(comparable: Mapping[str, Mapping[str, Any]], networks: Networks = "equal") -> None:
    """Raise RefusedError, naming the first field that differs, unless plans are equal."""
    difference = find_difference(comparable, "plans")
    if difference:
        # The values stay here: those of plans that a site has made alone tell of its data.
        raise RefusedError(
            f"the plans differ: {difference.without_values()}", _remedy(difference.place, networks), code="plans_differ"
        )


def _remedy(place: str, networks: Networks) -> str:
    if networks == "equal":
        return (
            "Plan again at all sites, with the same options and the same version: "
            "nnUNetv2_plan_and_preprocess --federated. Sites whose GPUs want other networks need a federation that "
            "lets each have its own: nnUNetv2_fed_coordinator --networks own."
        )
    if any(f".{name}" in place for name in OF_PATCH):
        return (
            "How coarse 3d_lowres is follows from the patch, and so from the GPU of each site: train 2d or 3d_fullres, "
            "or found a federation without --networks own."
        )
    return (
        "The data decide that, for all sites: plan again with nnUNetv2_plan_and_preprocess --federated (not asym), the "
        "same version, -overwrite_target_spacing and -preprocessor_name, and planners that resample alike. Memory "
        "target and network may differ."
    )


STEPS = (PlansStep(),)
