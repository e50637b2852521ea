"""Refuse images and labels in which voxels have no number."""

from __future__ import annotations

import numpy as np

from nnunetv2.errors import InvalidInputError


def require_finite(array: np.ndarray, what: str = "image") -> None:
    """Check that all voxels of an array `(c, *spatial)` are finite.

    A single one that is not spoils statistics and networks.

    Args:
        what: The name of the array in the message.

    Raises:
        InvalidInputError: Voxels are NaN or infinite; the message says how many.
    """
    for channel, planes in enumerate(array):
        number = sum(plane.size - np.count_nonzero(np.isfinite(plane)) for plane in planes)
        if number:
            raise InvalidInputError(
                f"channel {channel} of the {what} has {number} voxels that are NaN or infinite, which no network can "
                "learn from or predict on; replace them, for instance by the value of the background"
            )
