"""Register the sites of a run, and match their tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from nnunetv2.federated.aggregation import matching
from nnunetv2.federated.aggregation.given_weights import given_names
from nnunetv2.federated.aggregation.head_rows import row_of
from nnunetv2.federated.errors import MatchingError, RefusedError, WireError
from nnunetv2.federated.exchanges import document_limits
from nnunetv2.federated.exchanges.documents import DocumentReader
from nnunetv2.federated.exchanges.exchange import Policy
from nnunetv2.federated.exchanges.label_union import OPTION
from nnunetv2.federated.exchanges.secure_sums import check_count_groups, check_groups
from nnunetv2.federated.exchanges.steps.base import LARGEST_MESSAGE, Step, comparable, messages_of
from nnunetv2.federated.exchanges.steps.census import check_same_dataset, planned_cases, settled_labels
from nnunetv2.federated.exchanges.steps.plans import agree_on_plans, check_equal
from nnunetv2.federated.privacy.identities import check_run_keys
from nnunetv2.federated.privacy.own_networks import data_part_of_training, plans_to_register
from nnunetv2.federated.privacy.plans_redaction import WITHHELD
from nnunetv2.federated.privacy.secure_aggregation.protocol import check_size
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.document import Document, Limits, TensorSpec
from nnunetv2.federated.protocol.keys import InitialKey, RegistrationKey, RunKey, run_name
from nnunetv2.federated.protocol.messages import NEW_IN_REGISTRATION, SEGMENT_PATTERN, Match, Networks, Registration
from nnunetv2.utilities.plain_text import printable

PROMISED = ("unit", "epsilon", "delta", "uncovered")
"""Fields of a privacy declaration that a site cannot change later: others have taken part trusting in them."""
K = TypeVar("K", bound=RunKey[Registration, Match])


class MembershipStep(Step[K, Registration, Match]):
    """Base of the two steps by which sites become members of a run."""

    contribution, results = Registration, (Match,)
    header = document_limits.REGISTRATION

    def check(
        self, key: K, site: str, document: Document[Registration], reader: DocumentReader, settings: FederationSettings
    ) -> None:
        """Raise WireError unless a registration belongs to this run and its data."""
        check_registration(key, site, document.message, reader)
        check_has_own_network(site, document.message, settings)
        check_annotations(site, document.message, settings, reader)
        if not reader.has_contributed(key, site):  # a repeated registration is compared
            check_run_key(key, site, document.message, settings)

    def check_unchanged(self, key: K, site: str, message: Registration, reader: DocumentReader) -> None:
        """Raise RefusedError, naming the difference, unless a site repeats its registration."""
        with reader.contribution(key, site) as held:
            before, now = held.message.keys, message.keys
        if before is not None and now is not None and before != now:
            what = "identity" if before.identity != now.identity else "run key"
            raise RefusedError(
                f"site {site} comes to {key.run} with another {what} than it has registered with, and the others mask "
                "for that one",
                "Bring back what lay beside its credential (.identity.pem, .secure). Else this run goes on without the "
                "site; it can take part in others.",
                code="already_closed",
            )
        super().check_unchanged(key, site, message, reader)

    def compared(
        self, key: K, before: Registration, now: Registration, reader: DocumentReader
    ) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Return the fields that must agree in two registrations of a site.

        Versions of the software may word one differently: extrema of voxels, and fields that only one of them has, do
        not count. Nor do the weights that a training starts from, once the initial ones are settled, nor the noise by
        which a site keeps to the privacy that it has declared.
        """
        earlier, later = comparable(before), comparable(now)
        for name in NEW_IN_REGISTRATION:
            is_settled = name == "pretrained_weights" and reader.is_closed(InitialKey(key.run))
            is_unknown = name not in ("pretrained_weights", "privacy") and not (name in earlier and name in later)
            if is_settled or is_unknown or name == "trust":  # which a site may change at any time
                earlier.pop(name, None), later.pop(name, None)
        for content in (earlier, later):
            if content.get("privacy"):
                content["privacy"] = {name: content["privacy"][name] for name in PROMISED}
        return earlier, later

    def result_limits(self, num_cases: int | None) -> Limits:
        """Return the limits of a match."""
        return document_limits.MATCH

    def largest_result(self, weights: int) -> int:
        """Return how many bytes a match may have."""
        return LARGEST_MESSAGE


