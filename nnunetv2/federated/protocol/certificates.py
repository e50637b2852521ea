"""Check certificates, compute their fingerprints, and explain why one is not trusted.

TLS libraries trust every certificate in a file that they are given, and ignore all else in it. So a text is compared,
kept and handed on only if it is one certificate and nothing else.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import ssl
import time
from pathlib import Path
from typing import TypeGuard

from nnunetv2.federated.errors import FederationError

_NOT_YET_VALID, _EXPIRED = 9, 10  # X509_V_ERR_CERT_..., which `ssl` has no names for
_BOUNDARY = re.compile(r"-----BEGIN ([^-]*)-----")
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----\s+([A-Za-z0-9+/=\s]+?)-----END CERTIFICATE-----")
_SEQUENCE = 0x30  # in DER


def only_certificate(pem: str) -> str:
    """Return the one certificate in a PEM text, encoded anew.

    Raises:
        FederationError: It is no certificate, or something stands beside it: another one, text, a key.
    """
    return ssl.DER_cert_to_PEM_cert(_only_der(pem))


def fingerprint_of(pem: str) -> str:
    """Return the SHA-256 of the one certificate in a PEM text.

    Raises:
        FederationError: It is no certificate, or something stands beside it.
    """
    return hashlib.sha256(_only_der(pem)).hexdigest()


def check_authorities(pem: str) -> None:
    """Check that a PEM text holds certificates and nothing else, text between them aside.

    Raises:
        FederationError: There is none, or there is a key or a certificate with trust settings of its own.
    """
    kinds = _BOUNDARY.findall(pem)
    for kind in kinds:
        if kind != "CERTIFICATE":
            raise FederationError(f"expected certificates only, found a block {kind[:40]!r}")
    blocks = _CERTIFICATE.findall(pem)
    if not blocks or len(blocks) != len(kinds):
        raise FederationError("this is no certificate in PEM format")
    for block in blocks:
        _decode(block)


def _only_der(pem: str) -> bytes:
    kinds = _BOUNDARY.findall(pem)
    if len(kinds) > 1:
        raise FederationError(
            f"expected one certificate, found {len(kinds)} blocks: {', '.join(kind[:40] for kind in kinds[:4])}"
        )
    found = _CERTIFICATE.fullmatch(pem.strip())
    if found is None:
        raise FederationError("this is no certificate in PEM format, or there is text beside it")
    return _decode(found[1])


def _decode(block: str) -> bytes:
    """Return the DER of a certificate from its base64 lines."""
    try:
        der = base64.b64decode("".join(block.split()), validate=True)
    except (ValueError, binascii.Error) as error:
        raise FederationError("this is no certificate in PEM format") from error
    if len(der) != _der_length(der):
        raise FederationError("this certificate is cut off, or more follows in its block")
    return der


def _der_length(der: bytes) -> int | None:
    """Return the length of a DER sequence with its header, or None."""
    if len(der) < 2 or der[0] != _SEQUENCE:
        return None
    if der[1] < 0x80:
        return 2 + der[1]
    count = der[1] & 0x7F
    return 2 + count + int.from_bytes(der[2 : 2 + count], "big")


def has_wrong_dates(error: BaseException) -> TypeGuard[ssl.SSLCertVerificationError]:
    """Tell whether a certificate is refused for its dates alone."""
    return isinstance(error, ssl.SSLCertVerificationError) and error.verify_code in (_NOT_YET_VALID, _EXPIRED)


def untrusted_certificate(
    error: BaseException, *, now: float | None = None, coordinator_now: float | None = None
) -> FederationError:
    """Return the error for a coordinator whose certificate cannot be verified.

    Args:
        error: The error of the verification.
        now: Time of this machine, in seconds since 1970; None: the present.
        coordinator_now: Time of the coordinator, if it is known.
    """
    cause = getattr(error, "verify_message", "") or str(error)
    if has_wrong_dates(error):
        clocks = f"it is {_moment(time.time() if now is None else now)} by the clock of this machine" + (
            "" if coordinator_now is None else f", {_moment(coordinator_now)} by that of the coordinator"
        )
        what = (
            "Set the clock that is wrong"
            if error.verify_code == _NOT_YET_VALID
            else "Set the clock that is wrong; if both are right, restart the coordinator, which renews its certificate"
        )
        return FederationError(f"the coordinator's certificate does not fit the clock here ({cause}): {clocks}. {what}")
    return FederationError(
        "the coordinator's certificate is not trusted: it is not the one that this site joined, or "
        "its authority is unknown here (REQUESTS_CA_BUNDLE names a file of authorities). Ask the "
        f"coordinating site ({cause})"
    )


def load_chain(context: ssl.SSLContext, certificate: str | Path, key: str | Path | None) -> None:
    """Let a context show a certificate.

    Raises:
        FederationError: The files are missing, do not belong together, or the key has a password.
    """
    files = f"{certificate} and {key}" if key else f"{certificate}"

    def refuse_to_ask() -> str:
        raise FederationError(
            f"{files} cannot be used for TLS: the key has a password, and nobody may be there to "
            "type it. Expected a key without one"
        )

    try:
        context.load_cert_chain(certificate, key, password=refuse_to_ask)
    except OSError as error:  # which ssl.SSLError is
        raise FederationError(
            f"{files} cannot be used for TLS: {error}. Expected the certificate (with those between "
            "it and its authority) and its key without a password, in PEM format"
        ) from error


def check_chain(certificate: str | Path, key: str | Path | None) -> None:
    """Check a certificate and its key, as `load_chain` does."""
    load_chain(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), certificate, key)


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
