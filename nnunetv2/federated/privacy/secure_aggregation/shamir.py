"""Share secrets so that t holders rebuild one, and fewer learn nothing.

Every byte of a secret is the constant term of a random polynomial of degree t - 1 over GF(2^8), the field of AES; the
share of a site is the value of the polynomial at the site's point. Many secrets are shared at once.
Method: Shamir, How to Share a Secret (Communications of the ACM, 1979).
"""

from __future__ import annotations

import secrets as randomness
from collections.abc import Mapping, Sequence

import numpy as np

MAX_POINTS = 255
"""The field has so many elements beside 0, where the secret lies."""
_POLYNOMIAL = 0x11B


def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Return powers of the generator 3, twice over, and logarithms to that base."""
    powers, logarithms, value = np.zeros(510, np.uint8), np.zeros(256, np.int64), 1
    for exponent in range(255):
        powers[exponent] = powers[exponent + 255] = value
        logarithms[value] = exponent
        value ^= value << 1  # times 3
        value ^= _POLYNOMIAL if value & 0x100 else 0
    return powers, logarithms


_POWERS, _LOGARITHMS = _tables()


def _times(values: np.ndarray, factor: int) -> np.ndarray:
    """Multiply bytes by one element of the field."""
    if factor == 0:
        return np.zeros_like(values)
    product: np.ndarray = _POWERS[_LOGARITHMS[values] + _LOGARITHMS[factor]]
    product[values == 0] = 0
    return product


def split(secrets: np.ndarray, threshold: int, points: Sequence[int]) -> dict[int, np.ndarray]:
    """Share secrets.

    Args:
        secrets: uint8 of any shape, such as (number of secrets, 32).
        threshold: Shares that rebuild them; fewer tell nothing.
        points: One per holder of shares: distinct numbers from 1 to 255.

    Returns:
        Point -> shares, of the shape of the secrets.
    """
    if not 1 <= threshold <= len(points) or len(set(points)) < len(points) or not set(points) <= set(range(1, 256)):
        raise ValueError(f"{threshold} shares of {len(points)} points, which must be distinct and from 1 to 255")
    size = secrets.size
    coefficients = np.frombuffer(randomness.token_bytes((threshold - 1) * size), np.uint8)
    coefficients = coefficients.reshape(threshold - 1, *secrets.shape)
    shares = {}
    for point in points:
        value = np.zeros_like(secrets)
        for coefficient in coefficients[::-1]:  # Horner's rule, the constant term last
            value = _times(value ^ coefficient, point)
        shares[point] = value ^ secrets
    return shares


def combine(shares: Mapping[int, np.ndarray]) -> np.ndarray:
    """Rebuild secrets from as many shares as it takes: point -> shares."""
    total: np.ndarray | None = None
    for point, values in shares.items():
        weight = 0  # the logarithm of Lagrange's weight at 0: the product of other / (other - point)
        for other in shares:
            if other != point:
                weight += int(_LOGARITHMS[other] - _LOGARITHMS[other ^ point])
        part = _times(values, int(_POWERS[weight % 255]))
        total = part if total is None else total ^ part
    if total is None:
        raise ValueError("no share is there to rebuild a secret from")
    return total


def combine_at(shares: Mapping[int, np.ndarray], point: int) -> np.ndarray:
    """Return the share that belongs to another point, given as many shares as it takes."""
    return combine({other ^ point: values for other, values in shares.items()})
