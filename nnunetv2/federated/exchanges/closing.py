"""Turn the contributions of an exchange into its result, or into the reason why there is none.

Three questions per kind of exchange: how large may a contribution be, is it what it should be, and what follows from
all of them. Documents come from an `Archive` and results go to it; nothing here knows of sockets, clocks or databases.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.federated.aggregation import (
    fingerprint_statistics,
    half_precision,
    late_join,
    matching,
    pooled_validation,
    weighted_mean,
)
from nnunetv2.federated.errors import MatchingError, RefusedError, StatisticsError, WireError
from nnunetv2.federated.exchanges import document_limits, plausibility
from nnunetv2.federated.exchanges.consistency import comparable_plans, find_difference, first_change, first_difference
from nnunetv2.federated.exchanges.documents import Archive
from nnunetv2.federated.exchanges.exchange import (
    WEIGHT_KINDS,
    Closed,
    Exchange,
    ExchangeKey,
    Kind,
    changed_since,
    parse_key,
    prerequisite,
)
from nnunetv2.federated.privacy.plans_redaction import without_extrema
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.document import (
    Document,
    Limits,
    TensorSpec,
    check_tensors,
    write_document,
    write_subset,
)
from nnunetv2.federated.protocol.messages import (
    CENSUS_KEY,
    COARSE_KEY,
    fine_key,
    initial_key,
    late_census_key,
    round_key,
)
from nnunetv2.federated.protocol.strict_json import json_digest

_HISTOGRAM_BYTES = 8 * fingerprint_statistics.NUM_BINS

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


def names_for_site(key: ExchangeKey, site: str, archive: Archive) -> tuple[str, ...] | None:
    """Return the tensors of a result that concern a site, sorted; None if it gets the result as it is kept."""
    if key.kind not in WEIGHT_KINDS:
        return None
    agreement = archive.agreement(key.run)
    names = tuple(sorted(agreement.specs_for(site)))
    is_whole = len(names) == len(agreement.specs) and agreement.match.precision == "float32"
    return None if is_whole else names


def write_for_sites(key: ExchangeKey, names: Sequence[str], path: Path, archive: Archive) -> str:
    """Write these tensors of a result as they travel, and return the SHA-256."""
    write = half_precision.write_rounded if archive.agreement(key.run).match.precision == "float16" else write_subset
    with archive.result(str(key)) as whole:
        return write(whole, path, names)


# ---------------------------------------------------------------------------------------- checking a contribution
def limits_of(key: ExchangeKey, site: str, archive: Archive) -> Limits:
    """Return how large a document may be that a site sends to an exchange that has begun."""
    if key.kind in WEIGHT_KINDS:
        return document_limits.weights_limits(_expected_weights(key, site, archive))
    if key.kind == "coarse":
        with archive.contribution(CENSUS_KEY, site) as earlier:
            cases, channels = earlier.message.num_cases, len(earlier.message.channel_names)
        return document_limits.coarse_limits(cases, channels, tensor_bytes=channels * _HISTOGRAM_BYTES)
    if key.kind == "fine":
        with archive.result(str(prerequisite(key))) as wanted:
            bins = getattr(wanted.message, "bins", ())
        histograms = sum(map(len, bins)) + len(bins)  # what lies inside the bins, and coarse ones that are corrected
        return document_limits.message_limits("fine", tensor_bytes=histograms * _HISTOGRAM_BYTES)
    return document_limits.message_limits(key.kind)


def check_contribution(
    key: ExchangeKey, site: str, document: Document, archive: Archive, settings: FederationSettings
) -> None:
    """Raise WireError unless a document is what its exchange expects of a site.

    That is its kind, the names, shapes and finite values of its tensors, and that it contradicts neither itself nor
    what the site has said before.
    """
    expected = MESSAGE_OF_KIND[key.kind]
    if not isinstance(document.message, expected):
        raise WireError(
            f"{key} takes messages of kind {expected.model_fields['kind'].default}, "
            f"this one is of kind {document.message.kind}"
        )
    expected_tensors = _expected_tensors(key, site, document.message, archive)
    if key.kind == "round":
        _check_precision(document, expected_tensors)
    check_tensors(document, expected_tensors)
    try:
        if key.kind == "coarse":
            _check_coarse(site, document, archive)
        elif key.kind == "fine":
            _check_fine(key, site, document, archive)
        elif key.kind in ("registration", "admission"):
            _check_registration(key, site, document.message, archive)
        elif key.kind == "validation":
            _check_validation(key, site, document.message, archive, settings)
    except StatisticsError as error:
        raise WireError(f"what site {site} sends cannot be right: {error}") from error


def _expected_tensors(key: ExchangeKey, site: str, message: Any, archive: Archive) -> Mapping[str, TensorSpec]:
    if key.kind == "coarse":
        return {
            f"coarse.{c}": TensorSpec("I64", (fingerprint_statistics.NUM_BINS,)) for c in range(len(message.moments))
        }
    if key.kind == "fine":
        fine = {
            f"fine.{c}": TensorSpec("I64", (len(bins), fingerprint_statistics.NUM_BINS))
            for c, bins in enumerate(message.bins)
        }
        return fine | {f"coarse.{c}": TensorSpec("I64", (fingerprint_statistics.NUM_BINS,)) for c in message.corrected}
    if key.kind in WEIGHT_KINDS:
        return _expected_weights(key, site, archive)
    return {}


def _expected_weights(key: ExchangeKey, site: str, archive: Archive) -> dict[str, TensorSpec]:
    agreement = archive.agreement(key.run)
    if key.kind == "initial":  # sent once, and where all begin: in full precision
        return agreement.specs_owned_by(site)
    specs = agreement.specs_for(site)
    return half_precision.narrowed(specs) if agreement.match.precision == "float16" else specs


def _check_precision(document: Document, expected: Mapping[str, TensorSpec]) -> None:
    for name, spec in document.specs.items():
        if name in expected and expected[name].dtype != spec.dtype:
            raise WireError(
                f"tensor {name} travels as {expected[name].dtype} in this federation, not as {spec.dtype}: "
                "this site needs the version of the software that the coordinator has"
            )


def _check_coarse(site: str, document: Document, archive: Archive) -> None:
    with archive.contribution(CENSUS_KEY, site) as earlier, archive.result(CENSUS_KEY) as pooled:
        census, num_all_cases = earlier.message, pooled.message.num_cases
    summary = document.message
    if (len(summary.spacings), len(summary.moments)) != (census.num_cases, len(census.channel_names)):
        raise WireError(
            f"the summary has {len(summary.spacings)} cases and {len(summary.moments)} channels, the "
            f"census of site {site} {census.num_cases} and {len(census.channel_names)}"
        )
    plausibility.check_geometry(summary.spacings, summary.relative_sizes)
    for channel, moments in enumerate(summary.moments):
        histogram = fingerprint_statistics.pool_histograms([document.read(f"coarse.{channel}")])
        try:
            plausibility.check_count(moments.count, census.num_cases, num_all_cases)
            plausibility.check_moments(moments, histogram, is_whole=summary.extrema is not None)
        except StatisticsError as error:
            raise StatisticsError(f"channel {channel}: {error}") from error


def _check_fine(key: ExchangeKey, site: str, document: Document, archive: Archive) -> None:
    with archive.result(str(prerequisite(key))) as wanted:
        if getattr(wanted.message, "bins", None) != document.message.bins:
            raise WireError("the bins are not those that were asked for")
    for channel, bins in enumerate(document.message.bins):
        coarse = before = fingerprint_statistics.pool_histograms([_coarse_of(key, site, channel, archive)])
        if channel in document.message.corrected:
            coarse = fingerprint_statistics.pool_histograms([document.read(f"coarse.{channel}")])
            with archive.contribution(COARSE_KEY, site) as earlier:
                first = fingerprint_statistics.pool_histograms([earlier.read(f"coarse.{channel}")])
            plausibility.check_corrected(first, before, coarse)
        fine = fingerprint_statistics.pool_histograms([document.read(f"fine.{channel}")])
        if (fine.sum(axis=1) != coarse[list(bins)]).any():
            raise WireError(f"channel {channel}: fine and coarse histograms of site {site} count different voxels")


def _coarse_of(key: ExchangeKey, site: str, channel: int, archive: Archive) -> Any:
    """Return a site's coarse histogram as it was before it contributed to a fine one: the last that it has sent."""
    earlier = prerequisite(key)
    while earlier.kind == "fine":
        with archive.contribution(str(earlier), site) as document:
            if channel in document.message.corrected:
                return document.read(f"coarse.{channel}")
        earlier = prerequisite(earlier)
    with archive.contribution(str(earlier), site) as document:
        return document.read(f"coarse.{channel}")


