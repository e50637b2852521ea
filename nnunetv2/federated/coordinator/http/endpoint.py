"""Describe how members reach and recognise a coordinator: the content of invitations."""

from __future__ import annotations

from dataclasses import dataclass

from nnunetv2.federated.protocol.certificates import fingerprint_of
from nnunetv2.federated.protocol.invitation import Invitation, encode_invitation


@dataclass(frozen=True)
class Endpoint:
    """Address and private authority of a coordinator."""

    url: str
    """Under which members reach it."""
    authority: str | None = None
    """Its private certificate authority, in PEM, if it has one."""

    def invitation(self, federation: str, name: str, secret: str, *, with_identity: bool = False) -> str:
        """Return the word that a member types to join.

        Args:
            with_identity: Whether the member is a site of a federation that aggregates securely.
        """
        fingerprint = None if self.authority is None else fingerprint_of(self.authority)
        return encode_invitation(Invitation(self.url, federation, name, secret, fingerprint, with_identity))
