"""Average the updates of the sites as a stream.

The aggregate is the same to the bit whatever the order of arrival.

Tensors are read block by block from documents on the disk and written as soon as they are summed, so memory holds a
few tensors of the result however many sites there are. Sums are float64, in the order of the sites' names. How far each
site has moved from the aggregate before is measured in the same pass. Of updates in half precision, the aggregate is
float32 all the same; the rounding errors of the one before, as handed out, are added (`codecs/float16.py`).
"""

from __future__ import annotations

import math
import os
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nnunetv2.federated.errors import AggregationError
from nnunetv2.federated.protocol.document import DTYPES, Document, TensorSpec, write_document
from nnunetv2.federated.protocol.messages import Message

_THREADS = min(4, os.cpu_count() or 1)
"""Tensors that are averaged at the same time; so many are in memory, and one that is being written."""
_DOT = 1 << 13
"""Elements of a scalar product that the linear algebra library does not share out to threads."""
_BLOCK = 1 << 15
"""Elements summed at a time: the running sum and its summand stay in the processor's cache."""
OUTLIER_FACTOR = 3.0
"""An update is conspicuous if it moves more than so many times as far as the others do in the median."""


@dataclass(frozen=True)
class Change:
    """The distance of one site's update from the aggregate before."""

    norm: float
    """L2 norm of the difference of all its tensors."""
    size: int
    """Number of elements that were compared."""

    @property
    def rms(self) -> float:
        """Return the root mean square of the difference.

        It is comparable between sites that share more or less.
        """
        return self.norm / math.sqrt(self.size) if self.size else 0.0


@dataclass(frozen=True)
class Aggregated:
    """The aggregate that the updates of a round have become."""

    digest: str
    """SHA-256 of the aggregate; it does not depend on the order in which the updates came."""
    changes: Mapping[str, Change]
    """Site -> how far it has moved; empty if there was no aggregate before."""
    kept: tuple[str, ...] = ()
    """Tensors that keep the values of the aggregate before, although some site has sent others: too few have."""


