"""Fetch the certificate authority and the time of an untrusted coordinator.

Nothing is verified here and nothing secret is sent.
"""

from __future__ import annotations

import http.client
import ssl
import urllib.error
from email.utils import parsedate_to_datetime

from nnunetv2.federated.errors import CoordinatorUnreachable, FederationError
from nnunetv2.federated.protocol.certificates import has_wrong_dates, load_chain, untrusted_certificate
from nnunetv2.federated.site.transports.opener import open_url

TIMEOUT_S = 20.0
CLOCK_TIMEOUT_S = 5.0
LARGEST_PEM = 64 << 10


def fetch_authority(url: str, *, client_certificate: str | None = None, client_key: str | None = None) -> str:
    """Return the private authority of a coordinator in PEM, unverified.

    The text may be anything.

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


def coordinator_time(url: str) -> float | None:
    """Return a coordinator's time, in seconds since 1970, or None."""
    try:
        answer: http.client.HTTPResponse | urllib.error.HTTPError
        try:
            answer = _open_unverified(f"{url}/v1/authority", timeout_s=CLOCK_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            return parsedate_to_datetime(answer.headers["Date"]).timestamp()
    except (OSError, http.client.HTTPException, ValueError, TypeError):
        return None


def explain_untrusted(error: BaseException, url: str) -> FederationError:
    """Return the error for a refused certificate, with both clocks if dates matter."""
    return untrusted_certificate(error, coordinator_now=coordinator_time(url) if has_wrong_dates(error) else None)


def _open_unverified(
    url: str, *, certificate: str | None = None, key: str | None = None, timeout_s: float = TIMEOUT_S
) -> http.client.HTTPResponse:
    """Send a request to a server without verifying it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if certificate is not None:
        load_chain(context, certificate, key)
    return open_url(url, context=context, timeout_s=timeout_s)
