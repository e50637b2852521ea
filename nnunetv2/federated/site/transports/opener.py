"""Open a URL with the standard library, where `requests` is not installed.

No redirect is followed, so a token goes nowhere else; no proxy is used for servers on this machine.
"""

from __future__ import annotations

import urllib.request
from typing import TYPE_CHECKING

from nnunetv2.utilities.loopback import is_on_this_machine

if TYPE_CHECKING:
    import http.client
    import ssl


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


def open_url(
    request: str | urllib.request.Request, *, context: ssl.SSLContext, timeout_s: float
) -> http.client.HTTPResponse:
    """Send one request, through the system's proxies unless to this machine.

    Raises:
        urllib.error.HTTPError: The status of the answer is not a good one.
        OSError: Nobody answers.
    """
    url = request if isinstance(request, str) else request.full_url
    handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=context), _NoRedirects()]
    if is_on_this_machine(url):
        handlers.append(urllib.request.ProxyHandler({}))
    answer: http.client.HTTPResponse = urllib.request.build_opener(*handlers).open(request, timeout=timeout_s)
    return answer
