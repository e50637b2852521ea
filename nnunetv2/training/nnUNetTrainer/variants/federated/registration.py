"""Build the registration of a training, and describe its match."""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nnunetv2.federated.aggregation import matching
from nnunetv2.federated.exchanges.outlook import OWN_TRAINERS
from nnunetv2.federated.privacy.plans_redaction import without_extrema
from nnunetv2.federated.protocol import messages
from nnunetv2.models.networks import bare_network
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.federated.partial_annotation import annotation_of


def describe_training(
    network: torch.nn.Module,
    *,
    plans: Mapping[str, Any],
    dataset_json: Mapping[str, Any],
    configuration: str,
    fold: int | str,
    trainer: type,
    num_training_cases: int,
    mirroring_axes: Sequence[int] | None,
    requires_equal_plans: bool,
    pretrained_weights: str | None = None,
    privacy: messages.PrivacyDeclaration | None = None,
) -> messages.Registration:
    """Return the registration of a network: plans, labels, cases, tensors without values.

    The smallest and largest voxel that plans hold are not among it.

    Args:
        trainer: Class of the trainer.
        pretrained_weights: SHA-256 of the checkpoint that the network starts from.
        privacy: Differential privacy of the training, if it has any.
    """
    distinct, aliases = matching.distinct_tensors(bare_network(network).state_dict())
    tensors, annotation = matching.describe_tensors(distinct), annotation_of(network, dataset_json)
    if annotation is not None:
        tensors, aliases = annotation.describe(tensors, aliases)
    description = {key: value for key, value in dataset_json.items() if key in messages.TrainingData.model_fields}
    description.setdefault("channel_names", dataset_json.get("modality"))  # the name in old datasets
    return messages.Registration(
        configuration=configuration,
        fold=str(fold),
        trainer=trainer.__name__,
        num_training_cases=num_training_cases,
        plans=without_extrema(plans),
        dataset_json=messages.TrainingData(**description),
        mirroring_axes=None if mirroring_axes is None else tuple(mirroring_axes),
        requires_equal_plans=requires_equal_plans,
        tensors=tensors,
        aliases=aliases,
        pretrained_weights=pretrained_weights,
        privacy=privacy,
        **_describe_network(trainer, network),
    )


def _describe_network(trainer: type, network: torch.nn.Module) -> dict[str, Any]:
    """Return trainer and digest of a network, unless the trainer is ours."""
    if trainer.__name__ in OWN_TRAINERS:
        return {}
    return {"network_trainer": building_class(trainer).__name__, "architecture": architecture_digest(network)}


def building_class(trainer: type) -> type:
    """Return the class whose method builds the network of a trainer."""
    method = inspect.getattr_static(trainer, "build_network_architecture")
    if not isinstance(method, staticmethod):
        return trainer  # its network may depend on the class
    return next(
        base
        for base in reversed(trainer.__mro__)
        if (issubclass(base, nnUNetTrainer) and inspect.getattr_static(base, "build_network_architecture") is method)
        or base is trainer
    )


def architecture_digest(network: torch.nn.Module) -> str:
    """Return a digest of a network's modules and their settings.

    It is the same on all devices, and whether the network is compiled or distributed.
    """
    lines = []
    for name, module in bare_network(network).named_modules():
        kind = type(module).__name__
        kind = kind.removeprefix("Fast") if "InstanceNorm" in kind else kind  # the layer of a CPU
        is_plain = not any(True for _ in module.children()) and not module.state_dict()
        lines.append(f"{matching.normalise_name(name)} {kind}" + (f" {module.extra_repr()}" if is_plain else ""))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def describe_match(match: messages.Match, site: str) -> list[str]:
    """Describe the tensors that this site shares, and with whom."""
    shared, total = match.coverage[site]
    lines = [f"Shared, matched by {match.rule}: {shared:,} of {total:,} parameters ({shared / total:.1%})"]
    partners: dict[tuple[str, ...], int] = {}
    for sites in match.shared.values():
        if site in sites:
            partners[tuple(sorted(sites))] = partners.get(tuple(sorted(sites)), 0) + 1
    lines += [
        f"  {count} tensors with {', '.join(name for name in names if name != site)}"
        f"{' only: each of the two can compute what the other has sent' if len(names) == 2 else ''}"
        for names, count in sorted(partners.items(), key=lambda item: -item[1])
    ]
    if match.kept_local:
        lines.append(f"  {len(match.kept_local)} tensors of several sites stay local: too few have them for a sum")
    received = match.received_by(site).keys() - match.names_at(site).keys()
    if received:
        lines.append(f"  {len(received)} tensors of classes that this site does not annotate come from the others")
    owners = Counter(owner for name, owner in match.initial_owner.items() if site in match.shared[name])
    lines.append(
        "Initial weights: those of "
        + ", ".join(
            f"{'this site' if owner == site else f'site {owner}'} ({count} tensors)"
            for owner, count in owners.most_common()
        )
    )
    weighting = {"cases": "counts by its training cases", "uniform": "counts the same"}[match.weighting]
    return [*lines, f"Each of {', '.join(sorted(match.weights))} {weighting}"]