def _check_validation(
    key: ExchangeKey, site: str, message: messages.Validation, archive: Archive, settings: FederationSettings
) -> None:
    registration = archive.registration(key.run, site)
    largest = plausibility.largest_validation(
        registration.plans, registration.configuration, settings.num_val_iterations_per_epoch
    )
    counted = max(sum(voxels) for voxels in zip(message.tp, message.fp, message.fn, strict=True))
    if counted > largest:
        raise StatisticsError("more voxels were validated than so many batches of such patches have")


def _check_registration(key: ExchangeKey, site: str, message: messages.Registration, archive: Archive) -> None:
    plans_name = message.plans.get("plans_name")
    if not isinstance(plans_name, str) or not re.fullmatch(messages.SEGMENT_PATTERN.strip("^$"), plans_name):
        raise WireError(f"plans_name {str(plans_name)[:80]!r} in the plans cannot be part of a folder's name")
    named = messages.run_name(message.configuration, message.fold, message.trainer)
    if key.run not in (named, f"{named}.{plans_name}"):
        raise WireError(f"a registration for {named} was sent to the run {key.run}")
    planned = _planned_cases(site, archive)
    # What was registered before the software compared this is left alone: its run goes on.
    if planned is not None and message.num_training_cases > planned and not archive.has_contributed(str(key), site):
        raise WireError(
            f"site {site} registers {message.num_training_cases} training cases, and had {planned} cases "
            "in all when the fingerprints were pooled. Train with the dataset that was planned with, or "
            "plan with all cases in a new federation"
        )


