"""Turn an invitation into a credential: join a federation as one of its members."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from nnunetv2.federated.errors import FederationError, NotAllowedError, RefusedError
from nnunetv2.federated.privacy.identities import public_of
from nnunetv2.federated.privacy.require_secure import check_settings
from nnunetv2.federated.protocol import api
from nnunetv2.federated.protocol.certificates import check_chain, fingerprint_of, only_certificate
from nnunetv2.federated.protocol.invitation import Invitation, check_transport_is_safe, check_url
from nnunetv2.federated.protocol.strict_json import encode_json
from nnunetv2.federated.site.authority import fetch_authority
from nnunetv2.federated.site.credential import (
    CREDENTIAL_VARIABLE,
    SiteCredential,
    credential_path,
    load_credential,
    new_token,
    save_credential,
)
from nnunetv2.federated.site.identity import make_identity
from nnunetv2.federated.site.transports.http_requests import (
    CONNECT_TIMEOUT_S,
    check_status,
    open_session,
    read_answer,
    translated_errors,
)
from nnunetv2.utilities.atomic_write import replacing


def join(
    invitation: Invitation,
    *,
    replace: bool = False,
    insecure: bool = False,
    path: Path | None = None,
    client_certificate: Path | None = None,
    client_key: Path | None = None,
) -> str:
    """Accept an invitation, save the credential, and return a line about it.

    The token is on the disk before the coordinator hears of it, so a join that is interrupted can be repeated. So is
    the site's identity, where the federation aggregates securely; it stays the same when the site joins again.

    Args:
        replace: Give up the credential of another federation, or of another name in this one.
        insecure: Allow plain HTTP to another machine.
        path: Where the credential is kept; see `credential_path`.
        client_certificate: The site's certificate for a coordinator that asks for one; PEM.
        client_key: Its key, if that is in another file.

    Raises:
        RefusedError: The coordinator does not accept the invitation.
        NotAllowedError: The federation protects less than `nnUNet_fed_require_secure` asks for.
        FederationError: The credential of another federation, or of an engine, is in the way, the coordinator is not
            the one that the invitation speaks of, or the client certificate cannot be used.
    """
    path = path or credential_path()
    _check_is_not_connected(path)
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
    identity = public_of(make_identity(path)) if invitation.secure else None
    answer = _join_or_clear_away(credential, invitation, identity, pending)
    if answer.role == "site":  # others only look on
        _check_protection(invitation, answer.settings)
    credential = credential.agreeing_with(answer.settings)
    _settle(credential, pending, path)
    return _describe_joined(answer, credential, path)


def _check_is_not_connected(path: Path) -> None:
    """Raise FederationError if an engine has written the credential: its jobs do so again and again."""
    through = load_credential(path).through if path.exists() else None
    if through is not None:
        raise FederationError(
            f"this site is connected through NVFlare ({through}): nothing to join. For a federation of another kind, "
            f"let {CREDENTIAL_VARIABLE} name another file"
        )


def _check_protection(invitation: Invitation, settings: api.FederationSettings) -> None:
    """Raise NotAllowedError if a federation protects less than it promised, or than this site requires."""
    if invitation.secure and settings.secure is None:
        raise NotAllowedError(
            f"{settings.federation} does not aggregate securely, although the invitation says so: this site has not "
            "joined. Tell the coordinating site"
        )
    check_settings(settings, None)


def _fetch_authority(invitation: Invitation, pending: Path, certificate: str | None, key: str | None) -> Path:
    """Fetch the coordinator's private authority and save it beside the pending credential.

    Only the certificate whose fingerprint was compared is kept, nothing that came with it.

    Raises:
        FederationError: It is not the one in the invitation, or not alone.
    """
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


def _join_or_clear_away(
    credential: SiteCredential, invitation: Invitation, identity: str | None, pending: Path
) -> api.JoinAnswer:
    """Ask to join; delete the pending credential and its authority if the coordinator refuses."""
    try:
        return request_to_join(credential, invitation.secret, identity)
    except RefusedError:
        pending.unlink()
        if credential.authority is not None:
            Path(credential.authority).unlink()
        raise


def _settle(credential: SiteCredential, pending: Path, path: Path) -> None:
    """Put an accepted credential, and its authority, in their places.

    Only now is the earlier credential given up; one that was refused leaves it as it is.
    """
    if credential.authority is not None:
        credential = dataclasses.replace(
            credential, authority=str(Path(credential.authority).replace(_authority_path(path)))
        )
    save_credential(credential, path)
    pending.unlink()


def _describe_joined(answer: api.JoinAnswer, credential: SiteCredential, path: Path) -> str:
    """Return a line about a member that has joined, and its next steps."""
    others = ", ".join(site for site in answer.settings.sites if site != answer.site) or "none"
    who = f"Site {answer.site}" if answer.role == "site" else f"{answer.role.capitalize()} {answer.site}"
    joined = f"{who} has joined {answer.federation} at {credential.url}; other sites: {others}. Credential: {path}"
    if credential.networks == "own" and answer.role == "site":
        joined += ". Each site has a network of its own: plan with --federated and your own -gpu_memory_target or -pl"
    if credential.secure is None:
        return joined
    return (
        f"{joined}. Its sites mask what they send, {credential.secure} or more together: when all have joined, compare "
        "the number of the roster with them (nnUNetv2_fed_roster)"
    )


def _authority_path(credential: Path) -> Path:
    """Return the absolute path of the authority of a credential."""
    return credential.with_name(credential.name + ".ca.pem").resolve()


def _credential_in_the_way(invitation: Invitation, path: Path, *, replace: bool) -> str | None:
    """Return the token of an earlier join with this invitation, if any.

    Raises:
        FederationError: The credential of another federation or site would be lost.
    """
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


def request_to_join(credential: SiteCredential, invitation: str, identity: str | None = None) -> api.JoinAnswer:
    """Send the secret of an invitation, the new token and the public identity, once."""
    request = api.JoinRequest(invitation=invitation, token=credential.token, identity=identity)
    with (
        open_session(credential, with_token=False) as session,
        translated_errors(),
        session.post(
            f"{check_url(credential.url)}/v1/join",
            data=encode_json(request),
            timeout=CONNECT_TIMEOUT_S,
            stream=True,
            allow_redirects=False,
        ) as response,
    ):
        check_status(response)
        return read_answer(api.JoinAnswer, response)
