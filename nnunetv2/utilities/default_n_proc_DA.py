"""Decide how many processes augment training data."""
import os

_DEFAULT = 12


def get_allowed_n_proc_DA() -> int:
    """Return the number in the environment variable nnUNet_n_proc_DA, or 12, but at most one per core."""
    wanted = int(os.environ.get("nnUNet_n_proc_DA", _DEFAULT))
    return min(wanted, os.cpu_count() or 1)
