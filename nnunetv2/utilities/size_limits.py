"""Bound the sizes of files from others."""

from __future__ import annotations

import os

GIB = 2**30
VARIABLE = "nnUNet_max_model_gb"
DEFAULT_BYTES = 64 * GIB


class OversizedError(ValueError):
    """A file is larger than it can be."""


def check_size(size: int, largest: int) -> None:
    """Raise OversizedError if a file has more bytes than it may have."""
    if size > largest:
        raise OversizedError(f"it has {size} bytes or more, at most {largest} are taken")


def largest_model_bytes() -> int:
    """Return how many bytes a model from others may have, packed or not.

    Raises:
        ValueError: The environment variable holds no number of GiB above 0.
    """
    text = os.environ.get(VARIABLE)
    if text is None:
        return DEFAULT_BYTES
    try:
        largest = int(float(text) * GIB)
    except (ValueError, OverflowError) as error:
        raise ValueError(_complaint(text)) from error
    if largest < 1:
        raise ValueError(_complaint(text))
    return largest


def _complaint(text: str) -> str:
    return f"{VARIABLE} must be a number of GiB above 0, it is {text!r}"