def _planned_cases(site: str, archive: Archive) -> int | None:
    """Return how many cases a site had when it planned with the others; None if it has not."""
    for key in (CENSUS_KEY, late_census_key(site)):
        if archive.has_contributed(key, site):
            with archive.contribution(key, site) as document:
                return document.message.num_cases
    return None


def check_unchanged(key: ExchangeKey, site: str, message: messages.Message, archive: Archive) -> None:
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
    """The result of an exchange, which is in its place."""

    digest: str
    """Its SHA-256."""
    record: Mapping[str, Any] | None = None
    """What is to be remembered of a round or validation, as JSON, when its documents are gone."""
    remarks: tuple[str, ...] = ()
    """What the person at the coordinator should know of it, a line each."""


def close(exchange: Exchange, settings: FederationSettings, archive: Archive) -> Computed:
    """Compute the result of an exchange and write it to its place.

    Args:
        exchange: With the outcome that it will have; its contributors are those that count.

    Raises:
        FederationError: The contributions do not go together; the text is meant for all sites.
    """
    assert isinstance(exchange.outcome, Closed)
    with archive.contributions(exchange) as documents:
        if exchange.key.kind == "initial":
            return Computed(_close_initial(exchange, documents, archive))
        if exchange.key.kind == "round":
            return _close_round(exchange, documents, settings, archive)
        result = _compute_message(exchange.key, documents, settings, archive)
        remarks = _remarks(exchange.key, documents, result)
    record = None
    if isinstance(result, messages.PooledValidation):
        record = result.model_dump(mode="json")
        result = result.model_copy(update={"dice_of_site": {}, "loss_of_site": {}})  # not for the other sites
    return Computed(write_document(archive.result_path(str(exchange.key)), result, {}, []), record, remarks)


