"""Turn the contributions of a gathering into its result, or into the reason why there is none.

Three questions per kind of gathering: how large may a contribution be, is it what it should be, and what follows from
all of them. Documents come from an `Archive` and results go to it; nothing here knows of sockets, clocks or databases.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.federated import admission, aggregation, half_precision, matching, messages, statistics, validation
from nnunetv2.federated.archive import Archive
from nnunetv2.federated.bodies import FederationSettings
from nnunetv2.federated.comparing import comparable_plans, find_difference, first_change, first_difference
from nnunetv2.federated.errors import MatchingError, RefusedError, WireError
from nnunetv2.federated.messages import CENSUS_KEY, COARSE_KEY, initial_key, round_key
from nnunetv2.federated.rounds import (
    WEIGHT_KINDS,
    Closed,
    Gathering,
    GatheringKey,
    Kind,
    changed_since,
    prerequisite,
)
from nnunetv2.federated.strict_json import json_digest
from nnunetv2.federated.voxel_extrema import without_extrema
from nnunetv2.federated.wire import Document, TensorSpec, check_tensors, write_document, write_subset

MAX_DOCUMENT_BYTES = 256 << 20
"""Bound of everything that is not a set of weights."""
MESSAGE_ALLOWANCE = 4 << 20
"""Bytes beside its tensors that a set of weights may have: names, shapes and metrics."""

MESSAGE_OF_KIND: dict[Kind, type[messages.Message]] = {
    "census": messages.Census,
    "coarse": messages.CoarseSummary,
    "fine": messages.FineSummary,
    "plans": messages.PlansReport,
    "late_census": messages.Census,
    "late_plans": messages.PlansReport,
    "registration": messages.Registration,
    "admission": messages.Registration,
    "initial": messages.Update,
    "round": messages.Update,
    "validation": messages.Validation,
}


def names_for_site(key: GatheringKey, site: str, archive: Archive) -> tuple[str, ...] | None:
    """Return the tensors of a result that concern a site, sorted; None if it gets the result as it is kept."""
    if key.kind not in WEIGHT_KINDS:
        return None
    agreement = archive.agreement(key.run)
    names = tuple(sorted(agreement.specs_for(site)))
    is_whole = len(names) == len(agreement.specs) and agreement.match.precision == "float32"
    return None if is_whole else names


def write_for_sites(key: GatheringKey, names: Sequence[str], path: Path, archive: Archive) -> str:
    """Write these tensors of a result as they travel, and return the SHA-256."""
    write = half_precision.write_rounded if archive.agreement(key.run).match.precision == "float16" else write_subset
    with archive.result(str(key)) as whole:
        return write(whole, path, names)


# ---------------------------------------------------------------------------------------- checking a contribution
def size_limit(key: GatheringKey, site: str, archive: Archive) -> int:
    """Return how many bytes a site may send to a gathering that has begun."""
    if key.kind == "validation":
        return MESSAGE_ALLOWANCE
    if key.kind not in WEIGHT_KINDS:
        return MAX_DOCUMENT_BYTES
    return sum(spec.nbytes for spec in _expected_weights(key, site, archive).values()) + MESSAGE_ALLOWANCE


def check_contribution(key: GatheringKey, site: str, document: Document, archive: Archive) -> None:
    """Raise WireError unless a document is what its gathering expects of a site: kind, names, shapes, finite values."""
    expected = MESSAGE_OF_KIND[key.kind]
    if not isinstance(document.message, expected):
        raise WireError(f"{key} takes messages of kind {expected.model_fields['kind'].default}, "
                        f"this one is of kind {document.message.kind}")
    expected_tensors = _expected_tensors(key, site, document.message, archive)
    if key.kind == "round":
        _check_precision(document, expected_tensors)
    check_tensors(document, expected_tensors)
    if key.kind == "coarse":
        _check_coarse(site, document, archive)
    elif key.kind == "fine":
        _check_fine(site, document, archive)
    elif key.kind in ("registration", "admission"):
        _check_registration(key, document.message)


def _expected_tensors(key: GatheringKey, site: str, message: Any, archive: Archive) -> Mapping[str, TensorSpec]:
    if key.kind == "coarse":
        return {f"coarse.{c}": TensorSpec("I64", (statistics.NUM_BINS,)) for c in range(len(message.moments))}
    if key.kind == "fine":
        return {f"fine.{c}": TensorSpec("I64", (len(bins), statistics.NUM_BINS)) for c, bins in enumerate(message.bins)}
    if key.kind in WEIGHT_KINDS:
        return _expected_weights(key, site, archive)
    return {}


def _expected_weights(key: GatheringKey, site: str, archive: Archive) -> dict[str, TensorSpec]:
    agreement = archive.agreement(key.run)
    if key.kind == "initial":  # sent once, and where all begin: in full precision
        return agreement.specs_owned_by(site)
    specs = agreement.specs_for(site)
    return half_precision.narrowed(specs) if agreement.match.precision == "float16" else specs


def _check_precision(document: Document, expected: Mapping[str, TensorSpec]) -> None:
    for name, spec in document.specs.items():
        if name in expected and expected[name].dtype != spec.dtype:
            raise WireError(f"tensor {name} travels as {expected[name].dtype} in this federation, not as {spec.dtype}: "
                            "this site needs the version of the software that the coordinator has")


def _check_coarse(site: str, document: Document, archive: Archive) -> None:
    with archive.contribution(CENSUS_KEY, site) as earlier:
        census = earlier.message
    summary = document.message
    if (len(summary.spacings), len(summary.moments)) != (census.num_cases, len(census.channel_names)):
        raise WireError(f"the summary has {len(summary.spacings)} cases and {len(summary.moments)} channels, the "
                        f"census of site {site} {census.num_cases} and {len(census.channel_names)}")
    for channel, moments in enumerate(summary.moments):
        histogram = statistics.pool_histograms([document.read(f"coarse.{channel}")])
        if int(histogram.sum()) != moments.count:
            raise WireError(f"channel {channel}: moments and histogram count different numbers of voxels")


def _check_fine(site: str, document: Document, archive: Archive) -> None:
    with archive.result(COARSE_KEY) as wanted:
        if document.message.bins != wanted.message.bins:
            raise WireError("the bins are not those that were asked for")
    with archive.contribution(COARSE_KEY, site) as coarse:
        for channel, bins in enumerate(document.message.bins):
            fine = statistics.pool_histograms([document.read(f"fine.{channel}")])
            if (fine.sum(axis=1) != coarse.read(f"coarse.{channel}")[list(bins)]).any():
                raise WireError(f"channel {channel}: fine and coarse histograms of site {site} count different voxels")


def _check_registration(key: GatheringKey, message: messages.Registration) -> None:
    plans_name = message.plans.get("plans_name")
    if not isinstance(plans_name, str) or not re.fullmatch(messages.SEGMENT_PATTERN.strip("^$"), plans_name):
        raise WireError(f"plans_name {str(plans_name)[:80]!r} in the plans cannot be part of a folder's name")
    named = messages.run_name(message.configuration, message.fold, message.trainer)
    if key.run not in (named, f"{named}.{plans_name}"):
        raise WireError(f"a registration for {named} was sent to the run {key.run}")


def check_unchanged(key: GatheringKey, site: str, message: messages.Message, archive: Archive) -> None:
    """Raise RefusedError, naming the difference, unless a site contributes again what it has contributed.

    Versions of the software may word a registration differently: extrema of voxels, and what only one of them says, do
    not count. Nor do the weights that a training starts from, once the initial ones are settled.
    """
    with archive.contribution(str(key), site) as held:
        before, now = _comparable(held.message), _comparable(message)
    if isinstance(message, messages.Registration):
        for name in messages.NEW_IN_REGISTRATION:
            is_settled = name == "pretrained_weights" and archive.is_closed(initial_key(key.run))
            is_unknown = name != "pretrained_weights" and not (name in before and name in now)
            if is_settled or is_unknown:
                before.pop(name, None), now.pop(name, None)
    change = first_change(before, now)
    if change is not None:
        raise changed_since(key, site, change)


def _comparable(message: messages.Message) -> dict[str, Any]:
    content = message.model_dump(mode="json")
    return {**content, "plans": without_extrema(content["plans"])} if "plans" in content else content


# ------------------------------------------------------------------------------------------------------------ closing
@dataclass(frozen=True)
class Computed:
    """The result of a gathering, which is in its place."""

    digest: str
    """Its SHA-256."""
    record: Mapping[str, Any] | None = None
    """What is to be remembered of a round or validation, as JSON, when its documents are gone."""


def close(gathering: Gathering, settings: FederationSettings, archive: Archive) -> Computed:
    """Compute the result of a gathering and write it to its place.

    Args:
        gathering: With the outcome that it will have; its contributors are those that count.

    Raises:
        FederationError: The contributions do not go together; the text is meant for all sites.
    """
    assert isinstance(gathering.outcome, Closed)
    with archive.contributions(gathering) as documents:
        if gathering.key.kind == "initial":
            return Computed(_close_initial(gathering, documents, archive))
        if gathering.key.kind == "round":
            return _close_round(gathering, documents, settings, archive)
        result = _compute_message(gathering.key, documents, settings, archive)
    record = None
    if isinstance(result, messages.PooledValidation):
        record = result.model_dump(mode="json")
        result = result.model_copy(update={"dice_of_site": {}, "loss_of_site": {}})  # not for the other sites
    return Computed(write_document(archive.result_path(str(gathering.key)), result, {}, []), record)


def _compute_message(key: GatheringKey, documents: Mapping[str, Document], settings: FederationSettings,
                     archive: Archive) -> messages.Message:
    """Compute the result of a gathering whose result has no tensors."""
    contributed = {site: document.message for site, document in documents.items()}
    if key.kind == "census":
        return pool_census(contributed)
    if key.kind == "coarse":
        return messages.WantedBins(bins=tuple(
            statistics.wanted_bins(histogram) for histogram in _pool_channels(documents.values(), "coarse")))
    if key.kind == "fine":
        return _pool_fingerprint(documents, archive)
    if key.kind == "plans":
        return agree_on_plans({site: message.plans for site, message in contributed.items()})
    if key.kind == "late_census":
        return _show_in(contributed, archive)
    if key.kind == "late_plans":
        before = archive.messages(prerequisite(key).text)
        return agree_on_plans({site: message.plans for site, message in {**before, **contributed}.items()})
    if key.kind == "validation":
        return validation.pool(key.number, contributed, before=archive.last_validation(key.run))
    if key.kind == "admission":
        return _admit(key, contributed[key.site], archive)
    return match_registrations(contributed, settings)


def _admit(key: GatheringKey, registration: messages.Registration, archive: Archive) -> messages.Match:
    registered = archive.registrations(key.run)
    if key.site in registered:
        raise RefusedError(f"site {key.site} takes part in run {key.run} already", code="already_closed")
    _check_compatible({**registered, key.site: registration})
    return admission.admit(key.site, registration, archive.agreement(key.run).match, registered)


def pool_census(contributed: Mapping[str, messages.Census]) -> messages.PooledCensus:
    """Add up the cases, if channels and labels agree."""
    check_same_dataset(contributed)
    return messages.PooledCensus(num_cases=sum(census.num_cases for census in contributed.values()))


def _show_in(contributed: Mapping[str, messages.Census], archive: Archive) -> messages.PooledCensus:
    """Count the cases of the others, if the dataset of the site that comes late goes with theirs."""
    before = archive.messages(CENSUS_KEY)
    check_same_dataset({**before, **contributed})
    return pool_census(before)


def _pool_fingerprint(documents: Mapping[str, Document], archive: Archive) -> messages.PooledFingerprint:
    with ExitStack() as stack:
        coarse = [stack.enter_context(archive.contribution(COARSE_KEY, site)) for site in documents]
        summaries = [document.message for document in coarse]
        fingerprint = statistics.pool_fingerprint(
            summaries, _pool_channels(coarse, "coarse"), _pool_channels(documents.values(), "fine"))
    return messages.PooledFingerprint(num_cases=sum(len(summary.spacings) for summary in summaries),
                                      fingerprint=fingerprint)


def _pool_channels(documents: Iterable[Document], name: str) -> list[Any]:
    """Add up the histograms `<name>.<channel>` of all sites, channel by channel."""
    documents = list(documents)
    return [statistics.pool_histograms(document.read(f"{name}.{channel}") for document in documents)
            for channel in range(len(documents[0].specs))]


def agree_on_plans(plans: Mapping[str, Mapping[str, Any]], *, made_together: bool = True) -> messages.PlansAgreement:
    """Return the digest of the plans that all sites hold, or raise RefusedError with the first difference.

    Args:
        made_together: Whether plans follow from what the sites have pooled. Of those that a site has made alone the
            others get to know the field only: its value tells of the site's data.
    """
    comparable = {site: comparable_plans(content) for site, content in plans.items()}
    difference = find_difference(comparable, "plans")
    if difference is not None:
        groups = " and ".join("/".join(sites) for sites in difference.held.values())
        text = str(difference) if made_together else f"{difference.place}, between sites {groups}"
        raise RefusedError(f"the plans differ: {text}", "Plan again at all sites, with the same options and the "
                           "same version: nnUNetv2_plan_and_preprocess --federated.", code="plans_differ")
    return messages.PlansAgreement(digest=json_digest(next(iter(comparable.values()))))


def check_pretrained_weights(digests: Mapping[str, str | None]) -> None:
    """Raise RefusedError, saying who gave what, unless all sites start from the same weights or from random ones."""
    groups: dict[str | None, list[str]] = {}
    for site, digest in sorted(digests.items()):
        groups.setdefault(digest, []).append(site)
    if len(groups) > 1:
        given = "; ".join(f"{', '.join(sites)}: {'none' if digest is None else f'SHA-256 {digest[:12]}...'}"
                          for digest, sites in groups.items())
        raise RefusedError(f"the sites do not start from the same pretrained weights ({given})",
                           "Give the same file as -pretrained_weights at all sites, or give none anywhere.",
                           code="weights_differ")


def match_registrations(contributed: Mapping[str, messages.Registration],
                        settings: FederationSettings) -> messages.Match:
    """Decide what the sites of a run share."""
    _check_compatible(contributed)
    check_pretrained_weights({site: message.pretrained_weights for site, message in contributed.items()})
    cases = {site: float(message.num_training_cases) for site, message in contributed.items()}
    try:
        matched = matching.match_tensors({site: message.tensors for site, message in contributed.items()},
                                         rule=settings.matching)
    except MatchingError as error:
        raise RefusedError(str(error), code="nothing_shared") from error
    return messages.Match(
        rule=settings.matching, weighting=settings.weighting, precision=settings.precision,
        weights=dict.fromkeys(contributed, 1.0),
        num_epochs=settings.num_epochs, num_iterations_per_epoch=settings.num_iterations_per_epoch,
        num_val_iterations_per_epoch=settings.num_val_iterations_per_epoch,
        shared=matched.shared, initial_owner=matching.choose_owners(matched.shared, cases), coverage=matched.coverage)


def _check_compatible(registered: Mapping[str, messages.Registration]) -> None:
    """Raise RefusedError unless datasets go together, and plans where a trainer wants them equal."""
    check_same_dataset({site: message.dataset_json for site, message in registered.items()})
    if any(message.requires_equal_plans for message in registered.values()):
        agree_on_plans({site: message.plans for site, message in registered.items()}, made_together=False)


def check_same_dataset(described: Mapping[str, messages.Census | messages.TrainingData]) -> None:
    """Raise RefusedError, naming the difference, unless all sites have the same channels and labels."""
    for field in ("channel_names", "labels", "regions_class_order"):
        values = {site: message.model_dump(mode="json")[field] for site, message in described.items()}
        difference = first_difference(values, field)
        if difference is None and field == "labels" and any(m.regions_class_order for m in described.values()):
            # Regions are numbered by their place in the file.
            difference = first_difference({site: list(labels) for site, labels in values.items()}, "order of labels")
        if difference:
            raise RefusedError(f"the sites' datasets do not go together: {difference}",
                               "Make dataset.json (and the segmentations) agree, then run the command again.",
                               code="datasets_differ")


def _close_initial(gathering: Gathering, documents: Mapping[str, Document], archive: Archive) -> str:
    match = archive.agreement(gathering.key.run).match
    owners = set(match.initial_owner.values())
    message = messages.Aggregate(round=None, missing=gathering.outcome.missing,
                                 contributors={site: 1.0 for site in documents if site in owners})
    return aggregation.collect_from_owners(documents, match.initial_owner, message=message,
                                           out_path=archive.result_path(str(gathering.key)))


def _close_round(gathering: Gathering, documents: Mapping[str, Document], settings: FederationSettings,
                 archive: Archive) -> Computed:
    key, agreement = gathering.key, archive.agreement(gathering.key.run)
    weights = {site: agreement.weights[site] for site in documents}
    message = messages.Aggregate(round=key.number, missing=gathering.outcome.missing,
                                 contributors=dict.fromkeys(documents, 1.0))
    measured = {site: document.message.model_dump(mode="json", include={"metrics", "earlier"})
                for site, document in documents.items()}
    before = round_key(key.run, key.number - 1) if key.number else initial_key(key.run)
    with archive.result(before) as previous:
        done = aggregation.aggregate_documents(documents, weights, message=message, previous=previous,
                                               out_path=archive.result_path(str(key)),
                                               precision=agreement.match.precision)
    return Computed(done.digest, record_of_round(gathering, weights, measured, settings, done))


def record_of_round(gathering: Gathering, weights: Mapping[str, float], measured: Mapping[str, Mapping[str, Any]],
                    settings: FederationSettings, done: aggregation.Aggregated) -> dict[str, Any]:
    """Return what is remembered of a round: who contributed what, when, with which weight, how far, and what held.

    Args:
        measured: Site -> the metrics of its update, and those of an earlier round that came with it. They stay here:
            the other sites do not see them.
    """
    contributed = {site: {"weight": weight, "digest": held.digest, "bytes": held.size, "received": held.received,
                          **measured[site], "change_norm": done.changes[site].norm,
                          "change_rms": done.changes[site].rms}
                   for site, weight in weights.items() for held in (gathering.contributions[site],)}
    return {"round": gathering.key.number, "opened": gathering.opened, "closed": gathering.outcome.time,
            "digest": done.digest, "sites": contributed, "missing": list(gathering.outcome.missing),
            "failed": sorted(gathering.excused & set(gathering.outcome.missing)),
            "outliers": aggregation.outliers(done.changes),
            "settings": settings.model_dump(mode="json", exclude={"federation", "sites"})}
