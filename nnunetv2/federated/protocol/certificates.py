"""Know a certificate by its fingerprint, and ask a coordinator for the authority that vouches for it.

TLS libraries trust every certificate in a file that they are given, and pass over what is none. So a text is compared,
kept and handed on only if it is one certificate and nothing else.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import http.client
import re
import ssl
import time
import urllib.error
import urllib.request
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

from nnunetv2.federated.errors import CoordinatorUnreachable, FederationError
from nnunetv2.utilities.loopback import is_loopback

TIMEOUT_S = 20.0
CLOCK_TIMEOUT_S = 5.0
LARGEST_PEM = 64 << 10
_NOT_YET_VALID, _EXPIRED = 9, 10  # X509_V_ERR_CERT_..., which `ssl` has no names for
_BOUNDARY = re.compile(r"-----BEGIN ([^-]*)-----")
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----\s+([A-Za-z0-9+/=\s]+?)-----END CERTIFICATE-----")
_SEQUENCE = 0x30  # in DER


def only_certificate(pem: str) -> str:
    """Return the one certificate in a PEM text, encoded anew, so that nothing else comes along.

    Raises:
        FederationError: It is no certificate, or something stands beside it: another one, text, a key.
    """
    return ssl.DER_cert_to_PEM_cert(_only_der(pem))


def fingerprint_of(pem: str) -> str:
    """Return the SHA-256 of the one certificate in a PEM text, as 64 hexadecimal digits.

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
    """Return the bytes that a DER sequence says it has, with its header; None if it is none."""
    if len(der) < 2 or der[0] != _SEQUENCE:
        return None
    if der[1] < 0x80:
        return 2 + der[1]
    count = der[1] & 0x7F
    return 2 + count + int.from_bytes(der[2 : 2 + count], "big")


def has_wrong_dates(error: BaseException) -> bool:
    """Tell whether a certificate is refused for its dates alone: a matter of clocks, not of who answers."""
    return isinstance(error, ssl.SSLCertVerificationError) and error.verify_code in (_NOT_YET_VALID, _EXPIRED)


def untrusted_certificate(error: BaseException, url: str, *, now: float | None = None) -> FederationError:
    """Return the error for a coordinator whose certificate cannot be verified.

    Args:
        error: What the verification raised.
        url: Address of the coordinator. Where dates are the reason it is asked, unverified, what time it is there.
        now: Time of this machine, in seconds since 1970; None: the present.
    """
    cause = getattr(error, "verify_message", "") or str(error)
    if has_wrong_dates(error):
        there = coordinator_time(url)
        clocks = f"it is {_moment(time.time() if now is None else now)} by the clock of this machine" + (
            "" if there is None else f", {_moment(there)} by that of the coordinator"
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
    """Check that a certificate and its key can be shown; raise FederationError like `load_chain` if not."""
    load_chain(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), certificate, key)


def coordinator_time(url: str) -> float | None:
    """Return the time by the clock of what answers at an address, for a message; None if it does not say."""
    try:
        try:
            answer = _open_unverified(f"{url}/v1/authority", timeout_s=CLOCK_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            return parsedate_to_datetime(answer.headers["Date"]).timestamp()
    except (OSError, http.client.HTTPException, ValueError, TypeError):
        return None


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def fetch_authority(url: str, *, client_certificate: str | None = None, client_key: str | None = None) -> str:
    """Return the private authority of a coordinator as it says itself, in PEM; whoever asks compares the fingerprint.

    Nothing is verified here and nothing secret is sent. The text may be anything.

    Raises:
        CoordinatorUnreachable: Nobody answers.
        FederationError: This site's own certificate cannot be used.
    """
    try:
        with _open_unverified(f"{url}/v1/authority", certificate=client_certificate, key=client_key) as answer:
            return answer.read(LARGEST_PEM).decode("ascii")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise CoordinatorUnreachable(
            f"the coordinator at {url} does not tell its certificate authority: {error!s:.200}"
        ) from error


def _open_unverified(
    url: str, *, certificate: str | None = None, key: str | None = None, timeout_s: float = TIMEOUT_S
) -> http.client.HTTPResponse:
    """Ask whoever answers at an address, through the proxies of this system unless it is this machine."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if certificate is not None:
        load_chain(context, certificate, key)
    handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=context)]
    if is_loopback(urlsplit(url).hostname):
        handlers.append(urllib.request.ProxyHandler({}))
    return urllib.request.build_opener(*handlers).open(url, timeout=timeout_s)