def _compute_message(
    key: ExchangeKey, documents: Mapping[str, Document], settings: FederationSettings, archive: Archive
) -> messages.Message:
    """Compute the result of an exchange whose result has no tensors."""
    contributed = {site: document.message for site, document in documents.items()}
    if key.kind == "census":
        return pool_census(contributed)
    if key.kind == "coarse":
        check_same_units({site: _geometry_of(message) for site, message in contributed.items()})
        return _wanted_bins(_pool_channels(documents.values(), "coarse"))
    if key.kind == "fine":
        return _pool_fingerprint(key, documents, archive)
    if key.kind == "plans":
        return agree_on_plans({site: message.plans for site, message in contributed.items()})
    if key.kind == "late_census":
        return _show_in(contributed, archive)
    if key.kind == "late_plans":
        before = archive.messages(prerequisite(key).text)
        return agree_on_plans({site: message.plans for site, message in {**before, **contributed}.items()})
    if key.kind == "validation":
        return pooled_validation.pool(
            key.number, contributed, before=archive.last_validation(key.run), min_sites=settings.min_sites
        )
    if key.kind == "admission":
        return _admit(key, contributed[key.site], archive)
    return match_registrations(contributed, settings)


def _admit(key: ExchangeKey, registration: messages.Registration, archive: Archive) -> messages.Match:
    registered = archive.registrations(key.run)
    if key.site in registered:
        raise RefusedError(f"site {key.site} takes part in run {key.run} already", code="already_closed")
    _check_compatible({**registered, key.site: registration})
    return late_join.admit(key.site, registration, archive.agreement(key.run).match, registered)


def pool_census(contributed: Mapping[str, messages.Census]) -> messages.PooledCensus:
    """Add up the cases, if channels and labels agree."""
    check_same_dataset(contributed)
    return messages.PooledCensus(num_cases=sum(census.num_cases for census in contributed.values()))


def _show_in(contributed: Mapping[str, messages.Census], archive: Archive) -> messages.PooledCensus:
    """Count the cases of the others, if the dataset of the site that comes late goes with theirs."""
    before = archive.messages(CENSUS_KEY)
    check_same_dataset({**before, **contributed})
    return pool_census(before)


def _pool_fingerprint(
    key: ExchangeKey, documents: Mapping[str, Document], archive: Archive
) -> messages.PooledFingerprint | messages.WantedBins:
    """Pool the fingerprint; or return other bins, if corrected histograms show that the percentiles lie in those."""
    following = parse_key(fine_key((key.number or 0) + 1))  # before which these histograms are the last
    with ExitStack() as stack:
        summaries = [stack.enter_context(archive.contribution(COARSE_KEY, site)).message for site in documents]
        coarse = [
            fingerprint_statistics.pool_histograms(_coarse_of(following, site, channel, archive) for site in documents)
            for channel in range(len(summaries[0].moments))
        ]
        wanted = _wanted_bins(coarse)
        if any(document.message.bins != wanted.bins for document in documents.values()):
            return wanted
        fingerprint = fingerprint_statistics.pool_fingerprint(
            summaries, coarse, _pool_channels(documents.values(), "fine")
        )
    return messages.PooledFingerprint(
        num_cases=sum(len(summary.spacings) for summary in summaries), fingerprint=fingerprint
    )


def _wanted_bins(coarse: Iterable[Any]) -> messages.WantedBins:
    return messages.WantedBins(bins=tuple(fingerprint_statistics.wanted_bins(histogram) for histogram in coarse))


def _pool_channels(documents: Iterable[Document], name: str) -> list[Any]:
    """Add up the histograms `<name>.<channel>` of all sites, channel by channel."""
    documents = list(documents)
    num_channels = sum(tensor.startswith(f"{name}.") for tensor in documents[0].specs)
    return [
        fingerprint_statistics.pool_histograms(document.read(f"{name}.{channel}") for document in documents)
        for channel in range(num_channels)
    ]


def _geometry_of(summary: messages.CoarseSummary) -> plausibility.Geometry:
    return plausibility.Geometry.of(summary.spacings, summary.shapes)


