"""Write weights as integers for exact sums that masks can hide.

float32     n w 2^f mod 2^32, where n is the weight of the site: e is by 3 above the exponent of the largest |value| of
            the tensor in the aggregate before, f = 31 - b - e, and b bits hold the sum of all n. |w| must be below 2^e.
float16     n d 2^f mod 2^16 of the change d since the download: f = 15 - b - r, where 2^r bounds |d|. Larger changes
            are cut to it; the errors of cutting and rounding come with the next round (error feedback).

A product n w is exact in float64, as is its multiplication by a power of two, so there is one rounding per site. Sums
cannot overflow: sum of n |w| 2^f + N / 2 is below 2^31 for sums of n below 2^24 and 64 sites.
"""

from __future__ import annotations

import math

import numpy as np

from nnunetv2.federated.errors import BrokenTrainingError

_BLOCK = 1 << 15
"""Numbers that are converted at a time: they stay in the processor's cache."""
HEADROOM_BITS = 3
"""A value may grow by a factor of 8 in a round."""
CHANGE_FACTOR = 4.0
"""A change may be so many times as large as the largest of the round before."""
SMALLEST_CHANGE, UNKNOWN_CHANGE = -24, -6
"""r of a tensor that has hardly moved: half precision has no smaller steps; and of one of which nothing is known."""
FIGURE_BITS, CHANGE_BITS = 20, 36
"""Bits behind the point, of 64: of figures such as losses, and of distances between weights, which are small."""


class DivergedError(BrokenTrainingError):
    """A weight has grown too much in one round to fit into the sum."""


# ---------------------------------------------------------------------------------------------- weights of 32 bits
def weight_exponent(largest: float) -> int:
    """Return e: values are to stay below 2^e.

    Args:
        largest: Magnitude of the tensor before.
    """
    return max(0, math.frexp(largest)[1] + HEADROOM_BITS)


def encode_weights_(values: np.ndarray, weight: int, *, weight_bits: int, exponent: int, out: np.ndarray) -> None:
    """Write float32 values of one tensor, weighted, into words.

    Args:
        values: Any shape.
        weight: n, the weight of this site.
        weight_bits: b, bits of the sum of all n.
        exponent: e of the tensor.
        out: Contiguous uint32 of as many elements.

    Raises:
        DivergedError: A value is NaN, infinite, or not below 2^e.
    """
    flat, scale = values.reshape(-1), weight * 2.0 ** (31 - weight_bits - exponent)
    buffer = np.empty(min(_BLOCK, flat.size), np.float64)
    for begin in range(0, flat.size, _BLOCK):
        block = flat[begin : begin + _BLOCK]
        largest = max(block.max(), -block.min())
        if not largest < 2.0**exponent:
            raise DivergedError(
                f"a value of size {largest:g} is more than one round can explain (the limit is {2.0**exponent:g}): "
                "nothing was sent. Look at the last losses, and go on from the last average with --c"
            )
        scaled = np.multiply(block, scale, out=buffer[: block.size], dtype=np.float64)
        out[begin : begin + _BLOCK] = np.rint(scaled, out=scaled).astype(np.int32).view(np.uint32)


def decode_weights(words: np.ndarray, total: int, *, weight_bits: int, exponent: int) -> np.ndarray:
    """Return the mean, in float64, that a sum of `encode_weights_` stands for.

    Args:
        words: uint32.
        total: The sum of n of the sites that were added.
    """
    mean: np.ndarray = words.view(np.int32) / (total * 2.0 ** (31 - weight_bits - exponent))
    return mean


# ---------------------------------------------------------------------------------------------- changes of 16 bits
def change_exponent(largest: float) -> int:
    """Return r: changes are cut to 2^r.

    Args:
        largest: Magnitude of the tensor's change before.
    """
    return UNKNOWN_CHANGE if largest == 0 else max(SMALLEST_CHANGE, math.frexp(CHANGE_FACTOR * largest)[1])


def encode_changes_(values: np.ndarray, weight: int, *, weight_bits: int, exponent: int, out: np.ndarray) -> np.ndarray:
    """Write float32 changes of one tensor, weighted and cut, into words.

    Returns the changes that the words stand for, in float32.

    Args:
        values, weight, weight_bits, exponent: See `encode_weights_`; the exponent is r.
        out: Contiguous uint16 of as many elements.
    """
    scale = weight * 2.0 ** (15 - weight_bits - exponent)
    largest = math.floor(weight * 2.0 ** (15 - weight_bits))
    scaled = np.rint(np.multiply(values.reshape(-1), scale, dtype=np.float64))
    np.clip(scaled, -largest, largest, out=scaled)
    out[:] = scaled.astype(np.int16).view(np.uint16)
    sent: np.ndarray = (scaled / scale).astype(np.float32).reshape(values.shape)
    return sent


def decode_changes(words: np.ndarray, total: int, *, weight_bits: int, exponent: int) -> np.ndarray:
    """Return the mean change, in float64, that a sum of `encode_changes_` stands for."""
    mean: np.ndarray = words.view(np.int16) / (total * 2.0 ** (15 - weight_bits - exponent))
    return mean


# ------------------------------------------------------------------------------------------------ figures of 64 bits
def encode_figure(value: float, weight: int, *, bits: int = FIGURE_BITS) -> int:
    """Return a weighted figure, such as a loss, as an integer modulo 2^64.

    Args:
        bits: Behind the point.

    Raises:
        ValueError: It is not finite, or so large that the sum of all sites could overflow.
    """
    limit = 2.0 ** (39 - bits)  # leaves 24 bits for the weights, and one for the sign
    if not abs(value) < limit:
        raise ValueError(f"a figure is to be finite and below {limit:g}, this one is {value}")
    return round(value * 2.0**bits) * weight % 2**64


def decode_figure(word: int, total: int, *, bits: int = FIGURE_BITS) -> float:
    """Return the mean that a sum of `encode_figure` stands for."""
    signed = word - 2**64 if word >= 2**63 else word
    return signed / (total * 2.0**bits)
