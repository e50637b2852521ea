"""Sum values and their squares as whole numbers, exactly for any order and split.

Sums of float64 differ in their last digits with the order of summation, and cannot be masked. So every value becomes a
whole number first, its distance from a pivot in steps that all sites agree on.

    q = rint((x - pivot) * 2^exponent),   |q| <= 2^46,   S1 = sum of q,   S2 = sum of q^2

Each sum travels as two words, which add up mod 2^64 without a carry: the lower 58 bits, of which 64 sites fill a word,
and the rest. Pivot and exponent follow from the pooled coarse histogram, so that a step is a 2^46th of the range.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from nnunetv2.federated.aggregation.fingerprint_statistics import Moments, key_values, outermost_bounds
from nnunetv2.federated.errors import StatisticsError
from nnunetv2.federated.protocol.secure_fingerprint_messages import Steps

BITS = 46
"""Of |q|. With the 2^30 values that a channel has at most, S2 stays below 2^122."""
WORDS_PER_CHANNEL = 4
_LOWER_BITS = 58
_WORD = 1 << 64
_LIMB = 16
_LIMB_MASK = (1 << _LIMB) - 1
_CHUNK = 1 << 20
_MOST_IN_CHUNK = 1 << 30
"""Products of two limbs, of so many values together, stay below 2^63."""


def steps_of(coarse: np.ndarray) -> Steps:
    """Choose the finest steps that fit all values into `BITS` bits.

    Args:
        coarse: int64 (65536,), not empty.

    Raises:
        StatisticsError: It counts NaN or infinite values.
    """
    cumulative = np.cumsum(coarse)
    middle = int(np.searchsorted(cumulative, (cumulative[-1] - 1) // 2, side="right"))
    pivot = float(key_values(np.array([middle << 16]))[0])
    distances = [abs(bound - pivot) for bound in outermost_bounds(coarse)]
    if not all(map(math.isfinite, distances)):
        raise StatisticsError("a histogram counts values that are no numbers")
    return Steps(pivot=pivot, exponent=BITS - math.frexp(max(distances))[1])


def whole_numbers(values: np.ndarray, steps: Steps) -> np.ndarray:
    """Return the int64 whole numbers that stand for float32 values.

    Raises:
        StatisticsError: A value is farther from the pivot than the steps allow for.
    """
    with np.errstate(over="ignore"):  # infinite, which is refused
        scaled = np.rint(np.ldexp(values.astype(np.float64) - steps.pivot, steps.exponent))
    if scaled.size and not np.abs(scaled).max() <= 2.0**BITS:
        raise StatisticsError(
            "the steps in which intensities are to be summed do not reach as far as this site's values: nothing "
            "more is sent. Ask the coordinating site which version it runs"
        )
    return scaled.astype(np.int64)


# ------------------------------------------------------------------------------------------------- one site's part
def integer_sums(values: np.ndarray, counts: np.ndarray, steps: Steps) -> tuple[int, int]:
    """Return the exact sum of the whole numbers, and that of their squares.

    Args:
        values: float32, one-dimensional.
        counts: int64, how often each value occurs.

    Raises:
        StatisticsError: A value is out of reach of the steps, or a count is impossibly large.
    """
    first = second = 0
    for begin in range(0, values.size, _CHUNK):
        part = slice(begin, begin + _CHUNK)
        weights = counts[part].astype(np.int64)
        if (weights < 0).any() or weights.sum(dtype=np.float64) > _MOST_IN_CHUNK:
            raise StatisticsError("intensities have negative or impossibly large counts")
        numbers = whole_numbers(values[part], steps)
        sizes = _limbs(np.abs(numbers))
        signed = weights * np.sign(numbers)
        first += sum(int(limb @ signed) << (_LIMB * place) for place, limb in enumerate(sizes))
        second += sum(
            int((one * other) @ weights) << (_LIMB * (place + place_of_other))
            for place, one in enumerate(sizes)
            for place_of_other, other in enumerate(sizes)
        )
    return first, second


def _limbs(numbers: np.ndarray) -> tuple[np.ndarray, ...]:
    """Split whole numbers, none of them negative, into three parts of 16 bits, the lowest first."""
    return numbers & _LIMB_MASK, numbers >> _LIMB & _LIMB_MASK, numbers >> 2 * _LIMB


# --------------------------------------------------------------------------------------------------- as they travel
def to_words(first: int, second: int) -> np.ndarray:
    """Return both sums as uint64 (4,), whose sums over up to 64 sites `from_words` takes."""
    lower = (1 << _LOWER_BITS) - 1
    return np.array(
        [word for number in (first, second) for word in (number & lower, (number >> _LOWER_BITS) % _WORD)], np.uint64
    )


def from_words(words: np.ndarray) -> tuple[int, int]:
    """Return the sum of the numbers, which may be negative, and that of their squares."""
    low_1, high_1, low_2, high_2 = map(int, words)
    signed = high_1 - _WORD if high_1 >= _WORD >> 1 else high_1
    return low_1 + (signed << _LOWER_BITS), low_2 + (high_2 << _LOWER_BITS)


# ---------------------------------------------------------------------------------------------------------- pooling
def moments_of(first: int, second: int, count: int, steps: Steps) -> Moments:
    """Return the moments of all values, rounded once.

    Args:
        count: How many values there are.

    Raises:
        StatisticsError: No values have these sums.
    """
    if count < 1 or abs(first) > count << BITS or not first * first <= second * count <= (count * count) << (2 * BITS):
        raise StatisticsError("the sums of the intensities contradict each other")
    step = Fraction(2) ** -steps.exponent
    mean = Fraction(steps.pivot) + Fraction(first, count) * step
    return Moments(count, float(mean), float(Fraction(second * count - first * first, count) * step**2))
