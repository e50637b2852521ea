"""Foresee whether a run's averages make a model that everybody can use.

Plans that a site has made alone tell of its data: the texts of this module name fields and sites, never values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from nnunetv2.federated.aggregation.head_rows import row_of
from nnunetv2.federated.exchanges.consistency import comparable_plans, find_difference
from nnunetv2.federated.privacy.plans_redaction import WITHHELD
from nnunetv2.federated.protocol.api import NetworkOutlook
from nnunetv2.federated.protocol.messages import Match, Registration

NETWORK_TRAINER = "nnUNetTrainer"
OWN_TRAINERS = frozenset(
    {"nnUNetTrainerFedAvg", "nnUNetTrainerAsymFedAvg", "nnUNetTrainerAsymFedAvgOverlapped", "nnUNetTrainerDPAsymFedAvg"}
)
"""Federated trainers of this package. Their network is that of `NETWORK_TRAINER`, which every nnU-Net has."""
COUNTERS = ("num_batches_tracked",)
"""Buffers of batch normalization that count training steps: sites do not share them, and no prediction reads them."""


@dataclass(frozen=True)
class Outlook:
    """The model that a run's averages will make, or why there is none."""

    trainer: str = ""
    """Class that builds the network of the common model; empty if there will be none."""
    obstacle: str = ""
    """Why there will be none."""
    networks: tuple[NetworkOutlook, ...] = ()
    """All of the run, where sites have networks of their own; see `network_groups`."""
    coverage: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """There, too: site -> (parameters it shares, parameters it has)."""

    def __str__(self) -> str:
        if self.networks:
            return _count_models(self.networks)
        return (
            f"there will be no common model: {self.obstacle}"
            if self.obstacle
            else f"there will be a common model, with the network of {self.trainer}"
        )

    def details(self) -> list[str]:
        """Describe shares and networks, a line each; nothing where all sites plan the same network."""
        shares = [
            f"site {site} shares {shared:,} of its {total:,} parameters ({shared / max(total, 1):.1%})"
            for site, (shared, total) in sorted(self.coverage.items())
        ]
        return [*shares, *map(_describe_network, self.networks)]


def _count_models(networks: Sequence[NetworkOutlook]) -> str:
    whole, total = sum(not network.obstacle for network in networks), len(networks)
    there = f"the sites have {total} network{'' if total == 1 else 's'}"
    return f"{there}; there will be {whole or 'no'} common model{'' if whole == 1 else 's'}"


def _describe_network(network: NetworkOutlook) -> str:
    outcome = (
        f"there will be no common model of it: {network.obstacle}"
        if network.obstacle
        else "there will be a common model of it"
    )
    return f"network {network.name} ({network.description}) at {', '.join(network.sites)}: {outcome}"


def foresee_model(registered: Iterable[tuple[str, Registration]], match: Match) -> Outlook:
    """Tell whether there will be a common model, and who builds its network.

    Args:
        registered: Each site and its registration, in the order of names; they are read one by one.
        match: The tensors that they share.
    """
    registrations = iter(registered)
    first, model = next(registrations)
    obstacle = withheld(model) or missing_tensor(first, model, match)
    for site, other in registrations:
        obstacle = _difference(first, model, site, other) or obstacle
        if obstacle:
            break
    return Outlook(obstacle=obstacle) if obstacle else Outlook(trainer=network_trainer(model))


def withheld(registration: Registration) -> str:
    """Say that a site withholds its plans' statistics; empty otherwise."""
    if WITHHELD not in registration.plans:
        return ""
    return (
        "the sites have planned alone, and keep the statistics in their plans to themselves, as this federation wants. "
        "Plan with --federated"
    )


def network_trainer(registration: Registration) -> str:
    """Return the class that builds the network of a site."""
    default = NETWORK_TRAINER if registration.trainer in OWN_TRAINERS else registration.trainer
    return registration.network_trainer or default


def missing_tensor(site: str, registration: Registration, match: Match) -> str:
    """Say which tensor the model of a site would lack; empty if there is none."""
    shared = {*match.received_by(site).values()}
    lacking = next(
        (entry for entry in registration.tensors if entry.name not in shared and not is_counter(entry.name)), None
    )
    if lacking is None:
        return ""
    row = row_of(lacking.name)
    if row is not None:
        name = next((name for name, value in registration.dataset_json.labels.items() if value == row[1]), str(row[1]))
        return f"too few sites annotate the class {name!r} for an average of its part of the network"
    what = (
        "holds whole numbers, which are not averaged"
        if lacking.dtype.startswith(("I", "U", "B")) and lacking.dtype != "BF16"
        else "is not shared by the sites"
    )
    return f"tensor {lacking.name} of the network {what}"


def is_counter(name: str) -> bool:
    """Tell whether a tensor only counts steps of training.

    A model may have any number in its place.
    """
    return name.rpartition(".")[2] in COUNTERS


def counters_of(registration: Registration) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a network that only count.

    Name -> shape, under all their names.
    """
    shapes: Mapping[str, tuple[int, ...]] = {
        entry.name: entry.shape for entry in registration.tensors if is_counter(entry.name)
    }
    return {**shapes, **{alias: shapes[name] for alias, name in registration.aliases.items() if name in shapes}}


def _difference(first: str, model: Registration, site: str, other: Registration) -> str:
    """Describe the obstacle to one model for two sites; empty if none."""
    plans = {first: comparable_plans(model.plans), site: comparable_plans(other.plans)}
    difference = find_difference(plans, "plans")
    if difference is not None:
        return f"the plans differ: {difference.without_values()}"
    trainers = network_trainer(model), network_trainer(other)
    if trainers[0] != trainers[1]:
        return f"the network of site {first} is that of {trainers[0]}, the network of site {site} that of {trainers[1]}"
    if None not in (model.architecture, other.architecture) and model.architecture != other.architecture:
        return (
            f"the networks of sites {first} and {site} are made of other modules, although the trainer is called "
            f"{model.trainer} at both"
        )
    return ""
