"""Plan the masked sums of a run: groups of tensors, figures, counts of a validation.

Sites and coordinator compute this each for itself, from common inputs: the match of the run, the aggregate that a round
starts from, and the cohort that its message names. Where inputs differ, masks do not cancel.

Tensors are summed in groups, each of those that exactly the same sites of the cohort hold. Groups of fewer sites than k
are not sent: their tensors keep their values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from nnunetv2.federated.errors import RefusedError, WireError
from nnunetv2.federated.exchanges.masked_codecs import masked_codec_of
from nnunetv2.federated.privacy.secure_aggregation.key_agreement import digest_of
from nnunetv2.federated.privacy.secure_aggregation.protocol import Cohort, Lane, check_size, threshold_of
from nnunetv2.federated.protocol.api import FederationSettings, SettingsChange
from nnunetv2.federated.protocol.document import TensorSpec
from nnunetv2.federated.protocol.keys import RoundKey, ValidationKey
from nnunetv2.federated.protocol.messages import Match, NextRound, SignedKey
from nnunetv2.federated.protocol.secure_messages import MAX_GROUPS
from nnunetv2.federated.protocol.strict_json import canonical_json

CHANGES = "changes"
"""Lane of every update: how far a site has moved, and 1 if that is conspicuous."""
TRAINING, VALIDATED, EARLIER = "training", "validated", "earlier"
"""Lanes of figures that may come with an update: of its own round, and of the validation of the one before."""
FIGURES = {
    TRAINING: ("train_losses",),
    VALIDATED: ("val_losses", "mean_fg_dice"),
    EARLIER: ("val_losses", "mean_fg_dice"),
}
"""Lane -> metrics whose means over the training cases the coordinator learns."""
COUNTS, LOSS = "counts", "loss"
"""Lanes of a validation: TP, FP and FN per class, and the loss. Where sites annotate different classes, there is a lane
of counts for each set of sites that annotate the same, and its name goes on with a digest of theirs."""
OPTIONAL = frozenset({*FIGURES, LOSS})
"""A site that has no such figure does not send the lane; all others it sends."""


@dataclass(frozen=True)
class SecureSum:
    """Masked sums, as sites and coordinator know them before anything is sent."""

    cohort: Cohort
    lanes: tuple[Lane, ...]
    least: int
    """Sites that every sum is to have."""
    weights: Mapping[str, int] = field(default_factory=dict)
    """Site -> its weight. Sites know only their own."""
    starts: tuple[tuple[tuple[str, ...], bytes], ...] = ()
    """Sites, and the digest of the inputs that exactly they have in common, as far as it is known."""

    def common(self, site: str) -> dict[str, bytes]:
        """Return, per other site, the digest of the inputs common to both."""
        return {
            other: digest_of(*(digest for holders, digest in self.starts if {site, other} <= {*holders}))
            for other in self.cohort.sites
        }

    def lane(self, name: str) -> Lane:
        """Return a lane by its name."""
        return next(lane for lane in self.lanes if lane.name == name)

    def held_by(self, site: str) -> tuple[Lane, ...]:
        """Return the lanes that a site may send."""
        return tuple(lane for lane in self.lanes if site in lane.holders)


# --------------------------------------------------------------------------------------------------------- settings
def check_secure_settings(settings: FederationSettings) -> None:
    """Raise RefusedError if settings do not go with masked updates, where these are wanted."""
    if settings.secure is None:
        return
    check_size(len(settings.sites))
    if settings.secure.k > len(settings.sites):
        raise RefusedError(
            f"--secure {settings.secure.k} is more than the {len(settings.sites)} sites: nothing could be added up",
            f"Choose a number from 3 to {len(settings.sites)}.",
            code="min_sites_below_k",
        )
    if settings.min_sites < settings.secure.k:
        raise RefusedError(
            f"--min-sites {settings.min_sites} is less than --secure {settings.secure.k}: nothing is added up over "
            "fewer sites",
            "Leave --min-sites out.",
            code="min_sites_below_k",
        )
    threshold = threshold_of(len(settings.sites))
    if settings.quorum is not None and settings.quorum < threshold:
        raise RefusedError(
            f"--quorum {settings.quorum} is less than the {threshold} of {len(settings.sites)} sites that it takes to "
            "unmask a sum",
            f"Choose a quorum of {threshold} or more.",
            code="quorum_below_threshold",
        )
    if settings.precision == "int8":
        raise RefusedError(
            "--precision int8 does not go with --secure: a sum of masked updates needs the 16 bits that they have",
            "Choose float32 or float16.",
        )
    if settings.precision == "float16" and settings.keep_local is not None:
        raise RefusedError(
            f"--keep-local {settings.keep_local} does not go with --secure and --precision float16: masked changes of "
            "16 bits are cut, and tensors that a site keeps may be farther from their average than that",
            "Leave --precision out.",
        )
    if settings.late_updates == "carry":
        raise RefusedError(
            "--late-updates carry does not go with --secure: what a site has masked belongs to its round",
            "Leave it out: late updates are dropped.",
            code="late_updates_masked",
        )


# ----------------------------------------------------------------------------------------------------------- groups
@dataclass(frozen=True)
class Group:
    """Tensors that exactly the same sites hold."""

    name: str
    """16 digits of the SHA-256 of these sites' names."""
    holders: tuple[str, ...]
    tensors: tuple[str, ...]
    """Their canonical names, sorted."""


