"""Ask for the library `cryptography`: sites have it always, coordinators without torch need not."""

from __future__ import annotations

from importlib.util import find_spec

from nnunetv2.federated.errors import FederationError


def require_cryptography(purpose: str) -> None:
    """Raise FederationError, saying how to install it, if the library is missing.

    Args:
        purpose: The feature that needs it, such as "--secure".
    """
    if find_spec("cryptography") is None:
        raise FederationError(
            f"{purpose} needs the library cryptography, which this machine does not have: pip install cryptography"
        )
