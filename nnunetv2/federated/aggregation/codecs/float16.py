"""Let weights travel in half precision.

Rounding errors are sent with the next round.

    site          sent_r = half(w_r + e_r-1)                  e_r = (w_r + e_r-1) - sent_r
    coordinator   u_r = mean_r + c_r-1, kept in float32       c_r = u_r - half(u_r)
    all sites     go on from half(u_r)

Rounding errors on the way up (e) or down (c) come with the next round (error feedback), so in the mean over the sites
the weights move by the sum of their steps, within one rounding, however small these are. Plain rounding would keep a
weight where it is for good if an epoch moves it by less than half a unit in the last place, 0.02 to 0.05 % of its
value. Method: Seide et al., 1-bit SGD (Interspeech 2014); Karimireddy et al., Error Feedback Fixes SignSGD (ICML 2019);
Stich et al., Sparsified SGD with Memory (NeurIPS 2018).

c is no state of its own: it follows from u_r-1, the result before, which is kept anyway. So a round has the same result
to the bit, also after crashes. Sites' downloads are made of that result alone (`write_rounded`).

e lives in the memory of the site's process, in float32, and starts from zero with it. Only a last rounding depends on
it: a resumed training is as good as an uninterrupted one, but in half precision, even if seeded, not equal to it to the
bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2.federated.aggregation import weighted_mean
from nnunetv2.federated.errors import PrecisionError
from nnunetv2.federated.protocol.document import DTYPES, Document, TensorSpec, write_document
from nnunetv2.federated.protocol.messages import Aggregate, Message, Update

OVERFLOW = 65520.0
"""From here on, rounding would give infinity."""


def narrowed(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return the tensors as they travel in half precision."""
    return {name: replace(spec, dtype="F16") if spec.dtype == "F32" else spec for name, spec in specs.items()}


def widened(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return tensors that travelled in half precision as they are kept."""
    return {name: replace(spec, dtype="F32") if spec.dtype == "F16" else spec for name, spec in specs.items()}


def rounded(values: np.ndarray) -> np.ndarray:
    """Round float32 values to the nearest float16, ties to even.

    Below 6e-5 the steps no longer shrink.

    Raises:
        PrecisionError: A value is too large for float16.
    """
    if values.size and not (largest := max(values.max(), -values.min())) < OVERFLOW:
        raise PrecisionError(
            f"a value of size {largest:g} does not fit into half precision, which ends at 65504: a "
            "federation with --precision float32 can have it"
        )
    return values.astype(DTYPES["F16"])


def rest_of(values: np.ndarray) -> np.ndarray:
    """Return the rounding errors of float32 values: exact, in float32."""
    rest: np.ndarray = values - rounded(values)
    return rest


def write_rounded(source: Document[Message], path: Path, names: Iterable[str]) -> str:
    """Write a message and some tensors of `source` in half precision; return the SHA-256.

    Raises:
        PrecisionError: A value is too large; its tensor is named.
    """
    specs = {name: source.spec(name) for name in sorted(names)}

    def rounded_tensor(name: str) -> np.ndarray:
        values = np.empty(specs[name].size, DTYPES[specs[name].dtype])
        if values.size:
            source.read_into(name, 0, values)
        with named(name):
            return rounded(values).reshape(specs[name].shape)

    return write_document(path, source.message, narrowed(specs), map(rounded_tensor, specs))


@contextmanager
def named(tensor: str) -> Iterator[None]:
    """Let a PrecisionError say which tensor it is about."""
    try:
        yield
    except PrecisionError as error:
        raise PrecisionError(f"tensor {tensor}: {error}") from error


class Float16WithErrorFeedback:
    """The codec of half precision; see `UpdateCodec`. It is also the `Handout` of its aggregates."""

    is_verbatim = False
    is_relative = False

    def __init__(self) -> None:
        self._rests: dict[str, np.ndarray] = {}
        """Rounding errors of this site's updates that are still due."""
        self._next_rests: dict[str, np.ndarray] = {}

    def specs(self, registered: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """Return the tensors in half precision."""
        return narrowed(registered)

    def encode(self, update: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return float32 weights as they are to be sent.

        The same weights give the same again until `settle`.

        Raises:
            PrecisionError: A value is too large; its tensor is named.
        """
        sent: dict[str, np.ndarray] = {}
        self._next_rests = {}
        for name, values in update.items():
            wanted = values + self._rests[name] if name in self._rests else values
            with named(name):
                sent[name] = rounded(wanted)
            self._next_rests[name] = wanted - sent[name]
        return sent

    def settle(self) -> None:
        """Keep the rounding errors of the last encoded update, which counts.

        If it does not, those before it are still due.
        """
        self._rests = self._next_rests

    def receive(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the weights, in half precision."""
        return dict(tensors)

    def rests(self) -> dict[str, np.ndarray]:
        """Return nothing: the process alone keeps its rounding errors."""
        return {}

    def take_over(self, rests: Mapping[str, np.ndarray]) -> None:
        """Keep nothing."""

    def forget_rests(self) -> None:
        """Drop the rounding errors of earlier updates."""
        self._rests = {}

    def combine(
        self,
        documents: Mapping[str, Document[Update]],
        weights: Mapping[str, float],
        *,
        out_path: Path,
        message: Aggregate,
        previous: Document[Aggregate],
        min_sites: int,
    ) -> weighted_mean.Aggregated:
        """Average updates and write the aggregate in float32.

        The rounding errors of the aggregate before are added.
        """
        return weighted_mean.aggregate_documents(
            documents, weights, out_path=out_path, message=message, previous=previous, min_sites=min_sites, handout=self
        )

    def write_for_site(self, source: Document[Aggregate], path: Path, names: Iterable[str], *, whole: bool) -> str:
        """Write these tensors in half precision, and return the SHA-256."""
        return write_rounded(source, path, names)

    # ------------------------------------------------------------------------------------------------- the handout
    def kept(self, specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """Return tensors of updates as aggregates keep them."""
        return widened(specs)

    def handed_out(self, values: np.ndarray) -> np.ndarray:
        """Return values of an aggregate as sites have got them."""
        return rounded(values)

    def add_rest_(self, document: Document[Any], name: str, begin: int, block: np.ndarray) -> None:
        """Add the rounding errors of a tensor to a block, in place.

        The block begins with element `begin` of the tensor.
        """
        values = np.empty(block.size, DTYPES[document.spec(name).dtype])
        document.read_into(name, begin, values)
        block += rest_of(values)