def groups_of(shared: Mapping[str, Collection[str]], cohort: Iterable[str], *, least: int) -> tuple[Group, ...]:
    """Group shared tensors by the sites of a cohort that hold them.

    Args:
        shared: Canonical name -> sites, as in a match.
        least: Groups of fewer sites are left out.
    """
    present = frozenset(cohort)
    tensors: dict[tuple[str, ...], list[str]] = {}
    for name in sorted(shared):
        holders = tuple(sorted(present.intersection(shared[name])))
        if len(holders) >= least:
            tensors.setdefault(holders, []).append(name)
    named = {digest_of(*(site.encode() for site in holders)).hex()[:16]: holders for holders in tensors}
    return tuple(Group(name, holders, tuple(tensors[holders])) for name, holders in sorted(named.items()))


def check_groups(shared: Mapping[str, Mapping[str, str]]) -> None:
    """Raise RefusedError if more sets of sites share tensors than can be summed apart."""
    found = len({tuple(sorted(sites)) for sites in shared.values()})
    if found > MAX_GROUPS:
        raise RefusedError(
            f"{found} different sets of sites share tensors; masked updates are summed for {MAX_GROUPS} at most",
            "Plan with --federated at all sites, so that their networks are the same.",
            code="too_many_groups",
        )


def sites_that_differ(match: Match, cohort: Iterable[str]) -> tuple[str, ...]:
    """Return the sites of a cohort that lack a tensor which others of it get.

    They cannot compare it: a coordinator that lies could send bad values of it to all that have it, so that these learn
    nothing, and their part of a sum would be known.
    """
    present = frozenset(cohort)
    found = [sites & present for sites in match.receivers().values()]
    return tuple(sorted({site for sites in found if sites for site in present - sites}))