class RegistrationStep(MembershipStep[RegistrationKey]):
    """The sites of a run register, and learn their shared tensors."""

    key = RegistrationKey
    policy = Policy(pooled=True, missable=True, compared=True, settles_members=True, stops_with_run=True)

    def pool(
        self,
        key: RegistrationKey,
        documents: Mapping[str, Document[Registration]],
        settings: FederationSettings,
        reader: DocumentReader,
    ) -> Match:
        """Return the match of the sites."""
        contributed = messages_of(documents)
        match = match_registrations(contributed, settings)
        if settings.initial_weights is not None:
            with reader.given_weights(settings.initial_weights) as weights:
                check_given_weights(match, contributed, weights.specs)
        return match

    def remarks(
        self, key: RegistrationKey, documents: Mapping[str, Document[Registration]], result: Match
    ) -> Iterator[str]:
        """Return lines on weights of sites, tensors of two, and classes of too few."""
        registered = messages_of(documents)
        yield from remarks_on_match(key, registered, result, with_shares=True)
        yield from remarks_on_classes(key, registered, result)


def match_registrations(contributed: Mapping[str, Registration], settings: FederationSettings) -> Match:
    """Match the tensors of a run's sites."""
    check_compatible(contributed, settings.networks)
    if settings.secure is not None:
        check_planned_alike(contributed, settings.networks)
    pretrained = {site: message.pretrained_weights for site, message in contributed.items()}
    if settings.initial_weights is None:
        check_pretrained_weights(pretrained)
    else:
        check_no_other_weights(pretrained, settings.initial_weights)
    if settings.secure is not None:
        check_size(len(contributed))
    cases = {site: float(message.num_training_cases) for site, message in contributed.items()}
    try:
        matched = matching.match_tensors(
            {site: message.tensors for site, message in contributed.items()},
            rule=settings.matching,
            min_sites=settings.min_sites,
        )
    except MatchingError as error:
        raise RefusedError(str(error), code="nothing_shared") from error
    annotated = (
        {}
        if settings.labels == "equal"
        else {site: message.dataset_json.annotated_values for site, message in contributed.items()}
    )
    if settings.secure is not None:
        check_groups(matched.shared)
        check_count_groups(annotated)
    return Match(
        rule=settings.matching,
        weighting=settings.weighting,
        precision=settings.precision,
        exchange_every=settings.exchange_every,
        weights=dict.fromkeys(contributed, 1.0),
        num_epochs=settings.num_epochs,
        num_iterations_per_epoch=settings.num_iterations_per_epoch,
        num_val_iterations_per_epoch=settings.num_val_iterations_per_epoch,
        shared=matched.shared,
        initial_owner=matching.choose_owners(matched.shared, cases),
        coverage=matched.coverage,
        keys={site: message.keys for site, message in contributed.items() if message.keys is not None},
        kept_local=() if settings.secure is None else _kept_local(contributed, settings),
        received=matched.received,
        annotated=annotated,
    )


def _kept_local(contributed: Mapping[str, Registration], settings: FederationSettings) -> tuple[str, ...]:
    """Name the tensors that two sites or more have, and too few for a masked sum."""
    manifests = {site: message.tensors for site, message in contributed.items()}
    shared = matching.match_by(settings.matching, manifests).shared
    return tuple(sorted(name for name, sites in shared.items() if len(sites) < settings.min_sites))


def check_run_key(
    key: RunKey[Registration, Match], site: str, message: Registration, settings: FederationSettings
) -> None:
    """Raise RefusedError unless a site hands in a key that it has signed.

    Only federations that mask ask for one.
    """
    if settings.secure is None:
        return
    if message.keys is None:
        raise RefusedError(
            f"site {site} has registered without a key, and this federation masks updates",
            "Use the version of the software that the coordinator has.",
            code="run_key_missing",
        )
    check_run_keys({site: message.keys}, federation=settings.federation, gathering=str(key))


