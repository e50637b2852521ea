"""Decide how many processes augment training data."""

import os

_DEFAULT = 12


def get_allowed_n_proc_DA() -> int:
    """Return the number in nnUNet_n_proc_DA, or 12.

    At most one per core.

    Raises:
        ValueError: The variable holds anything else than a whole number from 0.
    """
    text = os.environ.get("nnUNet_n_proc_DA", str(_DEFAULT)).strip()
    if not text.isdecimal():
        raise ValueError(f"nnUNet_n_proc_DA is {text!r}: set it to the number of augmentation workers (0 for none)")
    return min(int(text), os.cpu_count() or 1)
