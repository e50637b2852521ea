"""Find the shared tensors of a network that a site keeps: the operator's `--keep-local`.

They are sent and averaged like all others, so that the common model is whole; the site goes on with its own. With
`norm` that is in effect FedBN (Li et al., ICLR 2021), with `head` FedRep (Collins et al., ICML 2021).
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from nnunetv2.federated.aggregation.head_rows import whole_names
from nnunetv2.federated.aggregation.matching import is_segmentation_layer
from nnunetv2.federated.errors import FederationError
from nnunetv2.models.networks import bare_network
from nnunetv2.training.freezing import is_in_module

NORM, HEAD = "norm", "head"


def find_local_tensors(network: nn.Module, what: str, shared: Collection[str]) -> frozenset[str]:
    """Return the names of those shared tensors of a network that its site keeps.

    Args:
        network: May be wrapped by DDP or torch.compile.
        what: `norm` (normalization layers), `head` (layers that output classes), or the name of a module or
            tensor, in which `*`, `?` and `[...]` stand for characters as in file names.
        shared: Names in the network's state dict.

    Raises:
        FederationError: There are none, or there are no others.
    """
    if what == NORM:
        of_norms = _tensors_of_norms(bare_network(network))
        kept = frozenset(name for name in shared if name in of_norms)
    elif what == HEAD:
        kept = frozenset(name for name in shared if is_segmentation_layer(name))
    else:
        kept = frozenset(
            name for name in shared if any(is_in_module(one, what) for one in (name, *whole_names([name])))
        )
    if not kept:
        example = f", for example {min(shared)}" if shared else ""
        raise FederationError(f"--keep-local {what}: none of the tensors that this site shares is meant{example}")
    if len(kept) == len(shared):
        raise FederationError(f"--keep-local {what}: all tensors that this site shares are meant, and nothing is left")
    return kept


def _tensors_of_norms(network: nn.Module) -> set[str]:
    return {
        f"{module_name}.{name}"
        for module_name, module in network.named_modules(remove_duplicate=False)
        if "Norm" in type(module).__name__ and not any(module.children())  # blocks are named after their content
        for name in module.state_dict()
    }
