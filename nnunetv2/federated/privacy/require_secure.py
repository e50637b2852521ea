"""Let nothing leave in clear that this site wants masked, whatever the coordinator says.

A site that has joined a federation with secure aggregation remembers from how many sites on anything is summed, and
holds the coordinator to it. Beyond that the site decides: `nnUNet_fed_require_secure=4` refuses every federation that
sums fewer than four sites, or in clear. Without either, a coordinator may ask for updates in clear.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from nnunetv2.federated.errors import FederationError, NotAllowedError
from nnunetv2.federated.protocol.keys import InitialKey
from nnunetv2.federated.protocol.messages import CoarseSummary, FineSummary, Message, Update, Validation

if TYPE_CHECKING:
    from nnunetv2.federated.protocol.api import FederationSettings

VARIABLE = "nnUNet_fed_require_secure"
LEAST = 3
"""Sites in a sum: each of two knows the other's part."""
CLEAR = (Update, Validation, CoarseSummary, FineSummary)
"""Messages that show a site's own numbers to the coordinator. Initial weights are random ones."""


def required_k(promised: int | None = None) -> int | None:
    """Return the required number of sites per sum; None: in clear.

    Args:
        promised: The fewest sites per sum when this site joined the federation; None for one that sums in clear.

    Raises:
        FederationError: The environment variable holds something else than a whole number from 3 on.
    """
    text = os.environ.get(VARIABLE)
    if text is None:
        return promised
    if not re.fullmatch(r"\s*[0-9]{1,4}\s*", text, re.ASCII) or int(text) < LEAST:
        raise FederationError(
            f"{VARIABLE} must be a whole number from {LEAST} on, not {text[:80]!r}: nothing leaves this site before "
            "that is mended. Without the variable, what held when this site joined is required"
        )
    return max(int(text), promised or 0)


def check_settings(settings: FederationSettings, promised: int | None) -> None:
    """Raise NotAllowedError if a federation protects less than this site requires.

    Args:
        promised: See `required_k`.
    """
    required = required_k(promised)
    if required is None:
        return
    offered = None if settings.secure is None else settings.secure.k
    if offered is None or offered < required:
        found = "in clear" if offered is None else f"from {offered} sites on"
        raise NotAllowedError(
            f"the coordinator of {settings.federation} sums {found}, and this site requires secure sums of "
            f"{required} sites or more ({_source(promised)}): nothing was sent. Ask the coordinating site"
        )


def check_message(key: str, message: Message, promised: int | None) -> None:
    """Raise NotAllowedError if a message shows this site's numbers, which it wants masked.

    Args:
        key: The exchange that it is for.
        promised: See `required_k`.
    """
    if not isinstance(message, CLEAR) or isinstance(key, InitialKey):
        return
    required = required_k(promised)
    if required is not None:
        raise NotAllowedError(
            f"{key}: a message of kind {message.kind} would leave in clear, and this site requires secure sums of "
            f"{required} sites or more ({_source(promised)}): nothing was sent. Ask the coordinating site"
        )


def _source(promised: int | None) -> str:
    """Tell where the requirement stands."""
    required = required_k(promised)
    return f"as when it joined, {promised}" if required == promised else f"{VARIABLE}={required}"
