"""Train where sites annotate different classes: the trainer's part beside the loss.

The rows of the segmentation heads are tensors of their own for the federation (`aggregation/head_rows.py`). A site
sends those of background and of the classes that it annotates, and receives all that are averaged. Rows that nobody
gives it, since sites that annotate the class are too few or have other layers, are silenced: its model does not predict
the class.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nnunetv2.federated.aggregation import head_rows, matching
from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.protocol.messages import TensorEntry
from nnunetv2.models.networks import bare_network
from nnunetv2.plans.partial_labels import ANNOTATED, BACKGROUND, IGNORE, unannotated_labels

COUNTS = ("tp_hard", "fp_hard", "fn_hard")
NEVER = -1e4
"""Logit of a class that is never predicted: its probability is 0 in single precision, and half precision holds it."""


@dataclass(frozen=True)
class PartialAnnotation:
    """The classes that a site annotates, and the segmentation heads of its network."""

    annotated: tuple[int, ...]
    """Foreground labels, which are channels of the output too, ascending."""
    hidden: tuple[int, ...]
    """Those that other sites annotate and this one does not."""
    heads: tuple[str, ...]

    @property
    def num_outputs(self) -> int:
        """Return the number of channels of the network's output."""
        return len(self.annotated) + len(self.hidden) + 1

    def describe(
        self, tensors: Sequence[TensorEntry], aliases: Mapping[str, str]
    ) -> tuple[tuple[TensorEntry, ...], dict[str, str]]:
        """Return the manifest of the network and further names, with heads as rows."""
        return head_rows.split_entries(tensors, aliases, self.heads, {0, *self.annotated})

    def split(self, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return weights of the network with its heads as rows."""
        return head_rows.split_weights(weights, self.heads)

    def join(self, weights: Mapping[str, np.ndarray], network: torch.nn.Module) -> dict[str, np.ndarray]:
        """Return weights with rows in their heads; missing rows stay as they are."""
        state = bare_network(network).state_dict()
        present = {head: state[head].detach().to("cpu", torch.float32).numpy() for head in self.heads}
        return head_rows.join_weights(weights, present)

    @torch.no_grad()
    def silence_(self, network: torch.nn.Module, received: Collection[str]) -> list[int]:
        """Keep a network from predicting the classes that this site neither annotates nor receives.

        Args:
            received: The site's own names of the tensors and rows that it gets in each round.

        Returns:
            These classes.
        """
        state = bare_network(network).state_dict()
        silent: set[int] = set()
        for head in self.heads:
            for row in self.hidden:
                if head_rows.row_name(head, row) not in received:
                    state[head][row] = NEVER if state[head].ndim == 1 else 0
                    silent.add(row)
        return sorted(silent)

    def without_hidden(self, outputs: Sequence[Any]) -> list[Any]:
        """Return results of validation steps without counts of classes not annotated here."""
        if not self.hidden:
            return list(outputs)
        places = [label - 1 for label in self.hidden]

        def cleared(counts: Any) -> np.ndarray:
            known = np.array(counts, np.float64)
            known[places] = 0
            return known

        return [{**one, **{name: cleared(one[name]) for name in COUNTS if name in one}} for one in outputs]


def annotation_of(network: torch.nn.Module, dataset_json: Mapping[str, Any]) -> PartialAnnotation | None:
    """Return a site's annotated classes; None where all sites annotate the same.

    Raises:
        MatchingError: The network has no segmentation heads whose rows are classes.
    """
    if ANNOTATED not in dataset_json:
        return None
    labels = {name: int(value) for name, value in dataset_json["labels"].items() if name not in (BACKGROUND, IGNORE)}
    hidden = unannotated_labels(dataset_json)
    annotated = tuple(sorted(set(labels.values()) - set(hidden)))
    distinct, _ = matching.distinct_tensors(bare_network(network).state_dict())
    heads = head_rows.find_heads(matching.describe_tensors(distinct), len(labels) + 1)
    return PartialAnnotation(annotated, hidden, heads)


def check_planned_for(dataset_json: Mapping[str, Any], labels: str, federation: str) -> None:
    """Raise FederationError unless a dataset was planned for a federation that treats labels so."""
    if (ANNOTATED in dataset_json) != (labels == "union"):
        raise FederationError(
            f"sites of {federation} may annotate different classes, and this dataset was planned without the others' "
            "classes: plan and preprocess it with --federated"
            if labels == "union"
            else f"this dataset was planned with the classes of another federation, and all sites of {federation} "
            "annotate the same: plan and preprocess it again"
        )
