"""Describe what a site is about to train, as it registers for a run and as its people may see beforehand."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nnunetv2.federated import matching, messages
from nnunetv2.federated.voxel_extrema import without_extrema
from nnunetv2.training.networks import bare_network


def describe_training(network: torch.nn.Module, *, plans: Mapping[str, Any], dataset_json: Mapping[str, Any],
                      configuration: str, fold: int | str, trainer: str, num_training_cases: int,
                      mirroring_axes: Sequence[int] | None, requires_equal_plans: bool) -> messages.Registration:
    """Return plans, labels, number of training cases, and the tensors of a network without their values.

    The smallest and largest voxel that plans hold are not among it.
    """
    distinct, aliases = matching.distinct_tensors(bare_network(network).state_dict())
    description = {key: value for key, value in dataset_json.items() if key in messages.TrainingData.model_fields}
    description.setdefault("channel_names", dataset_json.get("modality"))  # the name in old datasets
    return messages.Registration(
        configuration=configuration, fold=str(fold), trainer=trainer, num_training_cases=num_training_cases,
        plans=without_extrema(plans), dataset_json=messages.TrainingData(**description),
        mirroring_axes=None if mirroring_axes is None else tuple(mirroring_axes),
        requires_equal_plans=requires_equal_plans, tensors=tuple(matching.describe_tensors(distinct)), aliases=aliases)


def describe_match(match: messages.Match, site: str) -> list[str]:
    """Say in a few lines what this site shares with whom."""
    shared, total = match.coverage[site]
    lines = [f"Shared, matched by {match.rule}: {shared:,} of {total:,} parameters ({shared / total:.1%})"]
    partners: dict[tuple[str, ...], int] = {}
    for sites in match.shared.values():
        if site in sites:
            partners[tuple(sorted(sites))] = partners.get(tuple(sorted(sites)), 0) + 1
    lines += [f"  {count} tensors with {', '.join(name for name in names if name != site)}"
              f"{' only: each of the two can compute what the other has sent' if len(names) == 2 else ''}"
              for names, count in sorted(partners.items(), key=lambda item: -item[1])]
    weighting = {"cases": "counts by its training cases", "uniform": "counts the same"}[match.weighting]
    return [*lines, f"Each of {', '.join(sorted(match.weights))} {weighting}"]