def match_digest(match: Match, cohort: Iterable[str]) -> bytes:
    """Return the digest of all that a match says of the sites of a cohort.

    Sites that were told different things would not compare the same tensors.
    """
    present = frozenset(cohort)

    def of_cohort(names: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        found = {name: {site: sites[site] for site in sites if site in present} for name, sites in names.items()}
        return {name: sites for name, sites in found.items() if sites}

    about = {
        **match.model_dump(mode="json", include={"rule", "weighting", "precision", "exchange_every"}),
        "shared": of_cohort(match.shared),
        "received": of_cohort(match.received),
        "annotated": {site: list(match.annotated[site]) for site in sorted(present & match.annotated.keys())},
    }
    return digest_of(canonical_json(about))


# ----------------------------------------------------------------------------------------------------------- rounds
@dataclass(frozen=True)
class RoundPlan:
    """The sums of one round of a run."""

    sum: SecureSum
    groups: tuple[Group, ...]
    exponents: Mapping[str, int]
    """Tensor -> the exponent that bounds it; see `MaskedCodec`."""
    weight_bits: int
    typical_change: float | None

    def group(self, name: str) -> Group:
        """Return a group by its name."""
        return next(group for group in self.groups if group.name == name)


def plan_round(
    key: RoundKey,
    *,
    federation: str,
    match: Match,
    specs: Mapping[str, TensorSpec],
    begin: NextRound,
    least: int,
    read: Callable[[str], np.ndarray],
    read_before: Callable[[str], np.ndarray] | None,
    weights: Mapping[str, int],
    training: bytes = b"",
) -> RoundPlan:
    """Plan the sums of a round.

    Args:
        match: Of the run, with the sites that were admitted.
        specs: Canonical name -> dtype and shape, of the tensors that the caller knows. Lanes of others have no size.
        begin: From the aggregate that the round starts from.
        least: Sites that every sum is to have.
        read: Canonical name -> values of that aggregate, as sites download them.
        read_before: The same of the aggregate before it; None if there is none.
        weights: Site -> its weight, as far as it is known.
        training: Digest of all else that decides the training of the cohort; sites only.
    """
    codec, cohort = masked_codec_of(match.precision), cohort_of(federation, str(key), match.keys, begin.cohort)
    exponents: dict[str, int] = {}
    digests: dict[str, bytes] = {}
    for name in sorted(match.shared.keys() & specs.keys()):
        values = read(name)
        exponents[name] = codec.exponent(values, None if read_before is None else read_before(name))
        digests[name] = digest_of(str(exponents[name]).encode(), _digest_of(name, values))
    lanes = [
        Lane(CHANGES, cohort.sites, "U64", 2, str(begin.typical_change).encode()),
        *(Lane(name, cohort.sites, "U64", len(metrics)) for name, metrics in FIGURES.items()),
    ]
    groups, scale = groups_of(match.shared, begin.cohort, least=least), str(begin.weight_bits).encode()
    for group in groups:
        known = [name for name in group.tensors if name in specs]
        reference = digest_of(scale, *(digests[name] for name in known)) if known else b""
        lanes.append(Lane(group.name, group.holders, codec.dtype, sum(specs[name].size for name in known), reference))
    starts = ((cohort.sites, digest_of(training, scale)), *_starts(match, cohort, digests))
    secure_sum = SecureSum(cohort, tuple(lanes), least, dict(weights), starts)
    return RoundPlan(secure_sum, groups, exponents, begin.weight_bits, begin.typical_change)


def _starts(match: Match, cohort: Cohort, digests: Mapping[str, bytes]) -> Iterator[tuple[tuple[str, ...], bytes]]:
    """Yield which sites get tensors in common, also those that some of them do not send, and a digest of these."""
    for group in groups_of(match.receivers(), cohort.sites, least=2):
        known = [digests[name] for name in group.tensors if name in digests]
        if known:
            yield group.holders, digest_of(*known)


def _digest_of(name: str, values: np.ndarray) -> bytes:
    """Return the digest of a tensor and its name."""
    held = np.ascontiguousarray(values)
    digest = hashlib.sha256(digest_of(name.encode(), held.dtype.str.encode()))
    digest.update(held.reshape(-1).view(np.uint8).data)
    return digest.digest()


def cohort_of(federation: str, exchange: str, keys: Mapping[str, SignedKey], sites: Iterable[str]) -> Cohort:
    """Return the cohort of these sites, with the keys that they have handed in.

    Raises:
        WireError: One of them has none.
    """
    names = sorted(sites)
    if missing := [site for site in names if site not in keys]:
        raise WireError(f"site {missing[0]} is to mask in {exchange}, and has handed in no key")
    return Cohort(
        federation,
        exchange,
        {site: bytes.fromhex(keys[site].exchange_key) for site in names},
        {site: bytes.fromhex(keys[site].identity) for site in names},
    )


def bits_of(weights: Iterable[float]) -> int:
    """Return the number of bits of the sum of weights."""
    return max(1, round(sum(weights)).bit_length())


# ------------------------------------------------------------------------------------------------------ validations
def plan_validation(
    key: ValidationKey,
    *,
    federation: str,
    match: Match,
    sites: Iterable[str],
    num_classes: int,
    least: int,
    weights: Mapping[str, int],
    validated: Mapping[str, np.ndarray] = MappingProxyType({}),
    training: bytes = b"",
) -> SecureSum:
    """Plan the sums of the validation of a round's aggregate.

    Args:
        sites: The contributors of the round.
        num_classes: Classes or regions that are counted; see `num_classes_of`.
        validated: Canonical name -> values of the aggregate, as a site has downloaded them; sites only.
        training: See `plan_round`; sites only.
    """
    cohort = cohort_of(federation, str(key), match.keys, sites)
    counted = (
        Lane(group.name, group.holders, "U64", 3 * len(group.classes))
        for group in count_groups(match, cohort.sites, num_classes, least=least)
    )
    lanes = (*counted, Lane(LOSS, cohort.sites, "U64", 1))
    digests = {name: _digest_of(name, values) for name, values in validated.items()}
    starts = ((cohort.sites, training), *_starts(match, cohort, digests))
    return SecureSum(cohort, lanes, least, dict(weights), starts)


@dataclass(frozen=True)
class CountGroup:
    """Classes that exactly the same sites annotate."""

    name: str
    """Of its lane."""
    holders: tuple[str, ...]
    classes: tuple[int, ...]
    """Their places among the foreground classes."""


def count_groups(match: Match, cohort: Iterable[str], num_classes: int, *, least: int) -> tuple[CountGroup, ...]:
    """Group the classes of a validation by the sites of a cohort that annotate them.

    Args:
        least: Classes that fewer sites annotate are left out: their counts would be those of too few.
    """
    present = tuple(sorted(cohort))
    if not match.annotated:
        return (CountGroup(COUNTS, present, tuple(range(num_classes))),)
    classes: dict[tuple[str, ...], list[int]] = {}
    for place in range(num_classes):
        holders = tuple(site for site in present if place + 1 in match.annotated.get(site, ()))
        if len(holders) >= least:
            classes.setdefault(holders, []).append(place)
    return tuple(
        CountGroup(f"{COUNTS}-{digest_of(*(site.encode() for site in holders)).hex()[:16]}", holders, tuple(places))
        for holders, places in sorted(classes.items())
    )


def check_count_groups(annotated: Mapping[str, Iterable[int]]) -> None:
    """Raise RefusedError if more sets of sites annotate classes than can be counted apart."""
    everything = {label for labels in annotated.values() for label in labels}
    found = len({frozenset(site for site, labels in annotated.items() if label in labels) for label in everything})
    if found > MAX_GROUPS:
        raise RefusedError(
            f"{found} different sets of sites annotate classes; masked counts are summed for {MAX_GROUPS} at most",
            "Found a federation of sites that annotate more of the same classes.",
            code="too_many_groups",
        )


def training_digest(settings: FederationSettings) -> bytes:
    """Return the digest of all settings that a federation has fixed for its sites.

    They decide how much a site trains, validates and counts: where the others were told to move next to nothing, a sum
    would be that of one site.
    """
    fixed = settings.model_dump(mode="json", exclude={"sites", *SettingsChange.model_fields})
    return digest_of(canonical_json(fixed))


def num_classes_of(labels: Mapping[str, int | tuple[int, ...]]) -> int:
    """Return the number of classes or regions that a validation counts.

    Those are all but background and the ignore label.

    Args:
        labels: As in dataset.json.
    """
    values = [one if isinstance(one, tuple) else (one,) for name, one in labels.items() if name != "ignore"]
    if any(len(value) > 1 for value in values):
        return sum(value != (0,) for value in values)
    return len({value[0] for value in values} - {0})
