"""Let nothing leave a site with too few cases.

Statistics and weights of a few patients say too much of each.

The site decides, whatever the federation does: nnUNet_fed_min_cases, 10 if it is not set.
"""

from __future__ import annotations

import os
import re

from nnunetv2.federated.errors import FederationError, NotAllowedError

VARIABLE = "nnUNet_fed_min_cases"
DEFAULT = 10


def min_cases() -> int:
    """Return the smallest number of cases with which this site takes part.

    Raises:
        FederationError: The environment variable holds something else than a whole number from 1 on.
    """
    text = os.environ.get(VARIABLE)
    if text is None:
        return DEFAULT
    if not re.fullmatch(r"\s*[0-9]{1,9}\s*", text, re.ASCII) or int(text) < 1:
        raise FederationError(
            f"{VARIABLE} must be a whole number from 1 on, not {text[:80]!r}: nothing leaves this "
            f"site before that is mended. Without the variable, it is {DEFAULT}"
        )
    return int(text)


def check_enough_cases(num_cases: int, what: str) -> None:
    """Raise NotAllowedError if this site has too few cases to take part.

    Args:
        what: The dataset or fold of the cases, such as "Dataset101_Liver" or "fold 0".
    """
    if (refusal := refusal_of(num_cases, what)) is not None:
        raise NotAllowedError(refusal)


def refusal_of(num_cases: int, what: str) -> str | None:
    """Explain in one line why the cases are too few; else None."""
    least = min_cases()
    if num_cases >= least:
        return None
    cases = f"{num_cases} training case{'' if num_cases == 1 else 's'}"
    return (
        f"{what} has {cases}, and this site takes part in federations with {least} or more: nothing leaves it. If "
        f"so few may be told of, say so: export {VARIABLE}={max(1, num_cases)}"
    )
