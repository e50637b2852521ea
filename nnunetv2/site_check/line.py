"""Check the way to the coordinator, from its name to bodies as large as weights."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import requests
from requests.utils import get_environ_proxies, select_proxy

from nnunetv2.experiment_planning.summary import format_bytes
from nnunetv2.federated.errors import FederationError, NotJoinedError, RefusedError, WireError, in_sentences
from nnunetv2.federated.protocol.api import LARGEST_REHEARSAL, FederationSettings
from nnunetv2.federated.protocol.certificates import fingerprint_of, has_wrong_dates
from nnunetv2.federated.protocol.invitation import check_transport_is_safe
from nnunetv2.federated.site import rehearsal
from nnunetv2.federated.site.authority import coordinator_time, fetch_authority
from nnunetv2.federated.site.credential import SiteCredential
from nnunetv2.federated.site.transports.http import HttpTransport
from nnunetv2.federated.site.transports.http_requests import (
    NoAnswerError,
    check_status,
    find_verification_error,
    open_session,
    read_answer,
    translated_errors,
)
from nnunetv2.site_check.findings import Finding
from nnunetv2.utilities.durations import format_duration
from nnunetv2.utilities.loopback import is_on_this_machine

CONNECT_TIMEOUT_S = 8.0
ANSWER_TIMEOUT_S = 15.0
WORTH_A_LOOK_S = 60.0
TOO_MUCH_S = 300.0
"""By which a clock may be off."""
PASSAGE_S = 12.0
"""In which as much as possible of a large body is sent, and fetched."""
PROBE_S = 3.0
"""In which a body that is too large for the time shows whether it would be let through."""
_WRONG_NAME = 62, 64  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH

_finding = partial(Finding, area="line")


@dataclass(frozen=True)
class Line:
    """The way to the coordinator as far as it is known."""

    findings: list[Finding] = field(default_factory=list)
    settings: FederationSettings | None = None
    up: rehearsal.Passage | None = None
    down: rehearsal.Passage | None = None


class _StopError(Exception):
    """The way ends here; the finding says why."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.sentence)
        self.finding = finding


def check_line(
    credential: SiteCredential, document_bytes: int, *, may_send: bool = True, now: Callable[[], float] = time.time
) -> Line:
    """Go the way of a round, step by step, as far as it leads.

    Args:
        document_bytes: Size of the weights that travel each round.
        may_send: Whether bytes without content may be sent.
        now: Time of this machine, in seconds since 1970.
    """
    line = Line()
    try:
        check_transport_is_safe(credential.url, insecure=credential.insecure)
        line.findings.append(_connect(credential.url))
        answer, clock = _ask_for_settings(credential, now)
        line.findings.extend([answer[1], clock])
        line = replace(line, settings=answer[0])
        if credential.through is not None:
            sentence = f"No dummy round: {credential.through} carries all traffic, and only its gateway is here."
            return _with(line, _finding(name="dummy_round_refused", state="note", sentence=sentence))
        if not may_send:
            sentence = "No dummy round: this site's allow-list is for another coordinator."
            return _with(line, _finding(name="dummy_round_refused", state="note", sentence=sentence))
        with HttpTransport(credential, report=lambda _: None, timeout_s=ANSWER_TIMEOUT_S) as transport:
            return _rehearse(line, transport, document_bytes)
    except _StopError as stop:
        line.findings.append(stop.finding)
    except FederationError as error:
        line.findings.append(_finding(name="line", state="problem", sentence=str(error), remedy=_ASK))
    return line


_ASK = "Show this line to the coordinating site."
_FIREWALL = "Ask your network administrators for outbound HTTPS to that address and port, nothing inbound."


