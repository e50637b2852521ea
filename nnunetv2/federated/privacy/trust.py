"""Whom a site trusts to be who they are: `nnUNet_fed_trust`.

    first_use   the identity of a site that was seen first is that site's, and any other one later is refused
    verified    only the sites whose roster people have compared by its number; see `nnUNetv2_fed_roster`

The site decides, whatever the coordinator says.
"""

from __future__ import annotations

import os
from typing import Literal, cast

from nnunetv2.federated.errors import FederationError

VARIABLE = "nnUNet_fed_trust"
Trust = Literal["first_use", "verified"]
DEFAULT: Trust = "first_use"


def trust_mode() -> Trust:
    """Return how this site knows that the others are who they are.

    Raises:
        FederationError: The environment variable holds something else.
    """
    text = os.environ.get(VARIABLE, DEFAULT).strip()
    if text not in ("first_use", "verified"):
        raise FederationError(
            f"{VARIABLE} must be first_use or verified, not {text[:80]!r}: nothing masked leaves this site before "
            f"that is mended. Without the variable, it is {DEFAULT}"
        )
    return cast("Trust", text)
