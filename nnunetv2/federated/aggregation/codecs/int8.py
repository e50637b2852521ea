"""Let weights travel as changes in eight bits.

Rounding errors are sent with the next round.

    site          sent_r = q(w_r - b_r-1 + e_r-1)             e_r = (w_r - b_r-1 + e_r-1) - sent_r
    coordinator   u_r = b_r-1 + mean_r + c_r-1                b_r = b_r-1 + q(u_r - b_r-1),  c_r = u_r - b_r
    all sites     add q(u_r - b_r-1) to b_r-1, and go on from b_r

b is the average as all sites have it, in float32 and to the same bit; b_-1 are the initial weights. q rounds to the
nearest of 255 steps of one size for each block of 4,096 values; the largest value of a block is 127 steps. Rounding
errors on the way up (e) or down (c) come with the next round (error feedback), so small steps add up. Method: Seide et
al., 1-bit SGD (Interspeech 2014); Karimireddy et al., Error Feedback Fixes SignSGD (ICML 2019); Tang et al.,
DoubleSqueeze (ICML 2019), for both ways.

A tensor travels as int8 values in one axis: for each block four bytes, its step as a little-endian float32, then its
steps. Results of rounds hold b, c and the packed change of b, so a crash loses nothing. A site without the b before,
since it was restarted or is late, downloads b itself. It says which result it had before: a coordinator that was
restored from a backup may have closed that round anew, with another b.

e is in the memory of a site's process, and in its checkpoints: a resumed training ends with the same bits. Only if the
site was ended after an update that may have counted, and before the next checkpoint, the e of that update is lost; the
e in the checkpoint may have come with it and is forgotten, so nothing is sent twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2.federated.aggregation.weighted_mean import Aggregated, Change
from nnunetv2.federated.errors import AggregationError, PrecisionError, WireError
from nnunetv2.federated.protocol.document import DTYPES, Document, TensorSpec, write_document
from nnunetv2.federated.protocol.messages import Aggregate, Update

BLOCK = 4096
_CHUNK = 64 * BLOCK
"""Values that are averaged at a time."""
_STEPS = 127
_LARGEST_STEP = np.nextafter(np.finfo(np.float32).max / np.float32(_STEPS), np.float32(0))
"""127 of it are finite in float32; of the next one, the quotient itself, they are not."""
_HEAD = 4
"""Bytes of a block's step."""
REST, CHANGE = "#rest", "#change"
"""Behind the name of a tensor in the result of a round: c, and the packed change of b."""


