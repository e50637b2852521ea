"""Know where a coordinator can be reached and how it is recognised: what invitations say."""

from __future__ import annotations

from dataclasses import dataclass

from nnunetv2.federated.protocol.certificates import fingerprint_of
from nnunetv2.federated.protocol.invitation import Invitation, encode_invitation


@dataclass(frozen=True)
class Place:
    """Where a coordinator is."""

    url: str
    """Under which members reach it."""
    authority: str | None = None
    """Its private certificate authority, in PEM, if it has one."""

    def invitation(self, federation: str, name: str, secret: str) -> str:
        """Return the word that a member types to join."""
        fingerprint = None if self.authority is None else fingerprint_of(self.authority)
        return encode_invitation(Invitation(self.url, federation, name, secret, fingerprint))
