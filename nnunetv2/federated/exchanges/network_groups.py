"""Find the networks of a run, and those of them that averages make whole.

Where sites have networks of their own, there is a common model of every network all of whose tensors are shared, also
of one that a single site has: a network is often a part of a deeper one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from nnunetv2.federated.aggregation.matching import count_parameters
from nnunetv2.federated.exchanges.outlook import NETWORK_TRAINER, Outlook, missing_tensor, network_trainer, withheld
from nnunetv2.federated.privacy.own_networks import OWN_PLANS, resolve
from nnunetv2.federated.protocol.api import NetworkOutlook
from nnunetv2.federated.protocol.messages import Match, Registration
from nnunetv2.federated.protocol.strict_json import json_digest
from nnunetv2.utilities.plain_text import printable

DIGITS = 16
"""Of a network's digest in its name: too many for a site to find another network of the same name."""
_MOST_CHARACTERS = 100


def foresee_networks(registered: Iterable[tuple[str, Registration]], match: Match) -> Outlook:
    """Return the outlook of a run whose sites have networks of their own."""
    networks = find_networks(registered, match)
    trainer = next((network.trainer for network in networks if network.trainer), "")
    return Outlook(
        trainer=trainer,
        obstacle="" if trainer else "no network of any site is shared whole",
        networks=networks,
        coverage=match.coverage,
    )


def find_networks(registered: Iterable[tuple[str, Registration]], match: Match) -> tuple[NetworkOutlook, ...]:
    """Return the networks of a run, the largest first, each with its sites and outlook.

    Args:
        registered: Each site and its registration, in the order of names; they are read one by one.
        match: The tensors that they share.
    """
    sites: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    found: dict[str, NetworkOutlook] = {}
    for site, registration in registered:
        digest = network_digest(registration)
        if digest not in found:
            obstacle = withheld(registration) or missing_tensor(site, registration, match)
            sizes[digest] = count_parameters(registration.tensors)
            found[digest] = NetworkOutlook(
                name=f"{OWN_PLANS}_{digest[:DIGITS]}",
                description=describe_network(registration),
                sites=(site,),
                trainer="" if obstacle else network_trainer(registration),
                obstacle=obstacle[:8000],
            )
        sites.setdefault(digest, []).append(site)
    order = sorted(found, key=lambda digest: (-sizes[digest], digest))
    return tuple(found[digest].model_copy(update={"sites": tuple(sites[digest])}) for digest in order)


def never_averaged(tensors: Iterable[str], match: Match, rounds: Collection[tuple[frozenset[str], int]]) -> str:
    """Return a tensor that no round has averaged; empty if there is none.

    Too few of its sites took part.

    Args:
        tensors: Canonical names.
        rounds: The sites of each, and of how many, at least, a tensor was averaged.
    """
    return next(
        (
            name
            for name in sorted(tensors)
            if not any(len(match.shared[name].keys() & sites) >= least for sites, least in rounds)
        ),
        "",
    )


def network_digest(registration: Registration) -> str:
    """Return a digest of tensors, architecture and trainer, which decide a network's output."""
    return json_digest(
        {
            "tensors": sorted([entry.name, entry.dtype, list(entry.shape)] for entry in registration.tensors),
            "aliases": dict(registration.aliases),
            "architecture": _architecture(registration),
            "trainer": network_trainer(registration),
            "modules": registration.architecture,
        }
    )


def describe_network(registration: Registration) -> str:
    """Describe kind and size of a network: "PlainConvUNet with 6 stages, 20,618,946 parameters"."""
    architecture, kind = _architecture(registration), network_trainer(registration)
    is_planned = kind == NETWORK_TRAINER and "network_class_name" in architecture
    if is_planned:
        kind = str(architecture["network_class_name"]).rpartition(".")[2]
    options = architecture.get("arch_kwargs")
    stages = options.get("n_stages") if is_planned and isinstance(options, Mapping) else None
    depth = f" with {stages} stages" if isinstance(stages, int) else ""
    return (
        f"{printable(f'{kind}{depth}', most=_MOST_CHARACTERS)}, {count_parameters(registration.tensors):,} parameters"
    )


def _architecture(registration: Registration) -> Mapping[str, Any]:
    described = resolve(registration.plans, registration.configuration).get("architecture")
    return described if isinstance(described, Mapping) else {}
