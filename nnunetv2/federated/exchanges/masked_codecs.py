"""Turn weights into the integers of a masked sum and back: one codec per precision.

    float32     MaskedWeights    the weights, 32 bits each
    float16     MaskedChanges    their changes since the download, 16 bits each, with error feedback

Their arithmetic is in `privacy/secure_aggregation/fixed_point.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from nnunetv2.federated.privacy.secure_aggregation import fixed_point
from nnunetv2.federated.protocol.messages import Precision


class MaskedCodec(Protocol):
    """The form in which the weights of a run become integers.

    A site has one of its own; the coordinator's keep nothing.
    """

    dtype: str
    """Of the words, as documents name it."""

    def exponent(self, values: np.ndarray, before: np.ndarray | None) -> int:
        """Return the exponent that bounds a tensor in the next round.

        Args:
            values: Of the last aggregate, as sites download it.
            before: Of the one before; None if there is none.
        """
        ...

    def encode_(
        self,
        name: str,
        values: np.ndarray,
        start: np.ndarray,
        *,
        weight: int,
        bits: int,
        exponent: int,
        out: np.ndarray,
    ) -> None:
        """Write a tensor of an update into words.

        Args:
            start: The tensor that the site has downloaded.
            weight: The weight of the site in the mean.
            bits: Those of the sum of all sites' weights.
            out: Words, as many as the tensor has values.

        Raises:
            DivergedError: A value cannot travel.
        """
        ...

    def settle(self, names: Iterable[str]) -> None:
        """Note that the last encoding of these tensors has counted."""
        ...

    def decode(self, words: np.ndarray, before: np.ndarray, *, total: int, bits: int, exponent: int) -> np.ndarray:
        """Return the mean, in float64, of a part of a tensor.

        Args:
            words: A sum without masks.
            before: The same part of the aggregate before, as it is kept.
            total: The sum of the weights of the sites that were added.
        """
        ...


class MaskedWeights:
    """The codec of single precision; see `MaskedCodec`."""

    dtype = "U32"

    def exponent(self, values: np.ndarray, before: np.ndarray | None) -> int:
        """Return the exponent below which values are to stay."""
        return fixed_point.weight_exponent(largest_of(values))

    def encode_(
        self,
        name: str,
        values: np.ndarray,
        start: np.ndarray,
        *,
        weight: int,
        bits: int,
        exponent: int,
        out: np.ndarray,
    ) -> None:
        """Write weights into words."""
        try:
            fixed_point.encode_weights_(values, weight, weight_bits=bits, exponent=exponent, out=out)
        except fixed_point.DivergedError as error:
            raise fixed_point.DivergedError(f"tensor {name}: {error}") from error

    def settle(self, names: Iterable[str]) -> None:
        """Keep nothing."""

    def decode(self, words: np.ndarray, before: np.ndarray, *, total: int, bits: int, exponent: int) -> np.ndarray:
        """Return the mean of weights."""
        return fixed_point.decode_weights(words, total, weight_bits=bits, exponent=exponent)


class MaskedChanges:
    """The codec of half precision; see `MaskedCodec`, and `aggregation/codecs/float16.py` for the error feedback."""

    dtype = "U16"

    def __init__(self) -> None:
        self._rests: dict[str, np.ndarray] = {}
        """Tensor -> the error of rounding and cutting that is still to be sent."""
        self._next_rests: dict[str, np.ndarray] = {}

    def exponent(self, values: np.ndarray, before: np.ndarray | None) -> int:
        """Return the exponent to which changes are cut.

        It follows from the last change, at first from the values.
        """
        change = 0.0
        if before is not None:
            change = largest_of(values.astype(np.float32) - before.astype(np.float32))
        # Where nothing has moved, as in a sum that stayed sealed, that says nothing of the next change.
        return fixed_point.change_exponent(change or largest_of(values) / fixed_point.CHANGE_FACTOR**2)

    def encode_(
        self,
        name: str,
        values: np.ndarray,
        start: np.ndarray,
        *,
        weight: int,
        bits: int,
        exponent: int,
        out: np.ndarray,
    ) -> None:
        """Write changes into words. The same weights give the same words until `settle`."""
        change = values.astype(np.float32) - start.astype(np.float32)
        if name in self._rests:
            change += self._rests[name]
        if not np.isfinite(change).all():
            raise fixed_point.DivergedError(f"tensor {name} holds NaN or infinity: nothing was sent")
        sent = fixed_point.encode_changes_(change, weight, weight_bits=bits, exponent=exponent, out=out)
        self._next_rests[name] = change - sent

    def settle(self, names: Iterable[str]) -> None:
        """Keep the rests of the last encoding of tensors that have counted.

        Where it has not, as in a sum that stayed sealed, the rests before it are still due.
        """
        settled = {name: self._next_rests[name] for name in names if name in self._next_rests}
        self._rests = {**self._rests, **settled}

    def decode(self, words: np.ndarray, before: np.ndarray, *, total: int, bits: int, exponent: int) -> np.ndarray:
        """Return the aggregate before, plus the mean of changes.

        The rounding error of its download is in it already.
        """
        mean: np.ndarray = before + fixed_point.decode_changes(words, total, weight_bits=bits, exponent=exponent)
        return mean


def masked_codec_of(precision: Precision) -> MaskedCodec:
    """Return a new codec."""
    return MaskedWeights() if precision == "float32" else MaskedChanges()


def largest_of(values: np.ndarray) -> float:
    """Return the largest magnitude, 0 for no values."""
    return float(max(values.max(), -values.min())) if values.size else 0.0
