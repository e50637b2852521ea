"""Turn an invitation into a site's credential, and keep that credential on the site's disk.

invitation   nnunet-fed:<base64url of JSON {v, url, federation, site, secret, authority}>, used once
credential   ~/.config/nnunet/federated_site.json, or the file in nnUNet_fed_site; only its owner can read it
authority    the same with .ca.pem at its end: who vouches for the coordinator, where no public authority does
"""

from __future__ import annotations

import argparse
import base64
import binascii
import dataclasses
import hashlib
import json
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from urllib.parse import urlsplit

from nnunetv2.federated.errors import FederationError, NotJoinedError, RefusedError, WireError
from nnunetv2.utilities.loopback import is_loopback
from nnunetv2.utilities.plain_text import show

INVITATION_PREFIX = "nnunet-fed:"
INVITATION_VERSION = 2
CREDENTIAL_VERSION = 2
CREDENTIAL_VARIABLE = "nnUNet_fed_site"
TOKEN_BYTES = 32
_SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Invitation:
    """What a site needs to join, from the coordinator to one site."""

    url: str
    federation: str
    site: str
    secret: str
    authority: str | None = None
    """SHA-256 of the private authority that vouches for the coordinator; None where a public one does."""


@dataclass(frozen=True)
class SiteCredential:
    """What a site proves its identity with."""

    url: str
    """Where the coordinator is, such as https://coordinator.example:8750."""
    federation: str
    site: str
    token: str
    """The bearer token `<site>.<secret>`. Whoever has it is the site."""
    insecure: bool = False
    """Whether someone has allowed plain HTTP beyond this machine."""
    authority: str | None = None
    """File with the private authority that vouches for the coordinator; nobody else is trusted then."""
    client_certificate: str | None = None
    """File with the certificate that this site shows, where the coordinator asks for one."""
    client_key: str | None = None
    """File with its key; None if that is in the same file."""
    joined_with: str | None = None
    """SHA-256 of the invitation's secret: a new invitation asks for a new token."""
    precision: str | None = None
    """How weights travel in this federation, where that is not float32."""

    def __repr__(self) -> str:
        return f"SiteCredential(url={self.url!r}, federation={self.federation!r}, site={self.site!r}, token=...)"


# ------------------------------------------------------------------------------------------------------ invitation
def encode_invitation(invitation: Invitation) -> str:
    """Return the invitation as one word that survives a mail."""
    content = json.dumps({"v": INVITATION_VERSION, **asdict(invitation)}, separators=(",", ":"))
    return INVITATION_PREFIX + base64.urlsafe_b64encode(content.encode()).decode().rstrip("=")


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
    if version not in (1, INVITATION_VERSION):
        raise WireError(f"the invitation is not of version {INVITATION_VERSION}: use matching versions of the software")
    authority = content.pop("authority", None)
    is_text = all(isinstance(value, str) for value in content.values())
    if (
        content.keys() != {"url", "federation", "site", "secret"}
        or not is_text
        or not (authority is None or re.fullmatch("[0-9a-f]{64}", str(authority)))
    ):
        raise WireError("the invitation is incomplete: ask the coordinating site for a new one")
    check_site_name(content["site"])
    check_url(content["url"])
    return Invitation(**content, authority=authority)


def check_site_name(name: str) -> str:
    """Return a site's name, or raise WireError if it is none."""
    if not _SITE_NAME.fullmatch(name):
        raise WireError(
            f"{name[:80]!r} is no name for a site: use up to 64 letters, digits, '-' and '_', "
            "the first one a letter or digit"
        )
    return name


