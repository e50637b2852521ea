"""The names of gatherings: what the sites do together, one key for each time they meet."""
from __future__ import annotations

import re

from nnunetv2.federated.messages import SEGMENT_PATTERN

CENSUS_KEY = "fingerprint/census"
COARSE_KEY = "fingerprint/coarse"
FINE_KEY = "fingerprint/fine"


def plans_key(plans_name: str) -> str:
    """Return the key of the gathering in which the sites compare their plans."""
    return f"plans/{_segment(plans_name)}"


def run_name(configuration: str, fold: int | str, trainer: str) -> str:
    """Return the name that a training run has in this federation."""
    return _segment(f"{configuration}.fold_{fold}.{trainer}")


def registration_key(run: str) -> str:
    """Return the key of the gathering in which the sites of a run say what they train."""
    return f"runs/{_segment(run)}/registration"


def initial_key(run: str) -> str:
    """Return the key of the gathering that settles the weights all sites start from."""
    return f"runs/{_segment(run)}/initial"


def round_key(run: str, number: int) -> str:
    """Return the key of round `number`, counted from 0."""
    return f"runs/{_segment(run)}/rounds/{number:d}"


def _segment(text: str) -> str:
    """Return `text` if it can stand between two slashes of a key."""
    if not re.fullmatch(SEGMENT_PATTERN.strip("^$"), text):
        raise ValueError(f"{text!r} cannot be part of a key: use at most 128 letters, digits, '_', '-', '+' and '.'")
    return text
