"""Send one HTTP request to a coordinator; map failures to three errors.

NoAnswerError     nobody answered, or something that is not the coordinator: asking again may help
NotJoinedError    the coordinator does not know this site
RefusedError      the coordinator says no, and why
"""

from __future__ import annotations

import errno
import re
import ssl
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import requests
from requests.adapters import HTTPAdapter

from nnunetv2.federated.errors import FederationError, NotJoinedError, RefusedError, in_sentences
from nnunetv2.federated.protocol.certificates import has_wrong_dates
from nnunetv2.federated.site.authority import explain_untrusted
from nnunetv2.federated.site.credential import SiteCredential
from nnunetv2.federated.site.transports.answers import ForeignAnswerError, decode_answer, describe_foreign, find_problem
from nnunetv2.utilities.loopback import is_on_this_machine
from nnunetv2.utilities.resumable_download import PIECE_BYTES

if TYPE_CHECKING:
    from pydantic import BaseModel

    from nnunetv2.federated.protocol.api import Problem

    Model = TypeVar("Model", bound=BaseModel)

BLOCK_BYTES = 1 << 20
"""Bytes that are sent at a time."""
LARGEST_ANSWER = 1 << 20
"""Bytes of an answer that is no file."""
SENT_AGAIN = ("damaged_in_transit", "wrong_offset", "taken_over")
"""Refusals of an upload that say nothing against the document itself."""
LONGEST_RETRY_AFTER_S = 3600.0
CONNECT_TIMEOUT_S = 10.0


class NoAnswerError(FederationError):
    """The coordinator did not answer properly, but may the next time.

    Args:
        text: The problem.
        wait_s: Seconds that the coordinator wants to be left alone for.
    """

    def __init__(self, text: str, wait_s: float = 0.0) -> None:
        super().__init__(text)
        self.wait_s = wait_s


class RangeError(NoAnswerError):
    """The rest of a result was asked for, and there is none."""


class BearerToken(requests.auth.AuthBase):
    """Put a token into every request; a plain header gives way to ~/.netrc."""

    def __init__(self, token: str) -> None:
        self.token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self.token}"
        return request


class Session(requests.Session):
    """A session whose own `verify` is not overruled by REQUESTS_CA_BUNDLE."""

    def merge_environment_settings(
        self,
        url: str | bytes | None,
        proxies: MutableMapping[str, str] | None,
        stream: bool | None,
        verify: bool | str | None,
        cert: str | tuple[str, str] | None,
    ) -> Any:
        settings = super().merge_environment_settings(url, proxies, stream, verify, cert)
        if self.verify is not True:
            settings["verify"] = self.verify
        return settings


def open_session(credential: SiteCredential, *, with_token: bool = True) -> requests.Session:
    """Return a session, through the system's proxies unless to this machine.

    The caller retries broken requests: urllib3 would do so with a warning each time, and without a word on its end.
    """
    session = Session()
    session.mount("http://", _Adapter())
    session.mount("https://", _Adapter())
    session.trust_env = not is_on_this_machine(credential.url)
    session.auth = BearerToken(credential.token) if with_token else None
    session.verify = credential.authority or True
    if credential.client_certificate is not None:
        session.cert = (
            (credential.client_certificate, credential.client_key)
            if credential.client_key
            else credential.client_certificate
        )
    return session


class _Adapter(HTTPAdapter):
    """Send files in larger blocks than the standard library's 16 KiB."""

    def init_poolmanager(self, *args: Any, **keywords: Any) -> None:
        super().init_poolmanager(*args, **keywords, blocksize=BLOCK_BYTES)


@contextmanager
def translated_errors() -> Iterator[None]:
    """Translate network errors into NoAnswerError; let everything else pass."""
    try:
        yield
    except requests.exceptions.SSLError as error:
        refused = find_verification_error(error)
        if refused is not None:
            url = "" if error.request is None else str(error.request.url)
            untrusted = explain_untrusted(refused, url.partition("/v1/")[0])
            # Clocks are set and certificates renewed while trainings wait; another authority stays another one.
            raise (NoAnswerError(str(untrusted)) if has_wrong_dates(refused) else untrusted) from error
        raise NoAnswerError(f"the encrypted connection to the coordinator broke ({_cause_of(error)})") from error
    except requests.exceptions.ProxyError as error:
        raise NoAnswerError(
            f"the proxy in the environment variable HTTPS_PROXY does not lead to the coordinator ({_cause_of(error)})"
        ) from error
    except requests.Timeout as error:
        raise NoAnswerError("the coordinator does not answer in time") from error
    except requests.RequestException as error:
        raise NoAnswerError(f"the coordinator cannot be reached ({_cause_of(error)})") from error


