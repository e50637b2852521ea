"""Plan from the pooled fingerprint of all sites: Federated Fingerprint Extraction.

Three short exchanges, none of which carries an image or says where a voxel lies:

    census    number of cases, channels, labels          -> number of all cases
    coarse    geometry, moments, 65536-bin histograms    -> the bins that hold the wanted ranks
    fine      histograms inside those bins               -> the pooled fingerprint

The outermost values of a site are counted farther out, so that its smallest and largest voxel stay there; where that
would change a percentile, the third exchange is repeated (`federated/aggregation/outermost.py`).

A site that comes after that sends its census only, and plans from the pooled fingerprint of the others.

The number of cases comes first because nnU-Net draws 1e8 / cases foreground voxels per case. The result equals, to the
bit for all order statistics, that of `nnUNetv2_extract_fingerprint` where all data lie in one place.

Method: Skorupko et al., Scientific Reports 15:38312 (2025), with exact pooling in the place of averages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import numpy as np

from nnunetv2.experiment_planning.dataset_fingerprint.case_sample import CaseSample
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.secure_planning import SecurePooling, check_extrema_stay
from nnunetv2.experiment_planning.site_cases import (
    compare_geometry,
    intensities_per_channel,
    make_census,
    sample_locally,
)
from nnunetv2.federated.aggregation import fingerprint_statistics, outermost
from nnunetv2.federated.errors import FederationError, RefusedError, WireError
from nnunetv2.federated.exchanges.label_union import check_union
from nnunetv2.federated.privacy.min_cases import check_enough_cases
from nnunetv2.federated.privacy.own_networks import name_to_compare, plans_to_compare
from nnunetv2.federated.privacy.require_secure import check_settings
from nnunetv2.federated.protocol import keys, messages
from nnunetv2.federated.site import results
from nnunetv2.federated.site.credential import SiteCredential, load_credential
from nnunetv2.federated.site.transport import Transport, open_transport, show_progress
from nnunetv2.plans.partial_labels import with_union
from nnunetv2.preprocessed_data.fingerprint_files import (
    FINGERPRINT_FILE,
    forget_pooled_fingerprint,
    has_pooled_fingerprint,
)
from nnunetv2.utilities.atomic_write import save_json_atomically
from nnunetv2.utilities.plain_text import show

T = TypeVar("T")
Answer = messages.PooledFingerprint | messages.WantedBins
MOST_LOOKS = outermost.MOST_LOOKS


@dataclass(frozen=True, kw_only=True)
class PlanningOptions:
    """The options of planning as a member of a federation."""

    mode: Literal["ffe", "asym"]
    """"ffe" plans from the pooled fingerprint, so that all sites hold the same plans, or, where the federation wants
    it, agree on the entries that the data decide; "asym" plans from the local one, so that the sites' networks may
    differ."""
    extractor_class: type = DatasetFingerprintExtractor
    num_processes: int | None = 8
    """That extract the fingerprint; None: as many as the machine has cores and memory for."""
    clean: bool = True
    """With "asym", extract the fingerprint even if there is one. "ffe" samples the local data in any case."""
    share_extrema: bool = False
    """Let the smallest and largest voxel leave the site too. Nothing in nnU-Net needs them."""
    show_progress_bar: bool = True
    verbose: bool = False
    planner: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of `plan_experiment_dataset`."""


def plan_federated(dataset_id: int | str, options: PlanningOptions, *, credential_file: Path | None = None) -> str:
    """Plan one dataset as a member of a federation.

    Args:
        credential_file: The site's credential; the one that `nnUNet_fed_site` names, if None.

    Returns:
        The name of the plans.

    Raises:
        NotJoinedError: The site has not joined a federation.
        NotAllowedError: The site has fewer cases than it wants to take part with; nothing was sent.
        RefusedError: The sites' channels, labels or plans differ.
    """
    from nnunetv2.experiment_planning.planning import plan_experiment_dataset

    credential = load_credential(credential_file)
    extractor = options.extractor_class(dataset_id, options.num_processes, verbose=options.verbose)
    extractor.show_progress_bar = options.show_progress_bar
    if options.mode == "asym":
        folder = Path(extractor.output_folder)
        joint = _settle_classes(extractor, credential, credential_file) if credential.labels == "union" else {}
        extractor.run(overwrite_existing=options.clean or has_pooled_fingerprint(folder))
        forget_pooled_fingerprint(folder)
        return plan_experiment_dataset(dataset_id, **options.planner, **joint)[1]
    check_enough_cases(extractor.count_cases(), extractor.dataset_name)
    with open_transport(credential, show_progress) as transport:
        settings = transport.settings()
        check_settings(settings, credential.secure)
        check_extrema_stay(settings, share_extrema=options.share_extrema)
        census = make_census(extractor, share_extrema=options.share_extrema)
        pooling = None
        if settings.secure is not None:
            pooling = SecurePooling(transport, settings.secure, credential, credential_file, networks=settings.networks)
            census = pooling.with_keys(census)
        joint = _with_all_classes(transport, extractor, census, credential.site) if settings.labels == "union" else {}
        if pooling is None:
            num_cases = pool_fingerprint(transport, extractor, census, site=credential.site)
        else:
            num_cases = pool_secure_fingerprint(pooling, extractor, census, options.planner)
        plans, plans_name = plan_experiment_dataset(dataset_id, **options.planner, **joint)
        compared = plans_to_compare(json.loads(json.dumps(plans)), settings.networks)  # as in the file: no tuples
        report, name = messages.PlansReport(plans=compared), name_to_compare(plans_name, settings.networks)
        _or_late(
            lambda: transport.exchange(keys.PlansKey(name), report),
            lambda: transport.exchange(keys.LatePlansKey(name, credential.site), report),
        )
        show(
            f"All sites hold the same plans, {plans_name}, made from {num_cases} cases."
            if settings.networks == "equal"
            else f"Axes, spacings, normalization and resampling in {plans_name} are those of all sites, made from "
            f"{num_cases} cases; network, patch and batch are this site's own."
        )
    return plans_name


