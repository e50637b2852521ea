"""Build the documents of a planning and a training before either begins.

Values that are not known yet have stand-ins of the same size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nnunetv2.federated.aggregation import fingerprint_statistics, matching
from nnunetv2.federated.aggregation.codecs import codec_of
from nnunetv2.federated.privacy.disclosure import Disclosure
from nnunetv2.federated.privacy.own_networks import plans_to_compare
from nnunetv2.federated.protocol import api, keys, messages
from nnunetv2.federated.protocol.document import TensorSpec
from nnunetv2.federated.protocol.messages import Networks, Precision, Registration
from nnunetv2.federated.site.planned_sums import a_signed_key, planning_sums, round_sums, validation_sums

MEASURED = -0.123456789012345678
"""Stands for a number that is not known yet: as long as numbers get."""
MAX_BINS = 6
OWN_NETWORK_PASSED_ON = (
    "; kind, stages and size of this site's network. Its patch is in the common model of this network, if there will "
    "be one and no site with more training cases has it too. Memory target, planner, batch size, names of plans and "
    "the networks of other configurations stay here"
)
"""Of a registration, where sites have networks of their own."""


def planning_documents(
    dataset_json: Mapping[str, Any],
    num_cases: int,
    *,
    plans: Mapping[str, Any] | None = None,
    share_extrema: bool = False,
    is_masked: bool = False,
    networks: Networks = "equal",
) -> list[Disclosure]:
    """Return the documents that `nnUNetv2_plan_and_preprocess --federated` sends.

    Args:
        plans: Plans of about the size of those that will be compared; None leaves them out.
        is_masked: Whether the federation adds up statistics behind masks.
        networks: Whether all sites plan the same network, or each its own.
    """
    channels = dataset_json.get("channel_names") or dataset_json["modality"]
    census = Disclosure(
        when="planning, first exchange",
        passed_on="the sum of the cases of all sites" + ("; and the key" if is_masked else ""),
        message=messages.Census(
            num_cases=num_cases,
            channel_names=channels,
            labels=dataset_json["labels"],
            regions_class_order=dataset_json.get("regions_class_order"),
            share_extrema=share_extrema,
            keys=a_signed_key() if is_masked else None,
        ),
    )
    statistics = planning_sums(len(channels)) if is_masked else _statistics(channels, num_cases, share_extrema)
    documents = [census, *statistics]
    if plans is not None:
        documents.append(
            Disclosure(
                when="planning, to compare the plans",
                message=messages.PlansReport(plans=plans_to_compare(plans, networks)),
                known=False,
                passed_on="the digest; if plans differ, the first field that does"
                + ("" if networks == "equal" else ". Network, patch, batch and names of plans stay here"),
            )
        )
    return documents


def _statistics(channels: Mapping[str, str], num_cases: int, share_extrema: bool) -> list[Disclosure]:
    """Return the documents with statistics that the coordinator can read."""
    moments = messages.ChannelMoments(count=10**9, mean=MEASURED, m2=-MEASURED)
    triple = (-MEASURED,) * 3
    bins = (tuple(range(65_530, 65_530 + MAX_BINS)),) * len(channels)
    fine = {f"fine.{c}": TensorSpec("I64", (MAX_BINS, fingerprint_statistics.NUM_BINS)) for c in range(len(channels))}
    documents = [
        Disclosure(
            when="planning, second exchange",
            known=False,
            passed_on="nothing of it; later all spacings and shapes in one sorted list, without names of sites"
            + (
                ""
                if share_extrema
                else ". Smallest and largest voxel stay here: in the histograms, the "
                "outermost values are counted farther out"
            ),
            message=messages.CoarseSummary(
                spacings=(triple,) * num_cases,
                shapes=((1000, 1000, 1000),) * num_cases,
                relative_sizes=(-MEASURED,) * num_cases,
                moments=(moments,) * len(channels),
                promotes_to_float64=False,
                extrema=((MEASURED, MEASURED),) * len(channels) if share_extrema else None,
            ),
            specs={f"coarse.{c}": TensorSpec("I64", (fingerprint_statistics.NUM_BINS,)) for c in range(len(channels))},
        ),
        Disclosure(
            when="planning, third exchange",
            known=False,
            passed_on="per channel: mean, standard deviation, median and percentiles of all sites together",
            message=messages.FineSummary(bins=bins),
            specs=fine,
        ),
    ]
    if not share_extrema:
        documents.append(
            Disclosure(
                when="planning, third exchange, where a percentile of all sites lies among this site's outermost "
                "values: then fewer of them are hidden, if need be none",
                known=False,
                passed_on="which bins of all sites' histograms hold the percentiles, and then the same as above",
                message=messages.FineSummary(bins=bins, corrected=tuple(range(len(channels)))),
                specs=fine
                | {f"coarse.{c}": TensorSpec("I64", (fingerprint_statistics.NUM_BINS,)) for c in range(len(channels))},
            )
        )
    return documents


def training_documents(
    registration: Registration,
    *,
    metrics: Sequence[str],
    later_metrics: Sequence[str],
    num_classes: int | None,
    precision: Precision = "float32",
    is_masked: bool = False,
    networks: Networks = "equal",
) -> list[Disclosure]:
    """Return the documents that training sends, from its registration to its last round.

    Args:
        metrics: Names of the figures of an epoch that travel with its update.
        later_metrics: Names of those that travel with the next one.
        num_classes: Foreground classes or regions; None if no figures of validation are sent.
        precision: How the tensors of the rounds travel.
        is_masked: Whether the federation masks updates; the registration is without a key.
        networks: Whether all sites plan the same network, or each its own.
    """
    run = keys.run_name(registration.configuration, registration.fold, registration.trainer)
    specs = {
        entry.name: TensorSpec(entry.dtype, entry.shape)
        for entry in registration.tensors
        if entry.dtype in matching.SHAREABLE and not entry.only_received
    }

    def values(names: Sequence[str]) -> dict[str, Any]:
        return {name: [MEASURED] * (num_classes or 0) if name.startswith("dice_per") else MEASURED for name in names}

    if is_masked:
        registration = registration.model_copy(update={"keys": a_signed_key(), "trust": "first_use"})
    when = f"training {registration.configuration}, every round"
    validated = f"{when} that is validated"
    if is_masked:
        rounds = round_sums(when, specs, precision)
        validations = [] if num_classes is None else validation_sums(validated, num_classes)
    else:
        rounds = [_round_in_clear(when, specs, values(metrics), values(later_metrics), precision)]
        validations = [] if num_classes is None else [_validation_in_clear(validated, num_classes)]
    return [
        *_before_the_first_round(registration, specs, networks),
        *rounds,
        *validations,
        Disclosure(
            when=f"training {registration.configuration}, if it fails",
            known=False,
            message=api.FailureReport(run=run, round=10**7, reason="OutOfMemoryError"),
            passed_on="all of it; the reason is a kind of error, never its text",
        ),
    ]


def _before_the_first_round(
    registration: Registration, specs: Mapping[str, TensorSpec], networks: Networks
) -> list[Disclosure]:
    """Return the registration and the initial values."""
    return [
        Disclosure(
            when=f"training {registration.configuration}, before the first round",
            message=registration,
            passed_on="which site has most training cases, the names of the tensors, and how many are shared"
            + ("" if networks == "equal" else OWN_NETWORK_PASSED_ON),
        ),
        Disclosure(
            when=f"training {registration.configuration}, before the first round: initial values",
            message=messages.Update(),
            specs=specs,
            known=False,
            passed_on="for each tensor, the values of the site with most cases that has it; at most all of these",
        ),
    ]


def _round_in_clear(
    when: str,
    specs: Mapping[str, TensorSpec],
    metrics: dict[str, Any],
    later_metrics: dict[str, Any],
    precision: Precision,
) -> Disclosure:
    """Return the update of a round that the coordinator can read."""
    earlier = messages.EarlierMetrics(round=10**7, metrics=later_metrics) if later_metrics else None
    return Disclosure(
        when=f"{when}: the tensors that another site has too, at most these",
        message=messages.Update(metrics=metrics, earlier=earlier),
        known=False,
        specs=codec_of(precision).specs(specs),
        passed_on="the weighted average of the tensors",
    )


def _validation_in_clear(when: str, num_classes: int) -> Disclosure:
    """Return the validation of an aggregate that the coordinator can read."""
    counted = (float(2**53 - 1),) * num_classes
    return Disclosure(
        when=when,
        known=False,
        message=messages.Validation(tp=counted, fp=counted, fn=counted, loss=MEASURED),
        passed_on="the Dice per class, of all sites together",
    )
