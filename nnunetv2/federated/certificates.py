"""Know a certificate by its fingerprint, and ask a coordinator for the authority that vouches for it."""
from __future__ import annotations

import base64
import binascii
import hashlib
import re
import ssl
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from nnunetv2.federated.errors import CoordinatorUnreachable, FederationError
from nnunetv2.utilities.loopback import is_loopback

TIMEOUT_S = 20.0
LARGEST_PEM = 64 << 10
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


def untrusted_certificate(cause: str) -> FederationError:
    """Return the error for a coordinator whose certificate cannot be verified, with the system's words for it."""
    return FederationError("the coordinator's certificate is not trusted: it is not the one that this site joined, or "
                           "its authority is unknown here (REQUESTS_CA_BUNDLE names a file of authorities). Ask the "
                           f"coordinating site ({cause})")


def fetch_authority(url: str, *, client_certificate: str | None = None, client_key: str | None = None) -> str:
    """Return the private authority of a coordinator as it says itself, in PEM; whoever asks compares the fingerprint.

    Nothing is verified here and nothing secret is sent.

    Raises:
        CoordinatorUnreachable: Nobody answers.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if client_certificate is not None:
        context.load_cert_chain(client_certificate, client_key)
    handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=context)]
    if is_loopback(urlsplit(url).hostname):
        handlers.append(urllib.request.ProxyHandler({}))
    try:
        with urllib.request.build_opener(*handlers).open(f"{url}/v1/authority", timeout=TIMEOUT_S) as answer:
            return answer.read(LARGEST_PEM).decode("ascii")
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise CoordinatorUnreachable(f"the coordinator at {url} does not tell its certificate authority: {error}") \
            from error
