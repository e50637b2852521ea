"""Encode and decode invitations, and check the addresses and names in them.

nnunet-fed:<base64url of JSON {v, url, federation, site, secret, authority}>, used once

Version 3 has `secure` too: the federation aggregates securely, so the site is to make an identity before it joins. A
site of an older version does not read it, and says to use matching versions.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

from nnunetv2.federated.errors import FederationError, WireError
from nnunetv2.utilities.loopback import is_on_this_machine

INVITATION_PREFIX = "nnunet-fed:"
INVITATION_VERSION = 2
SECURE_INVITATION_VERSION = 3
_SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Invitation:
    """One site's permission to join, from the coordinator."""

    url: str
    federation: str
    site: str
    secret: str
    authority: str | None = None
    """SHA-256 of the private authority that vouches for the coordinator; None where a public one does."""
    secure: bool = False
    """Whether the federation aggregates securely, for which each site has an identity."""


def encode_invitation(invitation: Invitation) -> str:
    """Return the invitation as one word that survives a mail."""
    content = {"v": INVITATION_VERSION, **asdict(invitation)}
    if invitation.secure:
        content["v"] = SECURE_INVITATION_VERSION
    else:
        del content["secure"]  # as versions that do not know it read and write it
    word = json.dumps(content, separators=(",", ":"))
    return INVITATION_PREFIX + base64.urlsafe_b64encode(word.encode()).decode().rstrip("=")


def decode_invitation(text: str) -> Invitation:
    """Read an invitation.

    Raises:
        WireError: It is damaged, or of another version.
    """
    word = text.strip()
    if not word.startswith(INVITATION_PREFIX):
        raise WireError(f"an invitation starts with {INVITATION_PREFIX!r}, this is {word[:20]!r}: copy the whole word")
    encoded = word[len(INVITATION_PREFIX) :]
    try:
        content = json.loads(base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True))
    except (ValueError, binascii.Error) as error:
        raise WireError("the invitation is damaged or cut off: copy the whole word again") from error
    version = content.pop("v", None) if isinstance(content, dict) else None
    if version not in (1, INVITATION_VERSION, SECURE_INVITATION_VERSION):
        raise WireError(
            f"the invitation is of version {str(version)[:20]}, this program knows those up to "
            f"{SECURE_INVITATION_VERSION}: use matching versions of the software"
        )
    authority = content.pop("authority", None)
    secure = content.pop("secure", False) if version == SECURE_INVITATION_VERSION else False
    is_text = all(isinstance(value, str) for value in content.values())
    if (
        content.keys() != {"url", "federation", "site", "secret"}
        or not is_text
        or not (authority is None or re.fullmatch("[0-9a-f]{64}", str(authority)))
        or secure is not (version == SECURE_INVITATION_VERSION)
    ):
        raise WireError("the invitation is incomplete: ask the coordinating site for a new one")
    check_site_name(content["site"])
    check_url(content["url"])
    return Invitation(**content, authority=authority, secure=secure)


def check_site_name(name: str) -> str:
    """Return a site's name, or raise WireError if it is none."""
    if not _SITE_NAME.fullmatch(name):
        raise WireError(
            f"{name[:80]!r} is no name for a site: use up to 64 letters, digits, '-' and '_', "
            "the first one a letter or digit"
        )
    return name


def check_url(url: str) -> str:
    """Return a coordinator's address without trailing slash; WireError if it is none."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address or parts.query or parts.fragment or parts.username:
        raise WireError(f"{url[:200]!r} is no address of a coordinator: expected http(s)://host:port")
    return url.rstrip("/")


def check_transport_is_safe(url: str, *, insecure: bool) -> None:
    """Raise FederationError if a token would cross a network in plain text."""
    if urlsplit(url).scheme == "http" and not is_on_this_machine(url) and not insecure:
        raise FederationError(
            f"{url} is plain HTTP: tokens and weights could be read on the way. Use an https "
            "address, or --insecure where the network itself is protected (a VPN, for example)"
        )