def check_same_units(geometries: Mapping[str, plausibility.Geometry]) -> None:
    """Raise RefusedError, naming the sites, if scans differ so much in size that their units must differ."""
    odd = {
        site: factor
        for site, factor in plausibility.factors_to_nearest(geometries).items()
        if plausibility.is_at_least(factor, plausibility.IMPOSSIBLE_FACTOR)
    }
    if odd:
        described = ", ".join(
            f"those of site {site} are {plausibility.describe_factor(factor)}" for site, factor in sorted(odd.items())
        )
        raise RefusedError(
            f"the scans cannot all have spacings in millimetres: in every direction and in voxel size, "
            f"{described} than those of any other site",
            "Look at the spacings in the images' headers at these sites, mend them, and plan again.",
            code="datasets_differ",
        )


# ------------------------------------------------------------------------------------------------------------ remarks
def _remarks(key: ExchangeKey, documents: Mapping[str, Document], result: messages.Message) -> tuple[str, ...]:
    """Say what the person at the coordinator should know of a result without tensors."""
    if key.kind == "coarse":
        return tuple(_remarks_on_geometry({site: _geometry_of(one.message) for site, one in documents.items()}))
    if key.kind in ("registration", "admission") and isinstance(result, messages.Match):
        return tuple(_remarks_on_match(key, {site: one.message for site, one in documents.items()}, result))
    return ()


def _remarks_on_geometry(geometries: Mapping[str, plausibility.Geometry]) -> Iterator[str]:
    for site, factor in sorted(plausibility.factors_to_nearest(geometries).items()):
        if plausibility.is_at_least(factor, plausibility.ODD_FACTOR):
            spacing, extent = (
                plausibility.in_mm(lengths) for lengths in (geometries[site].spacing, geometries[site].extent)
            )
            yield (
                f"the scans of site {site} are {plausibility.describe_factor(factor)} than those of any other site: "
                f"median spacing {spacing}, extent {extent}. Ask whether its units are right before anybody "
                "preprocesses"
            )


def _remarks_on_match(
    key: ExchangeKey, registered: Mapping[str, messages.Registration], match: messages.Match
) -> Iterator[str]:
    """Say what each site counts, and what only two of them have."""
    cases = {site: message.num_training_cases for site, message in registered.items()}
    weights = cases if match.weighting == "cases" else dict.fromkeys(cases, 1)
    counted = ", ".join(
        f"{site} {_cases(number)}"
        + (f" ({weights[site] / sum(weights.values()):.0%})" if key.kind == "registration" else "")
        for site, number in sorted(cases.items())
    )
    yield (
        f"run {key.run}: {counted}; sites count "
        f"{'by their training cases' if match.weighting == 'cases' else 'the same'}"
    )
    pairs = sum(len(sites) == 2 for sites in match.shared.values())
    if pairs and len(match.coverage) > 2:
        yield (
            f"run {key.run}: {pairs} of {len(match.shared)} shared tensors are those of two sites only, which can "
            "compute each other's: found federations with --min-sites 3 where that must not be"
        )


def _cases(number: int) -> str:
    return f"{number} training case{'' if number == 1 else 's'}"


def agree_on_plans(plans: Mapping[str, Mapping[str, Any]]) -> messages.PlansAgreement:
    """Return the digest of the plans that all sites hold, or raise RefusedError with the first difference."""
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
    return messages.PlansAgreement(digest=json_digest(next(iter(comparable.values()))))


def check_pretrained_weights(digests: Mapping[str, str | None]) -> None:
    """Raise RefusedError, saying who gave what, unless all sites start from the same weights or from random ones."""
    groups: dict[str | None, list[str]] = {}
    for site, digest in sorted(digests.items()):
        groups.setdefault(digest, []).append(site)
    if len(groups) > 1:
        given = "; ".join(
            f"{', '.join(sites)}: {'none' if digest is None else f'SHA-256 {digest[:12]}...'}"
            for digest, sites in groups.items()
        )
        raise RefusedError(
            f"the sites do not start from the same pretrained weights ({given})",
            "Give the same file as -pretrained_weights at all sites, or give none anywhere.",
            code="weights_differ",
        )