def _settle_classes(extractor: Any, credential: SiteCredential, credential_file: Path | None) -> dict[str, Any]:
    """Return dataset.json with the classes of all sites, as a keyword of planning; all else a site plans alone."""
    check_enough_cases(extractor.count_cases(), extractor.dataset_name)
    with open_transport(credential, show_progress) as transport:
        settings = transport.settings()
        check_settings(settings, credential.secure)
        census = make_census(extractor, share_extrema=False)
        if settings.secure is not None:
            census = SecurePooling(transport, settings.secure, credential, credential_file).with_keys(census)
        return _with_all_classes(transport, extractor, census, credential.site)


def _with_all_classes(transport: Transport, extractor: Any, census: messages.Census, site: str) -> dict[str, Any]:
    """Return the same after a census of all sites, and show who annotates which classes."""
    pooled = _or_late(
        lambda: transport.exchange(keys.CensusKey(), census).message,
        lambda: transport.exchange(keys.LateCensusKey(site), census).message,
    )
    labels = check_union(pooled.labels, pooled.annotators, census.labels)
    for name, number in pooled.annotators.items():
        here = "" if name in census.labels else "not "
        sites = f"{number} site{'' if number == 1 else 's'}"
        show(f"Class {labels[name]}, {name}: annotated at {sites}, {here}here.", flush=True)
    return {"dataset_json": with_union(extractor.dataset_json, labels)}


def pool_fingerprint(transport: Transport, extractor: Any, census: messages.Census, *, site: str) -> int:
    """Learn the pooled fingerprint, and write it beside the local one.

    Args:
        site: Name of this site.

    Returns:
        The number of cases in it: of all sites together, or of the others where they had pooled theirs before.
    """
    pooled = _or_late(
        lambda: _take_part(transport, extractor, census), lambda: _come_late(transport, extractor, census, site)
    )
    results.check_fingerprint(pooled, len(census.channel_names))
    save_json_atomically(pooled.fingerprint, Path(extractor.output_folder) / FINGERPRINT_FILE)
    return pooled.num_cases


def pool_secure_fingerprint(
    pooling: SecurePooling, extractor: Any, census: messages.Census, planner: Mapping[str, Any]
) -> int:
    """Learn the pooled fingerprint by masked sums; see `pool_fingerprint`. The census has this site's key."""
    return _or_late(
        lambda: pooling.take_part(extractor, census, planner), lambda: pooling.come_late(extractor, census, planner)
    )


def _or_late(take_part: Callable[[], T], come_late: Callable[[], T]) -> T:
    """Take part in an exchange, or come late if it is closed."""
    try:
        return take_part()
    except RefusedError as error:
        if error.code != "closed_without":
            raise
    return come_late()


def _take_part(transport: Transport, extractor: Any, census: messages.Census) -> messages.PooledFingerprint:
    """Exchange summaries until the pooled fingerprint is known."""
    num_cases = transport.exchange(keys.CensusKey(), census).message.num_cases
    if num_cases < census.num_cases:
        raise WireError(
            f"the coordinator counts {num_cases} cases of all sites; this site alone has {census.num_cases}"
        )
    samples = sample_locally(extractor, num_cases)
    values = intensities_per_channel(samples)
    others = extractor.num_samples_per_case(num_cases) * (num_cases - census.num_cases)
    summary = summarise(samples, values, share_extrema=census.share_extrema)
    channels = [outermost.Channel.of(*channel, hide=not census.share_extrema) for channel in values]
    coarse = {f"coarse.{c}": channel.coarse_histogram() for c, channel in enumerate(channels)}
    answer: Answer = transport.exchange(keys.CoarseKey(), summary, coarse).message
    for number in range(MOST_LOOKS):
        if not isinstance(answer, messages.WantedBins):
            results.check_fingerprint(answer, len(channels))
            compare_geometry(summary.spacings, summary.shapes, answer)
            return answer
        results.check_bins(answer, len(channels))
        channels, answer = _look_into(transport, number, values, channels, answer.bins, others)
    raise FederationError(
        f"the coordinator wants to look into the intensities for the {MOST_LOOKS + 1}th time, which "
        "no percentile needs: nothing more is sent. Ask the coordinating site which version it runs"
    )


