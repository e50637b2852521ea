"""Know a certificate by its fingerprint, and ask a coordinator for the authority that vouches for it."""
from __future__ import annotations

import base64
import binascii
import hashlib
import re
import ssl
import time
import urllib.error
import urllib.request
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from nnunetv2.federated.errors import CoordinatorUnreachable, FederationError

if TYPE_CHECKING:
    import http.client

TIMEOUT_S = 20.0
CLOCK_TIMEOUT_S = 5.0
LARGEST_PEM = 64 << 10
_NOT_YET_VALID, _EXPIRED = 9, 10  # X509_V_ERR_CERT_..., which `ssl` has no names for
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----\s+([A-Za-z0-9+/=\s]+?)-----END CERTIFICATE-----")


def fingerprint_of(pem: str) -> str:
    """Return the SHA-256 of the first certificate in a PEM text, as 64 hexadecimal digits.

    Raises:
        FederationError: There is none.
    """
    found = _PEM.search(pem)
    try:
        return hashlib.sha256(base64.b64decode("".join(found[1].split()), validate=True)).hexdigest()
    except (TypeError, ValueError, binascii.Error) as error:
        raise FederationError("this is no certificate in PEM format") from error


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
            "" if there is None else f", {_moment(there)} by that of the coordinator")
        what = "Set the clock that is wrong" if error.verify_code == _NOT_YET_VALID else \
            "Set the clock that is wrong, or, if both are right, restart the coordinator, which renews its certificate"
        return FederationError(f"the coordinator's certificate does not fit the clock here ({cause}): {clocks}. {what}")
    return FederationError("the coordinator's certificate is not trusted: it is not the one that this site joined, or "
                           "its authority is unknown here (REQUESTS_CA_BUNDLE names a file of authorities). Ask the "
                           f"coordinating site ({cause})")


def coordinator_time(url: str) -> float | None:
    """Return the time by the clock of what answers at an address, for a message; None if it does not say."""
    try:
        with _open_unverified(f"{url}/v1/authority", timeout_s=CLOCK_TIMEOUT_S) as answer:
            return parsedate_to_datetime(answer.headers["Date"]).timestamp()
    except urllib.error.HTTPError as error:
        with error:
            return None if error.headers["Date"] is None else parsedate_to_datetime(error.headers["Date"]).timestamp()
    except (OSError, ValueError, TypeError):
        return None


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def fetch_authority(url: str, *, client_certificate: str | None = None, client_key: str | None = None) -> str:
    """Return the private authority of a coordinator as it says itself, in PEM; whoever asks compares the fingerprint.

    Nothing is verified here and nothing secret is sent.

    Raises:
        CoordinatorUnreachable: Nobody answers.
    """
    try:
        with _open_unverified(f"{url}/v1/authority", certificate=client_certificate, key=client_key) as answer:
            return answer.read(LARGEST_PEM).decode("ascii")
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise CoordinatorUnreachable(f"the coordinator at {url} does not tell its certificate authority: {error}") \
            from error


def _open_unverified(url: str, *, certificate: str | None = None, key: str | None = None,
                     timeout_s: float = TIMEOUT_S) -> http.client.HTTPResponse:
    """Ask whoever answers at an address, through the proxies of this system unless it is this machine."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=context)]
    if urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1"):
        handlers.append(urllib.request.ProxyHandler({}))
    return urllib.request.build_opener(*handlers).open(url, timeout=timeout_s)