# ------------------------------------------------------------------------------------------------------- the packing
def packed_size(size: int) -> int:
    """Return how many bytes so many values take."""
    return size + _HEAD * -(-size // BLOCK)


def pack(values: np.ndarray) -> np.ndarray:
    """Round float values to steps and return them as they travel, int8.

    Raises:
        PrecisionError: A value is too large for float32 steps.
    """
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    packed = np.empty(packed_size(flat.size), np.int8)
    for begin, block in _blocks(packed, flat.size):
        part = flat[begin : begin + BLOCK]
        largest = np.float32(np.abs(part).max())
        if not np.isfinite(largest):
            raise PrecisionError("a change of infinite size does not fit into eight bits")
        step = min(largest / np.float32(_STEPS), _LARGEST_STEP)
        if step == 0:  # nothing has changed, or by less than float32 can divide
            block[:] = 0
            continue
        block[:_HEAD] = np.array(step, "<f4").reshape(1).view(np.int8)
        np.copyto(block[_HEAD:], np.clip(np.rint(part / step), -_STEPS, _STEPS), casting="unsafe")
    return packed


def unpack(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the values, float32."""
    values = np.empty(math.prod(shape), np.float32)
    for begin, block in _blocks(packed, values.size):
        np.multiply(block[_HEAD:], _step(block), out=values[begin : begin + BLOCK], dtype=np.float32)
    return values.reshape(shape)


def check_packed(name: str, packed: np.ndarray) -> None:
    """Raise WireError unless all values of a tensor are finite."""
    for _, block in _blocks(packed, packed.size - _HEAD * -(-packed.size // (BLOCK + _HEAD))):
        if not 0 <= (step := _step(block)) <= _LARGEST_STEP:  # neither is NaN
            raise WireError(
                f"tensor {name} has a step of {step} in a block: expected one from 0 to {_LARGEST_STEP}, so that "
                "all values are finite"
            )
        if (block[_HEAD:] < -_STEPS).any():
            raise WireError(f"tensor {name} has a value of -128 steps, where {_STEPS} are the most either way")


def _step(block: np.ndarray) -> np.float32:
    return np.float32(np.ascontiguousarray(block[:_HEAD]).view("<f4")[0])


def _blocks(packed: np.ndarray, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the first value and the bytes of every block."""
    for number, begin in enumerate(range(0, size, BLOCK)):
        start = begin + number * _HEAD
        yield begin, packed[start : start + _HEAD + min(BLOCK, size - begin)]


def as_packed(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return the tensors as they travel in eight bits."""
    return {name: TensorSpec("I8", (packed_size(spec.size),)) for name, spec in specs.items()}


# --------------------------------------------------------------------------------------------------------- the codec
class Int8WithErrorFeedback:
    """The codec of changes in eight bits; see `UpdateCodec`."""

    is_verbatim = False
    is_relative = True

    def __init__(self) -> None:
        self._average: dict[str, np.ndarray] = {}
        """b, of the tensors that this site shares."""
        self._rests: dict[str, np.ndarray] = {}
        self._next_rests: dict[str, np.ndarray] = {}

    def specs(self, registered: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """Return the tensors in eight bits."""
        return as_packed(registered)

    # ------------------------------------------------------------------------------------------------- at a site
    def encode(self, update: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the changes of weights since the last average, packed.

        Raises:
            PrecisionError: A change is not finite; its tensor is named.
        """
        sent: dict[str, np.ndarray] = {}
        self._next_rests = {}
        for name, values in update.items():
            change = np.asarray(values - self._average[name])  # which numpy makes a number where there is no axis
            if name in self._rests:
                change += self._rests[name]
            try:
                sent[name] = pack(change)
            except PrecisionError as error:
                raise PrecisionError(f"tensor {name}: {error}") from error
            self._next_rests[name] = np.asarray(change - unpack(sent[name], change.shape))
        return sent

    def settle(self) -> None:
        """Keep the rounding errors of the last encoded update, which counts."""
        self._rests = self._next_rests

    def receive(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the received average, sent whole or as a change.

        Raises:
            WireError: It is a change of an average that this site does not have, or one to infinity. The average before
                stays.
        """
        received = {name: self._received(name, values) for name, values in tensors.items()}
        self._average |= received
        return {name: values.copy() for name, values in received.items()}

    def _received(self, name: str, values: np.ndarray) -> np.ndarray:
        if values.dtype != np.int8:
            return np.array(values, np.float32)
        if name not in self._average:
            raise WireError(f"the coordinator sends what tensor {name} has changed by, which this site has not got")
        before = self._average[name]
        if values.shape != (packed_size(before.size),):
            raise WireError(f"tensor {name} of the coordinator's aggregate has {values.size} bytes")
        check_packed(name, values)
        with np.errstate(over="ignore"):
            after = np.asarray(before + unpack(values, before.shape))
        if not np.isfinite(after).all():
            raise WireError(
                f"tensor {name} of the coordinator's aggregate changes to infinity: nothing was loaded. Ask the "
                "coordinating site"
            )
        return after

    def rests(self) -> dict[str, np.ndarray]:
        """Return the rounding errors still due, for a checkpoint."""
        return dict(self._rests)

    def take_over(self, rests: Mapping[str, np.ndarray]) -> None:
        """Restore the rounding errors of a checkpoint."""
        self._rests = dict(rests)

    def forget_rests(self) -> None:
        """Drop the rounding errors of earlier updates."""
        self._rests = {}

    # ---------------------------------------------------------------------------------------- at the coordinator
    def combine(
        self,
        documents: Mapping[str, Document[Update]],
        weights: Mapping[str, float],
        *,
        out_path: Path,
        message: Aggregate,
        previous: Document[Aggregate],
        min_sites: int,
    ) -> Aggregated:
        """Average changes, add earlier rounding errors, and write the results."""
        sites = sorted(documents)
        names = sorted(name for name in previous.specs if not name.endswith((REST, CHANGE)))
        holders = {name: [site for site in sites if name in documents[site].specs] for name in names}
        kept = tuple(name for name in names if 0 < len(holders[name]) < min_sites)
        moves = _Moves(sites)

        def tensors() -> Iterator[np.ndarray]:
            for name in names:
                contributors = {site: documents[site] for site in holders[name]}
                is_kept = name in kept or not contributors
                yield from _combine_tensor(name, contributors, weights, previous, moves, is_kept=is_kept)

        specs: dict[str, TensorSpec] = {}
        for name in names:
            spec = previous.specs[name]
            specs |= {name: spec, f"{name}{CHANGE}": as_packed({"": spec})[""], f"{name}{REST}": spec}
        digest = write_document(out_path, message, specs, tensors())
        return Aggregated(digest, moves.changes(), kept)

    def handed_out(self, values: np.ndarray) -> np.ndarray:
        """Return the values, which sites have as they are kept."""
        return values

    def write_for_site(self, source: Document[Aggregate], path: Path, names: Iterable[str], *, whole: bool) -> str:
        """Write these tensors, whole or as changes, and return the SHA-256."""
        ordered = sorted(names)
        behind = "" if whole else CHANGE
        if any(f"{name}{behind}" not in source.specs for name in ordered):
            behind = ""  # the initial weights, which are no change of anything
        specs = {name: source.spec(f"{name}{behind}") for name in ordered}
        tensors = (_read(source, f"{name}{behind}").reshape(specs[name].shape) for name in ordered)
        return write_document(path, source.message, specs, tensors)


class _Moves:
    """Add up how far every site has moved, while its changes come by."""

    def __init__(self, sites: Iterable[str]) -> None:
        self._squares: dict[str, list[float]] = {site: [] for site in sites}
        self._sizes = dict.fromkeys(self._squares, 0)

    def add(self, site: str, change: np.ndarray) -> None:
        """Count a part of a tensor."""
        self._squares[site].append(float(change @ change))
        self._sizes[site] += change.size

    def furthest(self, sites: Iterable[str]) -> str:
        """Return the one of these sites that has moved furthest."""
        return max(sites, key=lambda site: math.fsum(self._squares[site]))

    def changes(self) -> dict[str, Change]:
        """Return the change of every site."""
        return {
            site: Change(math.sqrt(math.fsum(squares)), self._sizes[site]) for site, squares in self._squares.items()
        }


def _combine_tensor(
    name: str,
    documents: Mapping[str, Document[Update]],
    weights: Mapping[str, float],
    previous: Document[Aggregate],
    moves: _Moves,
    *,
    is_kept: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return b of a tensor, the packed change that leads to it, and c.

    Args:
        documents: Site -> its update, of the sites that have the tensor.
        is_kept: The average stays, and its rounding errors stay due.
    """
    spec = previous.specs[name]
    after, rest = np.empty(spec.size, np.float32), np.empty(spec.size, np.float32)
    change = np.empty(packed_size(spec.size), np.int8)
    for part, packed in _chunks(spec.size):
        before = _read(previous, name, part)
        due = _rest_of(previous, name, part).astype(np.float64)
        mean = _mean_change(name, packed, before.size, documents, weights, moves)
        with np.errstate(over="ignore"):  # infinite values are refused
            change[packed] = pack(np.zeros(before.size) if is_kept else due + mean)
            after[part] = before + unpack(change[packed], before.shape)
        rest[part] = due + (0 if is_kept else mean) - (after[part].astype(np.float64) - before)
    if not np.isfinite(after).all():
        raise AggregationError(
            f"tensor {name}: the mean is not finite; the update of site {moves.furthest(documents)} moves furthest"
        )
    return after.reshape(spec.shape), change, rest.reshape(spec.shape)


def _mean_change(
    name: str,
    packed: slice,
    size: int,
    documents: Mapping[str, Document[Update]],
    weights: Mapping[str, float],
    moves: _Moves,
) -> np.ndarray:
    """Return the average change of `size` values of a tensor, float64; `packed` are their bytes in the updates."""
    total = math.fsum(_weight_of(weights, site) for site in documents)
    mean = np.zeros(size)
    for site, document in documents.items():
        change = unpack(_read(document, name, packed), (size,)).astype(np.float64)
        moves.add(site, change)
        mean += change * (_weight_of(weights, site) / total)
    return mean


def check_packed_tensors(document: Document[Any]) -> None:
    """Raise WireError, naming the tensor, unless all steps in a document can be used."""
    for name, spec in document.specs.items():
        if spec.dtype == "I8":
            check_packed(name, _read(document, name))


def _chunks(size: int) -> Iterator[tuple[slice, slice]]:
    """Yield the same part of a tensor's values and of its bytes, a few hundred thousand at a time."""
    for begin in range(0, size, _CHUNK):
        end = min(begin + _CHUNK, size)
        first = packed_size(begin)
        yield slice(begin, end), slice(first, first + packed_size(end - begin))


def _read(document: Document[Any], name: str, part: slice | None = None) -> np.ndarray:
    """Return values of a tensor in one axis, read without mapping the file into memory."""
    spec = document.spec(name)
    part = slice(0, spec.size) if part is None else part
    values = np.empty(part.stop - part.start, DTYPES[spec.dtype])
    if values.size:
        document.read_into(name, part.start, values)
    return values


def _rest_of(previous: Document[Any], name: str, part: slice) -> np.ndarray:
    """Return c of the round before; initial weights leave none."""
    rest = f"{name}{REST}"
    return _read(previous, rest, part) if rest in previous.specs else np.zeros(part.stop - part.start, np.float32)


def _weight_of(weights: Mapping[str, float], site: str) -> float:
    weight = float(weights[site])
    if not 0 < weight < math.inf:
        raise AggregationError(f"a weight must be positive and finite, got {weight}")
    return weight
