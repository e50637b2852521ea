"""Turn the updates of the sites into one aggregate: streaming, and the same to the bit whatever the order of arrival.

Tensors are read one by one, in pieces, from documents on the disk and written as soon as they are summed, so memory
holds one tensor of the result however many sites there are. Sums are float64, in the order of the sites' names.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from nnunetv2.federated.errors import AggregationError
from nnunetv2.federated.messages import Message
from nnunetv2.federated.wire import DTYPES, Document, TensorSpec, write_document

_BLOCK = 1 << 16
"""Elements summed at a time: the running sum stays in the processor's cache."""


def weighted_mean(arrays: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Average arrays of one shape and floating dtype: sum in float64 in the order given, return their dtype.

    Raises:
        AggregationError: There is no array, shapes or dtypes differ, dtypes are not floating, a weight is not
            positive and finite, or the mean is not finite.
    """
    _check_weights(weights, len(arrays))
    shape, dtype = arrays[0].shape, arrays[0].dtype
    if dtype.kind != "f":
        raise AggregationError(f"{dtype} values cannot be averaged")
    if any(array.shape != shape or array.dtype != dtype for array in arrays):
        raise AggregationError("shapes or dtypes differ between sites")
    flat = [array.reshape(-1) for array in arrays]
    mean = np.empty(flat[0].size, dtype)
    total_weight = math.fsum(weights)
    for begin in range(0, mean.size, _BLOCK):
        block = slice(begin, begin + _BLOCK)
        total = np.multiply(flat[0][block], weights[0], dtype=np.float64)
        for values, weight in zip(flat[1:], weights[1:]):
            total += np.multiply(values[block], weight, dtype=np.float64)
        total /= total_weight
        if not np.isfinite(total).all():
            raise AggregationError("the mean is not finite")
        mean[block] = total
    return mean.reshape(shape)


def aggregate_documents(documents: Mapping[str, Document], weights: Mapping[str, float], *, out_path: Path,
                        message: Message, previous: Document | None = None) -> str:
    """Average, per tensor, over the sites that have it, and write the result as a document.

    Args:
        documents: Site -> its update, already checked (`wire.check_tensors`).
        weights: Site -> how much it counts; only ratios matter, and only between the sites that have a tensor.
        out_path: Where the aggregate appears once it is complete.
        message: What the aggregate says.
        previous: The aggregate before. Tensors that no document has keep its values; without it they are missing.

    Returns:
        The SHA-256 of the aggregate, which does not depend on the order of the mappings.

    Raises:
        AggregationError: There is no document, a weight is missing, or a tensor cannot be averaged; it is named.
    """
    if not documents:
        raise AggregationError("there is no update to aggregate")
    sites = sorted(documents)
    if missing := documents.keys() - weights.keys():
        raise AggregationError(f"site {min(missing)} has no weight")

    def mean_of(name: str, contributors: Sequence[str]) -> np.ndarray:
        return weighted_mean([documents[site].read(name) for site in contributors],
                             [float(weights[site]) for site in contributors])

    holders = _holders(documents, sites)
    kept = {} if previous is None else {name: spec for name, spec in previous.specs.items() if name not in holders}
    specs = {name: documents[contributors[0]].specs[name] for name, contributors in holders.items()} | kept
    _check_specs(documents, holders, specs)

    def value_of(name: str) -> np.ndarray:
        return previous.read(name) if name in kept else mean_of(name, holders[name])

    return _write(out_path, message, specs, value_of)


def collect_from_owners(documents: Mapping[str, Document], owners: Mapping[str, str], *, out_path: Path,
                        message: Message) -> str:
    """Take every tensor from the one site that owns it, and write the result as a document.

    Args:
        documents: Site -> its contribution.
        owners: Tensor -> site.

    Returns:
        The SHA-256 of the result, which does not depend on the order of the mappings.

    Raises:
        AggregationError: An owner has not contributed its tensor.
    """
    for name, site in sorted(owners.items()):
        if site not in documents or name not in documents[site].specs:
            raise AggregationError(f"site {site} has not contributed tensor {name}, which it owns")
    specs = {name: documents[site].specs[name] for name, site in owners.items()}
    return _write(out_path, message, specs, lambda name: documents[owners[name]].read(name))


def _holders(documents: Mapping[str, Document], sites: Sequence[str]) -> dict[str, list[str]]:
    """Return, per tensor, the sites that have it, in the order of their names."""
    holders: dict[str, list[str]] = {}
    for site in sites:
        for name in documents[site].specs:
            holders.setdefault(name, []).append(site)
    return holders


def _check_specs(documents: Mapping[str, Document], holders: Mapping[str, Sequence[str]],
                 specs: Mapping[str, TensorSpec]) -> None:
    for name, sites in sorted(holders.items()):
        if DTYPES[specs[name].dtype].kind != "f":
            raise AggregationError(f"tensor {name} is {specs[name]}: integers are not averaged")
        for site in sites:
            if documents[site].specs[name] != specs[name]:
                raise AggregationError(f"tensor {name} is {documents[site].specs[name]} at site {site}, "
                                       f"{specs[name]} at site {sites[0]}")


def _check_weights(weights: Sequence[float], number: int) -> None:
    if number == 0 or len(weights) != number:
        raise AggregationError(f"{number} arrays have {len(weights)} weights")
    for weight in weights:
        if not 0 < weight < math.inf:
            raise AggregationError(f"a weight must be positive and finite, got {weight}")


def _write(path: Path, message: Message, specs: Mapping[str, TensorSpec],
           value_of: Callable[[str], np.ndarray]) -> str:
    ordered = {name: specs[name] for name in sorted(specs)}

    def values() -> Iterator[np.ndarray]:
        for name in ordered:
            try:
                yield value_of(name)
            except AggregationError as error:
                raise AggregationError(f"tensor {name}: {error}") from error

    return write_document(path, message, ordered, values())