# ------------------------------------------------------------------------------------------------------ addresses
def check_url(url: str) -> str:
    """Return the address of a coordinator without a slash at its end, or raise WireError if it is none."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address or parts.query or parts.fragment or parts.username:
        raise WireError(f"{url[:200]!r} is no address of a coordinator: expected http(s)://host:port")
    return url.rstrip("/")


def check_transport_is_safe(url: str, *, insecure: bool) -> None:
    """Raise FederationError if the token would cross a network in plain text without anyone having allowed it."""
    parts = urlsplit(url)
    if parts.scheme == "http" and not is_loopback(parts.hostname) and not insecure:
        raise FederationError(
            f"{url} is plain HTTP: tokens and weights could be read on the way. Use an https "
            "address, or --insecure where the network itself is protected (a VPN, for example)"
        )


# ------------------------------------------------------------------------------------------------------ credential
def credential_path() -> Path:
    """Return where the credential of this site is kept."""
    chosen = os.environ.get(CREDENTIAL_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path.home() / ".config" / "nnunet" / "federated_site.json"


def load_credential(path: Path | None = None) -> SiteCredential:
    """Read the credential of this site.

    Raises:
        NotJoinedError: There is none, or it cannot be read.
    """
    path = path or credential_path()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotJoinedError(
            f"this site has not joined a federation: {path} does not exist. Run nnUNetv2_fed_join "
            "with the invitation from the coordinating site, or let the environment variable "
            f"{CREDENTIAL_VARIABLE} name the credential"
        ) from None
    except (OSError, ValueError) as error:
        raise NotJoinedError(f"the credential {path} cannot be read: {error}") from error
    needed, known = {"url", "federation", "site", "token"}, {field.name for field in fields(SiteCredential)}
    version = content.pop("version", None) if isinstance(content, dict) else None
    if version not in (1, CREDENTIAL_VERSION) or not needed <= content.keys() <= known:
        raise NotJoinedError(
            f"the credential {path} is not of version {CREDENTIAL_VERSION}: "
            "join again with a new invitation and --replace"
        )
    if content.get("authority"):
        _check_authority(Path(content["authority"]), path)
    return SiteCredential(**content)


def _check_authority(authority: Path, credential: Path) -> None:
    """Check that a credential trusts one authority: TLS would believe whatever else stands in the file.

    Earlier versions kept everything that the coordinator's address had answered when a site joined.
    """
    from nnunetv2.federated.protocol.certificates import only_certificate

    if not authority.is_file():
        raise NotJoinedError(
            f"{authority} is missing: it says who vouches for the coordinator, and belongs "
            f"to the credential {credential}. Bring it back, or join again with a new invitation and "
            "--replace"
        )
    try:
        only_certificate(authority.read_text(encoding="ascii"))
    except (OSError, ValueError, FederationError) as error:
        raise NotJoinedError(
            f"{authority} does not hold the coordinator's authority alone ({error}), so that somebody "
            "in between may be believed: ask the coordinating site to revoke this site's credential, "
            "and join again with a new invitation and --replace"
        ) from error


def save_credential(credential: SiteCredential, path: Path | None = None) -> Path:
    """Write the credential atomically, readable by its owner only, and return its path."""
    from nnunetv2.utilities.atomic_write import replacing

    path = path or credential_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            known = {name: value for name, value in asdict(credential).items() if value is not None}
            json.dump({"version": CREDENTIAL_VERSION, **known}, file, indent=4)
    return path


# ----------------------------------------------------------------------------------------------------------- join
def join(
    invitation: Invitation,
    *,
    replace: bool = False,
    insecure: bool = False,
    path: Path | None = None,
    client_certificate: Path | None = None,
    client_key: Path | None = None,
) -> str:
    """Accept an invitation and keep the credential; say in one line what happened.

    The token is on the disk before the coordinator hears of it, so a join that is interrupted can be repeated.

    Args:
        replace: Give up the credential of another federation, or of another name in this one.
        insecure: Allow plain HTTP to another machine.
        path: Where the credential is kept; see `credential_path`.
        client_certificate: What this site shows to a coordinator that asks for certificates; PEM.
        client_key: Its key, if that is in another file.

    Raises:
        RefusedError: The coordinator does not accept the invitation.
        FederationError: The credential of another federation is in the way, the coordinator is not the one that the
            invitation speaks of, or the client certificate cannot be used.
    """
    from nnunetv2.federated.protocol.certificates import check_chain
    from nnunetv2.federated.site.transports.http import request_to_join

    path = path or credential_path()
    check_transport_is_safe(invitation.url, insecure=insecure)
    known = _credential_in_the_way(invitation, path, replace=replace)
    pending = path.with_name(path.name + ".joining")
    certificate, key = (None if file is None else str(file.resolve()) for file in (client_certificate, client_key))
    if certificate is not None:
        check_chain(certificate, key)
    authority = None if invitation.authority is None else _fetch_authority(invitation, pending, certificate, key)
    credential = SiteCredential(
        check_url(invitation.url),
        invitation.federation,
        invitation.site,
        known or _pending_token(invitation, pending) or new_token(invitation.site),
        insecure,
        None if authority is None else str(authority),
        certificate,
        key,
        _hash(invitation.secret),
    )
    save_credential(credential, pending)
    try:
        answer = request_to_join(credential, invitation.secret)
    except RefusedError:
        pending.unlink()
        if authority is not None:
            authority.unlink()
        raise
    if answer.settings.precision != "float32":
        credential = dataclasses.replace(credential, precision=answer.settings.precision)
    _settle(credential, pending, path)
    others = ", ".join(site for site in answer.settings.sites if site != answer.site) or "none"
    who = f"Site {answer.site}" if answer.role == "site" else f"{answer.role.capitalize()} {answer.site}"
    return f"{who} has joined {answer.federation} at {credential.url}; other sites: {others}. Credential: {path}"


def _fetch_authority(invitation: Invitation, pending: Path, certificate: str | None, key: str | None) -> Path:
    """Ask the coordinator for its private authority, and keep it beside the attempt to join that needs it.

    What is kept is the certificate whose fingerprint was compared, and nothing that came with it.

    Raises:
        FederationError: It is not the one in the invitation, or not alone.
    """
    from nnunetv2.federated.protocol.certificates import fetch_authority, fingerprint_of, only_certificate
    from nnunetv2.utilities.atomic_write import replacing

    answer = fetch_authority(check_url(invitation.url), client_certificate=certificate, client_key=key)
    try:
        pem = only_certificate(answer)
    except FederationError as error:
        raise _impostor(invitation, f"it does not tell a certificate authority alone ({error})") from error
    if fingerprint_of(pem) != invitation.authority:
        raise _impostor(invitation, "its certificate authority has another fingerprint")
    kept = _authority_path(pending)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with replacing(kept) as partial:
        partial.write_text(pem, encoding="ascii")
    return kept


def _impostor(invitation: Invitation, why: str) -> FederationError:
    return FederationError(
        f"what answers at {invitation.url} is not the coordinator of the invitation: {why}. "
        "Somebody may be in between: ask the coordinating site, and check the address"
    )


def _settle(credential: SiteCredential, pending: Path, path: Path) -> None:
    """Put a credential that the coordinator has accepted, and its authority, in their places.

    Only now is what was there before given up, which one that was refused leaves as it is.
    """
    if credential.authority is not None:
        credential = dataclasses.replace(
            credential, authority=str(Path(credential.authority).replace(_authority_path(path)))
        )
    save_credential(credential, path)
    pending.unlink()


def _authority_path(credential: Path) -> Path:
    """Return where the authority of a credential is kept, for whatever folder programs are started in."""
    return credential.with_name(credential.name + ".ca.pem").resolve()


def new_token(site: str) -> str:
    """Make the secret token of a site."""
    return f"{site}.{secrets.token_urlsafe(TOKEN_BYTES)}"


def _credential_in_the_way(invitation: Invitation, path: Path, *, replace: bool) -> str | None:
    """Return the token of an earlier join with this invitation; raise FederationError if another one would be lost."""
    if not path.exists() or replace:
        return None
    present = load_credential(path)
    if (present.federation, present.site) != (invitation.federation, invitation.site):
        raise FederationError(
            f"{path} holds the credential of site {present.site} of {present.federation}; add "
            f"--replace to give it up, or let {CREDENTIAL_VARIABLE} name another file"
        )
    return present.token if present.joined_with == _hash(invitation.secret) else None


def _pending_token(invitation: Invitation, pending: Path) -> str | None:
    """Return the token of an attempt to join that was interrupted."""
    if not pending.exists():
        return None
    attempt = load_credential(pending)
    same = (attempt.federation, attempt.site) == (invitation.federation, invitation.site)
    return attempt.token if same and attempt.joined_with == _hash(invitation.secret) else None


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_fed_join`."""
    parser = argparse.ArgumentParser(description="Join a federation as one of its sites.")
    parser.add_argument("invitation", metavar="INVITE", help="the word nnunet-fed:... from the coordinating site")
    parser.add_argument(
        "--replace", action="store_true", help="give up the credential of another federation that this site holds"
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="allow plain HTTP to another machine; only where the network itself is protected",
    )
    parser.add_argument(
        "--client-certificate",
        type=Path,
        metavar="FILE",
        help="certificate to show to a coordinator that asks for one (PEM)",
    )
    parser.add_argument("--client-key", type=Path, metavar="FILE", help="its key, if that is in another file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `nnUNetv2_fed_join`."""
    arguments = build_parser().parse_args(argv)
    show(
        join(
            decode_invitation(arguments.invitation),
            replace=arguments.replace,
            insecure=arguments.insecure,
            client_certificate=arguments.client_certificate,
            client_key=arguments.client_key,
        )
    )
    return 0


def join_entry() -> None:
    """Entry point of the console script."""
    from nnunetv2.utilities.command_line import run_command

    run_command(main)