def _look_into(
    transport: Transport,
    number: int,
    values: Sequence[tuple[np.ndarray, np.ndarray]],
    channels: Sequence[outermost.Channel],
    bins: tuple[tuple[int, ...], ...],
    others: int,
) -> tuple[list[outermost.Channel], Answer]:
    """Send histograms inside some bins; return corrected channels and the answer.

    Args:
        number: How often that was done before.
        values: Per channel, values and how often each occurs.
        channels: Per channel, the histogram of these as the coordinator has it.
        bins: Per channel, the bins that it wants to look into.
        others: How many values the other sites may have together.
    """
    for channel, wanted in zip(channels, bins):
        channel.check_wanted_bins(wanted, others)
    shown = [channel.showing(wanted) for channel, wanted in zip(channels, bins)]
    corrected = tuple(c for c, channel in enumerate(shown) if channel is not channels[c])
    if corrected:
        show(
            "A percentile of all sites' intensities lies among this site's outermost values, in channel "
            f"{', '.join(map(str, corrected))}: more of these values are counted where they are, "
            f"{' and '.join(_describe_hidden(shown[c]) for c in corrected)} stay hidden.",
            flush=True,
        )
    histograms = {
        f"fine.{c}": fingerprint_statistics.fine_histogram(channel[0], bins[c], channel[1])
        for c, channel in enumerate(values)
    }
    histograms |= {f"coarse.{c}": shown[c].coarse_histogram() for c in corrected}
    summary = messages.FineSummary(bins=bins, corrected=corrected)
    try:
        answer = transport.exchange(keys.FineKey(number), summary, histograms)
    except RefusedError as error:
        if corrected and error.code == "invalid":
            raise FederationError(
                "a percentile of all sites' intensities lies among this site's outermost values, and "
                "the coordinator's version is too old to find it without the smallest or largest "
                "voxel of this site: update the coordinator, or plan in a new federation with "
                "--share_extrema at this site"
            ) from error
        raise
    return shown, answer.message


def _describe_hidden(channel: outermost.Channel) -> str:
    return f"{channel.lowest:,} at the lower and {channel.highest:,} at the upper end"


def _come_late(transport: Transport, extractor: Any, census: messages.Census, site: str) -> messages.PooledFingerprint:
    """Wait for the fingerprint that the other sites pool without this one."""
    num_cases = transport.exchange(keys.LateCensusKey(site), census).message.num_cases
    show(
        f"The other sites had begun to pool their fingerprints before this one came: its own {census.num_cases} "
        f"cases are not part of the plans, which are made from {num_cases} cases of the others.",
        flush=True,
    )
    sample_locally(extractor, num_cases)
    answer: Answer = transport.result(keys.CoarseKey()).message
    for number in range(MOST_LOOKS):  # in order: none can begin before the one before it is closed
        if not isinstance(answer, messages.WantedBins):
            return answer
        answer = transport.result(keys.FineKey(number)).message
    raise FederationError("the other sites find no percentiles of their intensities: use matching versions")


def summarise(
    samples: Sequence[CaseSample], intensities: Sequence[tuple[np.ndarray, np.ndarray]], *, share_extrema: bool
) -> messages.CoarseSummary:
    """Summarise the cases of this site; their order does not leave it."""
    spacings, shapes = fingerprint_statistics.sorted_geometry(
        [sample.spacing for sample in samples], [sample.shape_after_crop for sample in samples]
    )
    moments = [fingerprint_statistics.Moments.of(values, counts) for values, counts in intensities]
    has_foreground = all(len(values) for values, _ in intensities)
    extrema = (
        tuple((float(values.min()), float(values.max())) for values, _ in intensities)
        if share_extrema and has_foreground
        else None
    )
    return messages.CoarseSummary(
        # Three numbers each: the message refuses others.
        spacings=cast("tuple[messages.Spacing, ...]", spacings),
        shapes=cast("tuple[messages.Shape, ...]", shapes),
        relative_sizes=tuple(sorted(sample.relative_size for sample in samples)),
        moments=tuple(messages.ChannelMoments(count=m.count, mean=m.mean, m2=m.m2) for m in moments),
        promotes_to_float64=not all(sample.has_foreground for sample in samples),
        extrema=extrema,
    )