def find_verification_error(error: BaseException) -> ssl.SSLCertVerificationError | None:
    """Return the error of a certificate's verification from inside its layers."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = _inner_error(cause)
    return cause


def _inner_error(error: BaseException) -> BaseException | None:
    """Return the error that another one wraps, in any library's way."""
    reason = getattr(error, "reason", None)
    inner = next((part for part in error.args if isinstance(part, BaseException)), None)
    return reason if isinstance(reason, BaseException) else error.__cause__ or inner or error.__context__


def _cause_of(error: BaseException) -> str:
    """Return the system's own words for a network error, without the layers around them."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return (cause.strerror or errno.errorcode.get(cause.errno, str(cause.errno))).lower()
        if isinstance(cause, OSError) and str(cause).startswith("Tunnel connection failed"):
            return str(cause).lower()  # the proxy's words
        cause = _inner_error(cause)
    return "the connection broke"


def check_status(response: requests.Response) -> None:
    """Raise the error of an answer's problem document, if it is none of success.

    Only the coordinator's own word is final. A page of a proxy, or of a login, is as good as no answer.
    """
    status = response.status_code
    if status in (200, 202, 204, 206):
        return
    problem = _problem_of(response)
    if status == 416:
        raise RangeError("the coordinator has another result now than before")
    if problem is None:
        raise foreign_answer(response)
    if status in (408, 425, 429) or status >= 500 or problem.code in SENT_AGAIN:
        raise NoAnswerError(problem.message, _retry_after_s(response))
    if status == 401:
        raise NotJoinedError(in_sentences(problem.message, problem.remedy))
    raise RefusedError(problem.message, problem.remedy, code=problem.code)


def foreign_answer(response: requests.Response) -> NoAnswerError:
    """Return the error for an answer that does not come from the coordinator."""
    line = describe_foreign(
        response.url or "an unknown address", response.status_code, response.reason or "", response.headers
    )
    return NoAnswerError(line, _retry_after_s(response))


def read_answer(model: type[Model], response: requests.Response, largest: int = LARGEST_ANSWER) -> Model:
    """Read the body of a good answer.

    Raises:
        NoAnswerError: It was cut off, or does not come from the coordinator.
        WireError: The coordinator speaks another version.
    """
    content = read_small(response, largest)
    try:
        return decode_answer(model, content, response.headers)
    except ForeignAnswerError as error:
        raise foreign_answer(response) from error


def _retry_after_s(response: requests.Response) -> float:
    """Return the seconds of a Retry-After header; coordinators send no dates."""
    text = response.headers.get("Retry-After", "")
    return min(float(text), LONGEST_RETRY_AFTER_S) if re.fullmatch("[0-9]{1,9}", text) else 0.0


def _problem_of(response: requests.Response) -> Problem | None:
    """Return the problem document of an answer, or None."""
    return find_problem(read_small(response), response.headers)


def read_small(response: requests.Response, largest: int = LARGEST_ANSWER) -> bytes:
    """Read an answer that must not be larger than so many bytes.

    Raises:
        NoAnswerError: It is too large, or was cut off, in its headers maybe, which Python takes for complete ones.
    """
    content = bytearray()
    for piece in response.iter_content(PIECE_BYTES):
        content += piece
        if len(content) > largest:
            raise NoAnswerError(f"an answer has more than {largest} bytes, which no coordinator sends")
    if _is_cut_off(response, len(content)):
        raise NoAnswerError("the coordinator's answer was cut off")
    return bytes(content)


def _is_cut_off(response: requests.Response, size: int) -> bool:
    """Tell whether a body differs from its Content-Length, or has none."""
    if response.status_code == 204 or "Transfer-Encoding" in response.headers or "Content-Encoding" in response.headers:
        return False
    return response.headers.get("Content-Length") != str(size)