def check_registration(
    key: RunKey[Registration, Match], site: str, message: Registration, reader: DocumentReader
) -> None:
    """Raise WireError unless a registration belongs to its run and its data."""
    plans_name = message.plans.get("plans_name")
    if not isinstance(plans_name, str) or not re.fullmatch(SEGMENT_PATTERN.strip("^$"), plans_name):
        raise WireError(f"plans_name {str(plans_name)[:80]!r} in the plans cannot be part of a folder's name")
    named = run_name(message.configuration, message.fold, message.trainer)
    if key.run not in (named, f"{named}.{plans_name}"):
        raise WireError(f"a registration for {named} was sent to the run {key.run}")
    planned = planned_cases(site, reader)
    # A registration from before the software compared this is left alone: its run goes on.
    if planned is not None and message.num_training_cases > planned and not reader.has_contributed(key, site):
        raise WireError(
            f"site {site} registers {message.num_training_cases} training cases, and had {planned} cases "
            "in all when the fingerprints were pooled. Train with the dataset that was planned with, or "
            "plan with all cases in a new federation"
        )


def check_has_own_network(site: str, message: Registration, settings: FederationSettings) -> None:
    """Raise RefusedError unless a registration goes with networks of their own.

    Its trainer may not want equal plans, and no more of its plans may come than is registered.
    """
    if settings.networks == "own" and message.requires_equal_plans:
        raise RefusedError(
            f"site {site} trains with {message.trainer}, which wants the same plans at all sites, and in this "
            "federation each has its own (--networks own)",
            "Train with -tr nnUNetTrainerAsymFedAvg at all sites.",
            code="plans_differ",
        )
    if settings.networks == "own" and message.plans != plans_to_register(message.plans, message.configuration):
        # The plans of a common model are those of one of its sites, and nobody compares other fields in them.
        raise RefusedError(
            f"site {site} registers more of its plans than network and patch, and in this federation the rest stays at "
            "each site (--networks own)",
            "Use the version of the software that the coordinator has.",
            code="plans_differ",
        )


def check_annotations(site: str, message: Registration, settings: FederationSettings, reader: DocumentReader) -> None:
    """Raise RefusedError or WireError unless a site's annotated classes fit the federation.

    Sites list their annotated classes only where these may differ. The classes have the numbers of the census, and a
    site trains the rows of those that it annotates.
    """
    data = message.dataset_json
    if settings.labels == "equal" and data.annotated_labels is not None:
        raise RefusedError(
            f"site {site} was planned for a federation whose sites annotate different classes",
            f"Plan and preprocess again, or found the federation with {OPTION}.",
            code="datasets_differ",
        )
    for entry in message.tensors:
        if entry.only_received and (settings.labels == "equal" or row_of(entry.name) is None):
            raise WireError(f"site {site} does not want to send tensor {entry.name}, which it trains")
    if settings.labels == "equal":
        return
    numbered = settled_labels(site, reader)
    if data.annotated_labels is None or (numbered is not None and dict(data.labels) != numbered):
        raise RefusedError(
            f"site {site} does not have the classes of all sites, as {OPTION} asks for",
            "Plan and preprocess with --federated, then train.",
            code="datasets_differ",
        )
    if unknown := set(data.annotated_labels) - data.labels.keys():
        raise WireError(f"site {site} annotates {sorted(unknown)[0][:80]!r}, which is none of its labels")
    trained = {0, *data.annotated_values}
    rows = [(entry, row) for entry in message.tensors if (row := row_of(entry.name)) is not None]
    if not rows or any((row[1] in trained) == bool(entry.only_received) for entry, row in rows):
        raise WireError(f"site {site} must train the outputs of the classes that it annotates, and no others")


