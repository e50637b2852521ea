"""Fit weights that the operator hands to all sites to the tensors that these share.

As with -pretrained_weights, layers that output classes are left out: they depend on the labels.
"""

from __future__ import annotations

from collections.abc import Mapping

from nnunetv2.federated.aggregation.matching import is_segmentation_layer, normalise_name
from nnunetv2.federated.errors import MatchingError
from nnunetv2.federated.protocol.document import TensorSpec
from nnunetv2.federated.protocol.messages import Match


def given_names(match: Match, shared: Mapping[str, TensorSpec], given: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Return where each shared tensor starts from: canonical name -> name among the given weights.

    Args:
        shared: Canonical name -> shape of every shared tensor.
        given: Name -> shape of the given weights.

    Raises:
        MatchingError: A shared tensor is not among them, or has another shape there.
    """
    names = {}
    for name, owner in sorted(match.initial_owner.items()):
        local = normalise_name(match.shared[name][owner])
        if is_segmentation_layer(local):
            continue
        if local not in given:
            raise MatchingError(f"the initial weights of the operator lack tensor {local}, which site {owner} has")
        if given[local].shape != shared[name].shape:
            raise MatchingError(
                f"tensor {local} is {given[local]} in the initial weights of the operator, and {shared[name]} at site "
                f"{owner}"
            )
        names[name] = local
    return names
