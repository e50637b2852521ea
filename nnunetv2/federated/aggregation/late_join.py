"""Let a site join a run that has begun.

It shares those of the run's shared tensors that its own network has too. The shared tensors were fixed when the run
began, so nothing changes for the other sites but the sum of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from nnunetv2.federated.aggregation import matching
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.protocol.messages import Match, Registration


def admit(site: str, registration: Registration, match: Match, registered: Mapping[str, Registration]) -> Match:
    """Return the match of a run with one more site.

    Args:
        match: The match of the sites so far.
        registered: Their registrations; datasets and plans have been compared already.

    Raises:
        RefusedError: The newcomer shares suspiciously few of its parameters with the run.
    """
    names, received = shared_names(site, registration, match, registered)
    entries = {entry.name: entry for entry in registration.tensors}
    total = matching.count_parameters(registration.tensors)
    count = sum(math.prod(entries[local].shape) for local in (*names.values(), *received.values()))
    if count == 0 or count < matching.MIN_COVERAGE * total:
        raise RefusedError(
            f"site {site} shares only {count} of its {total} parameters with the run, which has begun",
            "Use the trainer and the plans of the other sites.",
            code="nothing_shared",
        )
    return match.model_copy(
        update={
            "weights": dict.fromkeys(sorted({*match.weights, site}), 1.0),
            "coverage": {**match.coverage, site: (count, total)},
            "keys": match.keys if registration.keys is None else {**match.keys, site: registration.keys},
            "shared": _with_names(match.shared, names, site),
            "received": _with_names(
                {name: match.received.get(name, {}) for name in (*match.received, *received)}, received, site
            ),
            "annotated": match.annotated
            if registration.dataset_json.annotated_labels is None
            else {**match.annotated, site: registration.dataset_json.annotated_values},
        }
    )


def _with_names(
    tensors: Mapping[str, Mapping[str, str]], names: Mapping[str, str], site: str
) -> dict[str, dict[str, str]]:
    """Return canonical name -> site -> own name, with one more site."""
    return {name: {**sites, **({site: names[name]} if name in names else {})} for name, sites in tensors.items()}


def shared_names(
    site: str, registration: Registration, match: Match, registered: Mapping[str, Registration]
) -> tuple[dict[str, str], dict[str, str]]:
    """Match the newcomer's tensors with those of the run.

    Returns canonical name -> its own name, of the tensors that it shares, and of those that it only receives.
    """
    manifests = {name: message.tensors for name, message in registered.items()} | {site: registration.tensors}
    found = matching.match_by(match.rule, manifests)

    def names_in(own: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
        # Its partners identify a tensor: canonical names depend on the sites that take part.
        own_name_of = {
            (partner, local): own[name][site]
            for name, sites in found.shared.items()
            if site in own.get(name, {})
            for partner, local in sites.items()
            if partner != site
        }
        return {
            name: own_name_of[partner]
            for name, sites in match.shared.items()
            for partner in [next((pair for pair in sorted(sites.items()) if pair in own_name_of), None)]
            if partner is not None
        }

    return names_in(found.shared), names_in(found.received)


def with_site(match: Match, admitted: Match, site: str) -> Match:
    """Return a match with a site that was admitted to it, or earlier."""
    return match.model_copy(
        update={
            "weights": dict.fromkeys(sorted({*match.weights, site}), 1.0),
            "coverage": {**match.coverage, site: admitted.coverage[site]},
            "keys": {**match.keys, **({site: admitted.keys[site]} if site in admitted.keys else {})},
            "shared": _with_names(match.shared, admitted.names_at(site), site),
            "received": _with_received(match, admitted, site),
            "annotated": {
                **match.annotated,
                **({site: admitted.annotated[site]} if site in admitted.annotated else {}),
            },
        }
    )


def _with_received(match: Match, admitted: Match, site: str) -> dict[str, dict[str, str]]:
    """Return the tensors that sites only receive, with one more site."""
    names = {name: sites[site] for name, sites in admitted.received.items() if site in sites}
    return _with_names({name: match.received.get(name, {}) for name in (*match.received, *names)}, names, site)