def check_compatible(registered: Mapping[str, Registration], networks: Networks = "equal") -> None:
    """Raise RefusedError unless datasets go together, and plans.

    Plans are to be equal where a trainer wants it; where sites have networks of their own, their data part is.
    """
    check_same_dataset({site: message.dataset_json for site, message in registered.items()})
    if networks == "own" or any(message.requires_equal_plans for message in registered.values()):
        agree_on_plans({site: message.plans for site, message in registered.items()}, networks)


def check_planned_alike(registered: Mapping[str, Registration], networks: Networks) -> None:
    """Raise RefusedError unless all sites have planned together, or each alone.

    Sites that have planned together mask for others with the same spacings, normalization and intensities only.
    """
    together = {
        site: data_part_of_training(message.plans, message.configuration, networks)
        for site, message in registered.items()
        if WITHHELD not in message.plans
    }
    if together and len(together) < len(registered):
        raise RefusedError(
            f"{', '.join(sorted(together))} have planned together, and "
            f"{', '.join(sorted(registered.keys() - together.keys()))} alone: they would not be summed behind masks",
            "Plan with nnUNetv2_plan_and_preprocess --federated at all sites, or with --federated asym at all.",
            code="plans_differ",
        )
    if together:
        check_equal(together, "own")


def check_given_weights(match: Match, registered: Mapping[str, Registration], given: Mapping[str, TensorSpec]) -> None:
    """Raise RefusedError unless the weights that the operator has given fit the shared tensors."""
    entries = {(site, entry.name): entry for site, message in registered.items() for entry in message.tensors}
    shared = {
        name: TensorSpec("F32", entries[owner, match.shared[name][owner]].shape)
        for name, owner in match.initial_owner.items()
    }
    try:
        given_names(match, shared, given)
    except MatchingError as error:
        raise RefusedError(
            str(error), "Train with the plans of these weights, or found a federation without.", code="weights_differ"
        ) from error


def check_no_other_weights(digests: Mapping[str, str | None], given: str) -> None:
    """Raise RefusedError if sites bring other weights than those that the operator has given."""
    others = sorted(site for site, digest in digests.items() if digest not in (None, given))
    if others:
        raise RefusedError(
            f"the operator hands the weights to start from to all sites (SHA-256 {given[:12]}...), and "
            f"{', '.join(others)} brought others",
            "Leave -pretrained_weights out.",
            code="weights_differ",
        )


def check_pretrained_weights(digests: Mapping[str, str | None]) -> None:
    """Raise RefusedError unless all sites start from equal or from random weights.

    It names each site's weights.
    """
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


def remarks_on_match(
    key: RunKey[Registration, Match], registered: Mapping[str, Registration], match: Match, *, with_shares: bool
) -> Iterator[str]:
    """Return lines on weights of sites, and on tensors that only two have.

    Args:
        with_shares: Say how much of the average that is, too.
    """
    cases = {site: message.num_training_cases for site, message in registered.items()}
    weights = cases if match.weighting == "cases" else dict.fromkeys(cases, 1)
    counted = ", ".join(
        f"{site} {_cases(number)}" + (f" ({weights[site] / sum(weights.values()):.0%})" if with_shares else "")
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


def remarks_on_classes(
    key: RunKey[Registration, Match], registered: Mapping[str, Registration], match: Match
) -> Iterator[str]:
    """Name the classes that too few sites annotate for an average."""
    averaged = {row[1] for sites in match.shared.values() for local in sites.values() if (row := row_of(local))}
    labels = next(iter(registered.values())).dataset_json.labels
    for name, value in labels.items():
        sites = sorted(site for site, annotated in match.annotated.items() if value in annotated)
        if sites and value not in averaged:
            yield (
                f"run {key.run}: only {', '.join(sites)} annotate{'s' if len(sites) == 1 else ''} {printable(name)!r}: "
                "what the network has learned of it stays there, and there will be no common model"
            )


def _cases(number: int) -> str:
    return f"{number} training case{'' if number == 1 else 's'}"


STEPS = (RegistrationStep(),)