def match_registrations(
    contributed: Mapping[str, messages.Registration], settings: FederationSettings
) -> messages.Match:
    """Decide what the sites of a run share."""
    _check_compatible(contributed)
    check_pretrained_weights({site: message.pretrained_weights for site, message in contributed.items()})
    cases = {site: float(message.num_training_cases) for site, message in contributed.items()}
    try:
        matched = matching.match_tensors(
            {site: message.tensors for site, message in contributed.items()},
            rule=settings.matching,
            min_sites=settings.min_sites,
        )
    except MatchingError as error:
        raise RefusedError(str(error), code="nothing_shared") from error
    return messages.Match(
        rule=settings.matching,
        weighting=settings.weighting,
        precision=settings.precision,
        weights=dict.fromkeys(contributed, 1.0),
        num_epochs=settings.num_epochs,
        num_iterations_per_epoch=settings.num_iterations_per_epoch,
        num_val_iterations_per_epoch=settings.num_val_iterations_per_epoch,
        shared=matched.shared,
        initial_owner=matching.choose_owners(matched.shared, cases),
        coverage=matched.coverage,
    )


def _check_compatible(registered: Mapping[str, messages.Registration]) -> None:
    """Raise RefusedError unless datasets go together, and plans where a trainer wants them equal."""
    check_same_dataset({site: message.dataset_json for site, message in registered.items()})
    if any(message.requires_equal_plans for message in registered.values()):
        agree_on_plans({site: message.plans for site, message in registered.items()})


def check_same_dataset(described: Mapping[str, messages.Census | messages.TrainingData]) -> None:
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


def _close_initial(exchange: Exchange, documents: Mapping[str, Document], archive: Archive) -> str:
    match = archive.agreement(exchange.key.run).match
    owners = set(match.initial_owner.values())
    message = messages.Aggregate(
        round=None, missing=exchange.outcome.missing, contributors={site: 1.0 for site in documents if site in owners}
    )
    return weighted_mean.collect_from_owners(
        documents, match.initial_owner, message=message, out_path=archive.result_path(str(exchange.key))
    )


def _close_round(
    exchange: Exchange, documents: Mapping[str, Document], settings: FederationSettings, archive: Archive
) -> Computed:
    key, agreement = exchange.key, archive.agreement(exchange.key.run)
    weights = {site: agreement.weights[site] for site in documents}
    message = messages.Aggregate(
        round=key.number, missing=exchange.outcome.missing, contributors=dict.fromkeys(documents, 1.0)
    )
    measured = {
        site: document.message.model_dump(mode="json", include={"metrics", "earlier"})
        for site, document in documents.items()
    }
    before = round_key(key.run, key.number - 1) if key.number else initial_key(key.run)
    with archive.result(before) as previous:
        done = weighted_mean.aggregate_documents(
            documents,
            weights,
            message=message,
            previous=previous,
            out_path=archive.result_path(str(key)),
            precision=agreement.match.precision,
            min_sites=settings.min_sites,
        )
    remarks = (
        ()
        if not done.kept
        else (
            f"run {key.run}, round {key.number}: {len(done.kept)} tensors keep their values, since fewer than "
            f"{settings.min_sites} of the sites that have them took part: {', '.join(done.kept[:3])}"
            f"{', ...' if len(done.kept) > 3 else ''}",
        )
    )
    return Computed(done.digest, record_of_round(exchange, weights, measured, settings, done), remarks)


def record_of_round(
    exchange: Exchange,
    weights: Mapping[str, float],
    measured: Mapping[str, Mapping[str, Any]],
    settings: FederationSettings,
    done: weighted_mean.Aggregated,
) -> dict[str, Any]:
    """Return what is remembered of a round: who contributed what, when, with which weight, how far, and what held.

    Args:
        measured: Site -> the metrics of its update, and those of an earlier round that came with it. They stay here:
            the other sites do not see them.
    """
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
        "closed": exchange.outcome.time,
        "digest": done.digest,
        "sites": contributed,
        "missing": list(exchange.outcome.missing),
        "failed": sorted(exchange.excused & set(exchange.outcome.missing)),
        "outliers": weighted_mean.outliers(done.changes),
        "kept": len(done.kept),
        "settings": settings.model_dump(mode="json", exclude={"federation", "sites"}),
    }