# ------------------------------------------------------------------------------------------------ step by step
def _connect(url: str) -> Finding:
    """Open a connection to the coordinator, or to the proxy that leads there."""
    proxy = None if is_on_this_machine(url) else select_proxy(url, get_environ_proxies(url))
    place = urlsplit(proxy if proxy is None or "//" in proxy else f"//{proxy}") if proxy else urlsplit(url)
    what = "the proxy" if proxy else "the coordinator"
    host, port = place.hostname or "", place.port or {"https": 443, "http": 80}.get(place.scheme, 3128)
    where = f"{what} at {host}:{port}"
    remedy = "Correct the environment variable HTTPS_PROXY." if proxy else "Ask whether the coordinator runs there."
    try:
        begun = time.monotonic()
        with socket.create_connection((host, port), CONNECT_TIMEOUT_S):
            milliseconds = 1000 * (time.monotonic() - begun)
    except socket.gaierror as error:
        sentence = f"The name of {where} is not known here ({error.strerror})."
        remedy = f"Check the spelling and this machine's name servers. {remedy if proxy else ''}".strip()
        raise _StopError(_finding(name="name_unknown", state="problem", sentence=sentence, remedy=remedy)) from error
    except ConnectionRefusedError as error:
        name = "proxy_down" if proxy else "coordinator_down"
        sentence = f"Nothing listens at {host}:{port}, where {what} should be."
        remedy = f"{remedy} The invitation holds its address and port."
        raise _StopError(_finding(name=name, state="problem", sentence=sentence, remedy=remedy)) from error
    except OSError as error:
        sentence = f"No connection to {where} comes about within {CONNECT_TIMEOUT_S:.0f} s ({error})."
        raise _StopError(_finding(name="no_way", state="problem", sentence=sentence, remedy=_FIREWALL)) from error
    return _finding(name="connection", state="ok", sentence=f"A connection to {where} takes {milliseconds:.0f} ms.")


def _ask_for_settings(
    credential: SiteCredential, now: Callable[[], float]
) -> tuple[tuple[FederationSettings, Finding], Finding]:
    """Ask the first question of every training, and look at the clock of the answer."""
    url = credential.url
    try:
        with open_session(credential) as session:
            asked = now()
            response = session.get(
                f"{url}/v1/settings", timeout=(CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S), stream=True, allow_redirects=False
            )
            answered = now()
            with response, translated_errors():
                check_status(response)
                settings = read_answer(FederationSettings, response)
    except requests.exceptions.SSLError as error:
        raise _StopError(_explain_tls(error, credential, now)) from error
    except requests.exceptions.ProxyError as error:
        sentence = f"The proxy does not lead to {url}: {_innermost(error)}."
        remedy = "Ask your network administrators to let CONNECT to that address and port through, without a login."
        raise _StopError(_finding(name="proxy_refuses", state="problem", sentence=sentence, remedy=remedy)) from error
    except (requests.RequestException, OSError) as error:
        sentence = f"A connection to {url} comes about, but no answer ({_innermost(error)})."
        raise _StopError(_finding(name="no_answer", state="problem", sentence=sentence, remedy=_FIREWALL)) from error
    except NotJoinedError as error:
        sentence = f"The coordinator does not accept the credential of site {credential.site}: {error}"
        remedy = "Ask the coordinating site for a new invitation, and join with nnUNetv2_fed_join INVITE --replace."
        raise _StopError(
            _finding(name="credential_refused", state="problem", sentence=sentence, remedy=remedy)
        ) from error
    except WireError as error:
        sentence = f"The coordinator speaks another version than this site: {error}"
        remedy = "Install the version that the coordinating site names, at this site or there."
        raise _StopError(_finding(name="version", state="problem", sentence=sentence, remedy=remedy)) from error
    except NoAnswerError as error:
        sentence = f"Something else than the coordinator answers: {error}"
        remedy = (
            "Check address and port in the invitation, and ask your network administrators for login pages and filters."
        )
        raise _StopError(
            _finding(name="not_the_coordinator", state="problem", sentence=sentence, remedy=remedy)
        ) from error
    except RefusedError as error:
        sentence = f"The coordinator refuses to answer: {in_sentences(error.message, error.remedy)}"
        raise _StopError(_finding(name="refused", state="problem", sentence=sentence, remedy=_ASK)) from error
    sites = ", ".join(settings.sites)
    sentence = f"The coordinator of {settings.federation} knows site {credential.site}; its sites: {sites}."
    clock = _compare_clocks(response.headers.get("Date", ""), asked, answered)
    return (settings, _finding(name="credential", state="ok", sentence=sentence)), clock