class Handout(Protocol):
    """The aggregate before, in the form that sites received.

    Needed where that is not the form that is kept.
    """

    def kept(self, specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """Return tensors of updates as aggregates keep them."""
        ...

    def handed_out(self, values: np.ndarray) -> np.ndarray:
        """Return values of an aggregate as sites have got them."""
        ...

    def add_rest_(self, document: Document[Any], name: str, begin: int, block: np.ndarray) -> None:
        """Add a tensor's rounding errors in the handout to a block.

        In place; the block begins with element `begin`.
        """
        ...


def aggregate_documents(
    documents: Mapping[str, Document[Any]],
    weights: Mapping[str, float],
    *,
    out_path: Path,
    message: Message,
    previous: Document[Any] | None = None,
    handout: Handout | None = None,
    min_sites: int = 1,
) -> Aggregated:
    """Average every tensor over the sites that have it; write a document.

    Args:
        documents: Site -> its update, already checked (`document.check_tensors`).
        weights: Site -> how much it counts; only ratios matter, and only between the sites that have a tensor.
        out_path: Where the aggregate appears once it is complete.
        message: The message of the aggregate.
        previous: The aggregate before, with which updates are compared. Tensors that no document has keep its values;
            without it they are missing.
        handout: How `previous` has reached the sites; None: as it is.
        min_sites: Tensors that fewer documents have keep their values of `previous`, as if nobody had sent them.

    Raises:
        AggregationError: There is no document, a weight is missing, or a tensor cannot be averaged or has no values to
            keep; it is named.
    """
    if not documents:
        raise AggregationError("there is no update to aggregate")
    sites = sorted(documents)
    if missing := documents.keys() - weights.keys():
        raise AggregationError(f"site {min(missing)} has no weight")
    held = _holders(documents, sites)
    known = {} if previous is None else previous.specs
    kept = _kept(held, known, min_sites)
    holders = {name: contributors for name, contributors in held.items() if len(contributors) >= min_sites}
    sent = {name: documents[contributors[0]].specs[name] for name, contributors in holders.items()}
    _check_specs(documents, holders, sent)
    specs = {**known, **(sent if handout is None else handout.kept(sent))}
    comparison = _Comparison(previous, sites, handout)

    def value_of(name: str) -> np.ndarray:
        if name not in holders:
            assert previous is not None  # it has values to keep
            return previous.read(name)
        observe, add = None, None
        if previous is not None and known.get(name) == specs[name]:
            observe = comparison.observer(name, holders[name])
            add = None if handout is None else partial(handout.add_rest_, previous, name)
        contributors = {site: documents[site] for site in holders[name]}
        return _mean_of_sites(name, contributors, weights, sent[name], specs[name], observe, add)

    digest = write_computed(out_path, message, specs, value_of)
    return Aggregated(digest, comparison.changes(), kept)


def outliers(changes: Mapping[str, Change]) -> list[str]:
    """Name the sites whose updates move conspicuously far, sorted.

    They count all the same: people decide.

    A site is one if the root mean square of its change is more than three times the median of those of the others. The
    median of at least two others is asked for: with fewer, nobody can tell who is odd.
    """
    if len(changes) < 3:
        return []
    return [
        site
        for site, change in sorted(changes.items())
        if change.rms > OUTLIER_FACTOR * statistics.median(other.rms for name, other in changes.items() if name != site)
    ]


def collect_from_owners(
    documents: Mapping[str, Document[Any]],
    owners: Mapping[str, str],
    *,
    out_path: Path,
    message: Message,
    given: Callable[[str], np.ndarray | None] = lambda name: None,
) -> str:
    """Take every tensor from the site that owns it; write a document.

    Args:
        documents: Site -> its contribution.
        owners: Tensor -> site.
        given: Tensor -> values of the same dtype and shape to take in place of those of its owner, or None.

    Returns:
        The SHA-256 of the result, which does not depend on the order of the mappings.

    Raises:
        AggregationError: An owner has not contributed its tensor.
    """
    for name, site in sorted(owners.items()):
        if site not in documents or name not in documents[site].specs:
            raise AggregationError(f"site {site} has not contributed tensor {name}, which it owns")
    specs = {name: documents[site].specs[name] for name, site in owners.items()}

    def value_of(name: str) -> np.ndarray:
        values = given(name)
        return documents[owners[name]].read(name) if values is None else values

    return write_computed(out_path, message, specs, value_of)


def _mean_of_sites(
    name: str,
    documents: Mapping[str, Document[Any]],
    weights: Mapping[str, float],
    sent_spec: TensorSpec,
    mean_spec: TensorSpec,
    observe: Callable[[int, int, np.ndarray], None] | None,
    add: Callable[[int, np.ndarray], None] | None,
) -> np.ndarray:
    """Average a tensor over the sites of these documents; see `_mean`.

    Args:
        sent_spec: Of the tensor in the documents.
        mean_spec: Of the tensor in the aggregate.
    """
    contributors = list(documents.values())
    used = [float(weights[site]) for site in documents]
    _check_weights(used)
    mean = _mean(
        mean_spec.size,
        DTYPES[sent_spec.dtype],
        used,
        lambda index, begin, out: contributors[index].read_into(name, begin, out),
        observe,
        add,
        DTYPES[mean_spec.dtype],
    )
    return mean.reshape(mean_spec.shape)


def _mean(
    size: int,
    dtype: np.dtype,
    weights: Sequence[float],
    read: Callable[[int, int, np.ndarray], None],
    observe: Callable[[int, int, np.ndarray], None] | None,
    add: Callable[[int, np.ndarray], None] | None,
    mean_dtype: np.dtype,
) -> np.ndarray:
    """Average the values that `read(index, begin, out)` gives, block by block.

    Every buffer is made once and used for all blocks: that alone is worth a factor of two.

    Args:
        dtype: Of the values.
        observe: Shown (index, begin, values in float64) of every block.
        add: Given (begin, mean in float64) of every block, to which it may add.
        mean_dtype: Of the mean.
    """
    mean, total_weight = np.empty(size, mean_dtype), math.fsum(weights)
    raw, values, total = (np.empty(min(size, _BLOCK), kind) for kind in (dtype, np.float64, np.float64))
    for begin in range(0, size, _BLOCK):
        block = slice(0, min(_BLOCK, size - begin))
        for index, weight in enumerate(weights):
            read(index, begin, raw[block])
            np.copyto(values[block], raw[block])
            if observe is not None:
                observe(index, begin, values[block])
            if index == 0:
                np.multiply(values[block], weight, out=total[block])
            else:
                values[block] *= weight
                total[block] += values[block]
        total[block] /= total_weight
        if add is not None:
            add(begin, total[block])
        if not np.isfinite(total[block]).all():
            raise AggregationError("the mean is not finite")
        mean[begin : begin + _BLOCK] = total[block]
    return mean


class _Comparison:
    """Add up how far every site is from the aggregate before, while its blocks come by. Several threads may watch."""

    def __init__(self, previous: Document[Any] | None, sites: Sequence[str], handout: Handout | None) -> None:
        self._previous = previous
        self._handout = handout
        self._squares: dict[str, dict[str, float]] = {site: {} for site in sites}
        self._sizes: dict[str, dict[str, int]] = {site: {} for site in sites}

    def observer(self, name: str, sites: Sequence[str]) -> Callable[[int, int, np.ndarray], None]:
        """Return the observer of the blocks of tensor `name`, for `_mean`."""
        previous, handout = self._previous, self._handout
        assert previous is not None
        spec = previous.specs[name]
        raw, before, difference = (
            np.empty(min(spec.size, _BLOCK), dtype) for dtype in (DTYPES[spec.dtype], np.float64, np.float64)
        )
        for site in sites:
            self._squares[site][name], self._sizes[site][name] = 0.0, spec.size

        def observe(index: int, begin: int, values: np.ndarray) -> None:
            block = slice(0, values.size)
            if index == 0:
                previous.read_into(name, begin, raw[block])
                # The values that the sites began with.
                np.copyto(before[block], raw[block] if handout is None else handout.handed_out(raw[block]))
            np.subtract(values, before[block], out=difference[block])
            self._squares[sites[index]][name] += _sum_of_squares(difference[block])

        return observe

    def changes(self) -> dict[str, Change]:
        """Return each site's change, independent of the order of the tensors."""
        if self._previous is None:
            return {}
        return {
            site: Change(math.sqrt(math.fsum(squares.values())), sum(self._sizes[site].values()))
            for site, squares in self._squares.items()
        }


def _sum_of_squares(values: np.ndarray) -> float:
    # In pieces for which the linear algebra library (three times as fast as einsum) does not call its threads.
    return sum(
        float(piece @ piece) for piece in (values[begin : begin + _DOT] for begin in range(0, values.size, _DOT))
    )


def _holders(documents: Mapping[str, Document[Any]], sites: Sequence[str]) -> dict[str, list[str]]:
    """Return, per tensor, the sites that have it, in the order of their names."""
    holders: dict[str, list[str]] = {}
    for site in sites:
        for name in documents[site].specs:
            holders.setdefault(name, []).append(site)
    return holders


def _kept(held: Mapping[str, Sequence[str]], known: Mapping[str, TensorSpec], min_sites: int) -> tuple[str, ...]:
    """Return the tensors that too few sites have, sorted; `known` are those of the aggregate before.

    Raises:
        AggregationError: One of them has no values to keep; it is named.
    """
    kept = tuple(sorted(name for name, contributors in held.items() if len(contributors) < min_sites))
    if missing := set(kept) - known.keys():
        raise AggregationError(f"tensor {min(missing)} of fewer than {min_sites} sites has no earlier values to keep")
    return kept


def _check_specs(
    documents: Mapping[str, Document[Any]], holders: Mapping[str, Sequence[str]], specs: Mapping[str, TensorSpec]
) -> None:
    for name, sites in sorted(holders.items()):
        if DTYPES[specs[name].dtype].kind != "f":
            raise AggregationError(f"tensor {name} is {specs[name]}: integers are not averaged")
        for site in sites:
            if documents[site].specs[name] != specs[name]:
                raise AggregationError(
                    f"tensor {name} is {documents[site].specs[name]} at site {site}, {specs[name]} at site {sites[0]}"
                )


def _check_weights(weights: Sequence[float]) -> None:
    for weight in weights:
        if not 0 < weight < math.inf:
            raise AggregationError(f"a weight must be positive and finite, got {weight}")


def write_computed(
    path: Path, message: Message, specs: Mapping[str, TensorSpec], value_of: Callable[[str], np.ndarray]
) -> str:
    """Write a document whose tensors a few threads compute, slightly ahead of the writing.

    Args:
        value_of: Returns a tensor by its name; an AggregationError of it will name the tensor.
    """
    ordered = {name: specs[name] for name in sorted(specs)}

    def named_value_of(name: str) -> np.ndarray:
        try:
            return value_of(name)
        except AggregationError as error:
            raise AggregationError(f"tensor {name}: {error}") from error

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="aggregation") as pool:
        return write_document(path, message, ordered, _computed_ahead(pool, named_value_of, ordered))


def _computed_ahead(
    pool: ThreadPoolExecutor, compute: Callable[[str], np.ndarray], names: Iterable[str]
) -> Iterator[np.ndarray]:
    """Yield computed tensors in order, while threads work on the next few."""
    running: deque[Future[np.ndarray]] = deque()
    try:
        for name in names:
            running.append(pool.submit(compute, name))
            if len(running) >= _THREADS:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()