def _compare_clocks(date: str, asked: float, answered: float) -> Finding:
    try:
        coordinator = parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError):
        return _finding(name="clock", state="note", sentence="The coordinator does not tell the time.")
    off = max(0.0, asked - coordinator - 1, coordinator - answered)  # it tells whole seconds
    if off <= WORTH_A_LOOK_S:
        return _finding(name="clock", state="ok", sentence="The clocks here and at the coordinator agree.")
    order = "ahead of" if asked > coordinator else "behind"
    return _finding(
        name="clock_off",
        state="problem" if off > TOO_MUCH_S else "warning",
        sentence=f"The clock of this machine is {format_duration(off)} {order} the coordinator's.",
        remedy="Let this machine set its clock by the network (timedatectl set-ntp true); if it does, tell the "
        "coordinating site. Certificates and logs go by clocks.",
    )


def _explain_tls(error: requests.exceptions.SSLError, credential: SiteCredential, now: Callable[[], float]) -> Finding:
    """Tell why the coordinator's certificate is not believed."""
    refused, url = find_verification_error(error), credential.url
    finding = partial(_finding, state="problem")
    if refused is None:
        sentence = f"What answers at {url} does not speak TLS as a coordinator does ({_innermost(error)})."
        remedy = "Check the port, and whether the address begins with http:// or https://; ask the coordinating site."
        return finding(name="no_tls", sentence=sentence, remedy=remedy)
    if has_wrong_dates(refused):
        there = coordinator_time(url)
        if there is not None and abs(there - now()) > TOO_MUCH_S:
            sentence = (
                f"The coordinator's certificate is not valid by the clock of this machine, which is "
                f"{format_duration(abs(there - now()))} {'ahead of' if now() > there else 'behind'} the coordinator's."
            )
            remedy = "Let this machine set its clock by the network (timedatectl set-ntp true)."
            return finding(name="clock_off", sentence=sentence, remedy=remedy)
        sentence = f"The certificate of {url} is out of date ({refused.verify_message}), and the clocks agree."
        remedy = "Ask the coordinating site to renew it: a coordinator with its own authority does so when restarted."
        return finding(name="certificate_expired", sentence=sentence, remedy=remedy)
    if refused.verify_code in _WRONG_NAME:
        sentence = f"The certificate of {url} is for another name ({refused.verify_message})."
        remedy = "Ask the coordinating site for the address that its certificate names, or to start it with that --url."
        return finding(name="certificate_name", sentence=sentence, remedy=remedy)
    if credential.authority is None:
        sentence = f"The certificate of {url} comes from an authority that is unknown here ({refused.verify_message})."
        remedy = (
            "If your hospital inspects TLS, ask for an exception for this address, or let REQUESTS_CA_BUNDLE name its "
            "authority; else ask the coordinating site which authority it has."
        )
        return finding(name="certificate_foreign", sentence=sentence, remedy=remedy)
    if _is_another_authority(credential):
        sentence = f"The coordinator at {url} has another authority than the one that this site has joined."
        remedy = (
            "Ask the coordinating site by telephone whether it was set up anew; if so, join with a new invitation and "
            "--replace. If not, somebody is in between."
        )
        return finding(name="authority_changed", sentence=sentence, remedy=remedy)
    sentence = f"Something between here and {url} shows a certificate of its own ({refused.verify_message})."
    remedy = "Ask your network administrators to except this address from the inspection of TLS."
    return finding(name="certificate_foreign", sentence=sentence, remedy=remedy)


def _is_another_authority(credential: SiteCredential) -> bool:
    """Tell whether who answers names another authority than the pinned one."""
    try:
        told = fetch_authority(credential.url)
        pinned = Path(credential.authority or "").read_text(encoding="ascii")
        return fingerprint_of(told) != fingerprint_of(pinned)
    except (FederationError, OSError, ValueError):
        return False


# ------------------------------------------------------------------------------------------------ the dummy round
def _rehearse(line: Line, transport: HttpTransport, document_bytes: int) -> Line:
    """Send and fetch bytes without content: few of them, then as many as weights have."""
    size = max(rehearsal.SMALL_BYTES, min(document_bytes, LARGEST_REHEARSAL))
    try:
        small = rehearsal.send(transport, rehearsal.SMALL_BYTES, limit_s=PASSAGE_S)
        if not small.is_whole:
            sentence = f"The line carries {small.bytes_per_s:,.0f} bytes per second, too few for a dummy round."
            note = _finding(name="dummy_round_too_slow", state="note", sentence=sentence)
            return replace(_with(line, note), up=small, down=small)
        rehearsal.fetch(transport, rehearsal.SMALL_BYTES, limit_s=PASSAGE_S)
    except RefusedError as error:
        return _with(line, _explain_refusal(error))
    except NoAnswerError as error:
        sentence = f"Questions are answered, but a small upload does not arrive: {error}"
        remedy = "Ask your network administrators to let PUT requests to this address through."
        return _with(line, _finding(name="uploads_refused", state="problem", sentence=sentence, remedy=remedy))
    cut = partial(_explain_cut, format_bytes(size))
    try:
        up = rehearsal.measure_upload(transport, size, limit_s=PASSAGE_S)
    except (RefusedError, NoAnswerError) as error:
        return _with(line, cut(error, what="body"))
    try:
        down = _when_free(lambda: rehearsal.fetch(transport, size, limit_s=PASSAGE_S))
    except (RefusedError, NoAnswerError) as error:
        return _with(replace(line, up=up), cut(error, what="answer"))
    line = replace(line, up=up, down=down)
    is_whole = up.num_bytes == down.num_bytes == size
    try:
        if up.num_bytes < size:  # begun all the same, so that whatever bounds bodies refuses it
            _when_free(lambda: rehearsal.send(transport, size, limit_s=PROBE_S))
    except NoAnswerError as error:
        return _with(line, cut(error, what="body"))
    except RefusedError as error:
        return _with(line, _explain_refusal(error))
    part = "" if is_whole else ", as far as it came in the time of this check"
    sentence = (
        f"A dummy round of {format_bytes(size)} each way{part}: {8 * up.bytes_per_s / 1e6:,.1f} Mbit/s up, "
        f"{8 * down.bytes_per_s / 1e6:,.1f} Mbit/s down."
    )
    return _with(line, _finding(name="dummy_round", state="ok", sentence=sentence))


def _when_free(rehearse: Callable[[], rehearsal.Passage]) -> rehearsal.Passage:
    """Rehearse, once the coordinator has noticed that a rehearsal before was broken off."""
    for pause_s in (0.2, 0.5, 1, 2, 4):
        try:
            return rehearse()
        except RefusedError as error:
            if error.code != "refused":
                raise
            time.sleep(pause_s)
    return rehearse()


def _explain_cut(size: str, error: FederationError, *, what: Literal["body", "answer"]) -> Finding:
    """Return the finding on large bodies or answers that do not arrive."""
    if isinstance(error, RefusedError):
        return _explain_refusal(error)
    if what == "body":
        return _finding(
            name="large_bodies_cut",
            state="problem",
            sentence=f"A body of {size}, the size of the weights, does not get through, smaller ones do: {error}",
            remedy="Ask who runs the proxy on the way, here or at the coordinating site, to lift its bound on the size "
            "and duration of requests (client_max_body_size 0 in nginx).",
        )
    return _finding(
        name="large_answers_cut",
        state="problem",
        sentence=f"A download of {size}, the size of the weights, does not come whole: {error}",
        remedy="Ask who runs the proxy on the way to lift its bound on the size and duration of answers.",
    )


def _explain_refusal(error: RefusedError) -> Finding:
    if error.code == "unknown_path":
        return _finding(
            name="version_older",
            state="warning",
            sentence="The coordinator is of an older version, which knows no dummy round: the line is not measured.",
            remedy="Ask the coordinating site to update; federations of both versions work.",
        )
    return _finding(
        name="dummy_round_refused",
        state="note",
        sentence=f"The coordinator does not rehearse now: {error.message}.",
        remedy=error.remedy,
    )


def _with(line: Line, finding: Finding) -> Line:
    return replace(line, findings=[*line.findings, finding])


def _innermost(error: BaseException) -> str:
    """Return the system's own words, without the layers around them."""
    cause: BaseException = error
    while True:
        reason = getattr(cause, "reason", None)
        inner = reason if isinstance(reason, BaseException) else None
        inner = inner or next((part for part in cause.args if isinstance(part, BaseException)), None) or cause.__cause__
        if inner is None or isinstance(cause, ssl.SSLError):
            return " ".join(str(cause).split())[:200]
        cause = inner
