"""Contribute, wait and download over HTTP, with retries that survive network failures and restarts.

The site only ever asks; nobody calls it. Every request may be repeated, so a broken connection, a coordinator that is
down for hours and a site that was killed have one remedy: ask again.
"""

from __future__ import annotations

import logging
import os
import random
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol, TypeVar
from urllib.parse import quote

import numpy as np
import requests
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

from nnunetv2.federated.errors import CoordinatorUnreachable, FederationError, StillOpenError, WireError
from nnunetv2.federated.exchanges.steps import step_of
from nnunetv2.federated.privacy import allow_list, require_secure
from nnunetv2.federated.protocol import api, messages
from nnunetv2.federated.protocol.document import Document, OutgoingDocument, TensorSpec, open_document
from nnunetv2.federated.protocol.invitation import check_transport_is_safe
from nnunetv2.federated.protocol.keys import ExchangeKey, Q, R
from nnunetv2.federated.protocol.strict_json import encode_json
from nnunetv2.federated.site import results
from nnunetv2.federated.site.credential import SiteCredential
from nnunetv2.federated.site.transports.http_requests import (
    CONNECT_TIMEOUT_S,
    LARGEST_ANSWER,
    NoAnswerError,
    RangeError,
    check_status,
    foreign_answer,
    open_session,
    read_answer,
    translated_errors,
)
from nnunetv2.utilities.plain_text import printable
from nnunetv2.utilities.resumable_download import PartialDownload
from nnunetv2.utilities.size_limits import OversizedError

if TYPE_CHECKING:
    from pydantic import BaseModel

    Model = TypeVar("Model", bound=BaseModel)

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")
Action = Literal["pause", "resume", "stop", "reset", "proceed", "leave", "return"]

GIVE_UP_AFTER_S = 86_400.0
GIVE_UP_VARIABLE = "nnUNet_fed_give_up_after_h"
TIMEOUT_S = 60.0
POLL_S = 25.0
"""How long the coordinator may hold an answer back while it waits for other sites."""
FAILURE_TIMEOUT_S = 3.0
TRYING_AGAIN = "; trying again"
_MOMENT = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
LONGEST_PAUSE_S = 60.0
LARGEST_STATUS = 32 << 20
"""Bytes: it lists sites for every run and open exchange."""
OFFER_FROM_BYTES = 64 << 10
"""From this size on, a document is announced before it is sent."""


def patience_from_environment() -> float:
    """Return the seconds after which an absent coordinator is given up.

    Raises:
        ValueError: The environment variable holds no number of hours.
    """
    text = os.environ.get(GIVE_UP_VARIABLE)
    if text is None:
        return GIVE_UP_AFTER_S
    try:
        hours = float(text)
    except ValueError:
        hours = -1.0
    if not 0 <= hours < float("inf"):
        raise ValueError(f"{GIVE_UP_VARIABLE} is {text!r}: set it to a number of hours, such as 48")
    return hours * 3600


class Body(Protocol):
    """A body of known length that is read piece by piece."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[bytes]: ...

    def tell(self) -> int: ...

    def read(self, size: int = -1, /) -> bytes: ...


class HttpTransport:
    """A `Transport` over HTTP, for one thread at a time.

    Args:
        credential: Who the site is, and where the coordinator.
        report: Receives a line of progress at every change, such as of the awaited sites.
        give_up_after_s: How long the coordinator may be away before `CoordinatorUnreachable` is raised. None: as the
            environment variable nnUNet_fed_give_up_after_h says, else a day.
        timeout_s: How long a connection may be silent before it counts as broken.
        pause_s: First pause before asking again; it doubles up to a minute.
    """

    def __init__(
        self,
        credential: SiteCredential,
        *,
        report: Callable[[str], object] = logger.info,
        give_up_after_s: float | None = None,
        timeout_s: float = TIMEOUT_S,
        pause_s: float = 1.0,
    ) -> None:
        check_transport_is_safe(credential.url, insecure=credential.insecure)
        self.credential = credential
        self.give_up_after_s = patience_from_environment() if give_up_after_s is None else give_up_after_s
        self.timeout_s = timeout_s
        self.pause_s = pause_s
        self._report = report
        self._last_line: str | None = None
        self._session = open_session(credential)
        self._folder = tempfile.TemporaryDirectory(prefix="nnunet-federated-", ignore_cleanup_errors=True)
        self._document: Document[Any] | None = None
        self._number = 0
        self._num_cases: int | None = None
        """Cases of all sites, once the coordinator has said it."""
        self._sizes = results.ResultSizes()
        self._is_closing = threading.Event()

    def close(self) -> None:
        """Close connections and remove temporary files. The last result cannot be read any more.

        An exchange that another thread is waiting for ends with an error, at the latest with its next request.
        """
        self._is_closing.set()
        self._forget_document()
        self._session.close()
        self._folder.cleanup()

    def __enter__(self) -> HttpTransport:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------- exchanges
    def exchange(
        self,
        key: ExchangeKey[Q, R],
        message: Q,
        tensors: Mapping[str, np.ndarray] | None = None,
        *,
        specs: Mapping[str, TensorSpec] | None = None,
        since: str | None = None,
        told: Callable[[bool], object] = lambda counts: None,
    ) -> Document[R]:
        """Contribute to an exchange, and return its result once it closes.

        Args:
            tensors: Name -> array of a dtype that travels.
            specs: Dtype and shape of the tensors, where they are not to be taken from the arrays.
            since: SHA-256 of the aggregate before, as this site has received it; see `Transport.exchange`.
            told: Told whether this contribution counts, or another one of this site that the coordinator holds.

        Returns:
            The result. It stays open until the next call of `exchange` or `result`. A round that took place without
            this site gives the aggregate of the last round; its message says which.

        Raises:
            RefusedError: The contribution is not accepted, or the contributions do not go together.
            NotJoinedError: The coordinator does not know this site.
            CoordinatorUnreachable: It did not answer for `give_up_after_s`.
            WireError: Its answer is not the result of such an exchange, or larger than that can be.
        """
        receipt = self.contribute(key, message, tensors, specs=specs, told=told)
        counted_in = results.check_receipt(key, receipt.key)
        document = self.result(counted_in, since=since if counted_in == key else None)
        if receipt.already and is_late(self.credential.site, key, document.message):
            self._say(f"{key}: this site's update came when the round was closed already: it did not count")
        return document

    def contribute(
        self,
        key: ExchangeKey[Q, Any],
        message: Q,
        tensors: Mapping[str, np.ndarray] | None = None,
        *,
        specs: Mapping[str, TensorSpec] | None = None,
        patience_s: float | None = None,
        told: Callable[[bool], object] = lambda counts: None,
    ) -> api.Receipt:
        """Send this site's part of an exchange. Doing so again changes nothing.

        This is the one place where documents leave the site, checked against its allow-list.

        Args:
            patience_s: How long the coordinator may be away, where that differs from `give_up_after_s`.
            told: See `exchange`.

        Raises:
            NotAllowedError: The allow-list of this site does not name a field or tensor, or the message is in clear
                and this site requires secure sums; nothing was sent.
        """
        self._sizes.note(key, message)
        tensors = tensors or {}
        specs = specs if specs is not None else {name: TensorSpec.of(values) for name, values in tensors.items()}
        require_secure.check_message(key, message, self.credential.secure)
        allow_list.check_document(message, specs, url=self.credential.coordinator)
        document = OutgoingDocument(message, specs, tensors)
        offer = api.Offer(digest=document.digest, size=document.size)
        attempts = 0

        def send() -> api.Receipt:
            nonlocal attempts
            attempts += 1
            # A large document, or one whose receipt may have been lost, is announced before it is sent.
            answer: api.Receipt | api.Wanted = api.Wanted()
            if offer.size >= OFFER_FROM_BYTES or attempts > 1:
                answer = self._offer(key, offer)
            return answer if isinstance(answer, api.Receipt) else self._upload(key, document, answer.offset)

        receipt = self._persist(send, patience_s)
        is_another = receipt.already and receipt.digest != document.digest
        told(not is_another)
        if is_another:
            self._say(
                f"{key}: the coordinator holds another contribution of this site, which counts; what was sent "
                "now is dropped. A second training with this site's credential, or one that was started again"
            )
        elif receipt.key:
            self._say(f"{key} was closed before this site's update came: it counts in {receipt.key}")
        return receipt

    def result(self, key: ExchangeKey[Any, R], *, wait_s: float | None = None, since: str | None = None) -> Document[R]:
        """Wait until an exchange is closed and return its result; see `exchange`, and `Transport.result`."""
        self._forget_document()
        deadline = None if wait_s is None else time.monotonic() + wait_s
        step, largest = step_of(key), self._sizes.largest(key)
        download = PartialDownload(self._new_path(), largest=largest)
        # The first answer comes at once, so that people see whom they wait for.
        waiting = self._persist(lambda: self._poll(key, download, wait_s=0, since=since))
        while waiting is not None:
            if waiting.paused:
                self._say(f"{key}: the operator has paused the run")
            elif waiting.waiting_for:
                self._say(f"{key}: waiting for {', '.join(waiting.waiting_for)}")
            elif waiting.lacks:
                self._say(
                    f"{key}: too few sites take part at the moment, waiting for {waiting.lacks} more "
                    "(--min-sites or --quorum of the coordinator)"
                )
            left_s = POLL_S if deadline is None else min(POLL_S, deadline - time.monotonic())
            if left_s <= 0:
                raise StillOpenError(f"{key} was not closed within {wait_s:g} s")
            waiting = self._persist(lambda: self._poll(key, download, wait_s=left_s, since=since))  # noqa: B023 - called at once
        limits = replace(step.result_limits(self._num_cases), file_bytes=largest)
        self._document = document = open_document(download.path, limits=limits)
        try:
            step.check_result(key, document.message)
        except WireError:
            self._forget_document()
            raise
        if isinstance(document.message, messages.PooledCensus):
            self._num_cases = document.message.num_cases
        return document

    # ------------------------------------------------------------------------------------------------- questions
    def settings(self, *, patience_s: float | None = None) -> api.FederationSettings:
        """Return the settings of the federation."""
        return self._persist(lambda: self._ask("GET", "settings", api.FederationSettings), patience_s)

    def roster(self) -> api.Roster:
        """Return the identities of the sites, as the coordinator tells them."""
        return self._persist(lambda: self._ask("GET", "roster", api.Roster))

    def run_state(self, run: str, *, plans: str | None = None) -> api.RunState:
        """Return the state of a run; with `plans`, of the one with these plans."""
        query = "" if plans is None else f"?plans={quote(plans, safe='')}"
        return self._persist(lambda: self._ask("GET", f"runs/{quote(run)}{query}", api.RunState))

    def outlooks(self) -> api.Outlooks:
        """Return which runs will have a common model, and why others will not."""
        return self._persist(lambda: self._ask("GET", "outlooks", api.Outlooks))

    def fetch_model(self, run: str, path: Path, *, largest: int) -> None:
        """Download the model of a finished run, a zip file, resuming as needed.

        Args:
            largest: Bytes that it may have.

        Raises:
            RefusedError: The run goes on, or the coordinator keeps no model of it.
            WireError: It is larger.
        """
        download = PartialDownload(path, largest=largest)
        self._persist(lambda: self._download(f"runs/{quote(run)}/model", download))

    def act(self, run: str, action: Action, exchange: str | None = None) -> api.RunState:
        """Steer a run as an operator, or leave and return as a site."""
        body = api.RunAction(action=action, gathering=exchange)
        return self._persist(lambda: self._ask("POST", f"runs/{quote(run)}/actions", api.RunState, json_body=body))

    def status(self) -> api.Status:
        """Return the status of the federation."""
        return self._persist(lambda: self._ask("GET", "status", api.Status, largest=LARGEST_STATUS))

    def report_failure(self, run: str, round_number: int | None, reason: str) -> None:
        """Report a failure of this site, if the coordinator answers at once. Never raises.

        With a connection of its own: the other one may be in use by a thread that waits for a round.
        """
        timeout_s = min(FAILURE_TIMEOUT_S, self.timeout_s)
        try:
            report = api.FailureReport(run=run, round=round_number, reason=reason[:8000])
            allow_list.check_body("failure_report", report, url=self.credential.coordinator)
            with (
                open_session(self.credential) as session,
                translated_errors(),
                session.post(
                    f"{self.credential.url}/v1/failures",
                    data=encode_json(report),
                    timeout=timeout_s,
                    stream=True,
                    allow_redirects=False,
                ) as response,
            ):
                check_status(response)
                if response.status_code != 204:
                    raise foreign_answer(response)
        except (FederationError, ValueError) as error:
            logger.warning("the coordinator could not be told of the failure: %s", error)

    # ------------------------------------------------------------------------------------------------- rehearsals
    def rehearse_upload(self, body: Body, digest: str) -> api.Rehearsed:
        """Send a rehearsal body once, as a document; the coordinator discards it.

        Args:
            body: An exception of its `read` ends the request.
            digest: SHA-256 of all of it.

        Raises:
            NoAnswerError: It did not arrive, or something on the way refused it.
            RefusedError: The coordinator does not take it; one that is older has the code `unknown_path`.
        """
        with self._request("PUT", "rehearsal", data=body, headers={"X-Content-SHA256": digest}) as response:
            return read_answer(api.Rehearsed, response)

    @contextmanager
    def rehearse_download(self, size: int) -> Iterator[requests.Response]:
        """Ask once for bytes without content, as for a result, and yield the answer.

        Raises:
            NoAnswerError: No answer came from the coordinator, or it broke off.
            RefusedError: The coordinator does not send them.
        """
        with self._request("GET", f"rehearsal?size={size}") as response:
            if not re.fullmatch("[0-9a-f]{64}", response.headers.get("X-Content-SHA256", "")):
                raise foreign_answer(response)
            yield response

    # -------------------------------------------------------------------------------------------------- requests
    def _ask(
        self,
        method: str,
        path: str,
        model: type[Model],
        *,
        json_body: BaseModel | None = None,
        largest: int = LARGEST_ANSWER,
    ) -> Model:
        """Send one request with a small answer."""
        data = None if json_body is None else encode_json(json_body)
        with self._request(method, path, data=data) as response:
            return read_answer(model, response, largest)

    def _offer(self, key: str, offer: api.Offer) -> api.Receipt | api.Wanted:
        """Ask whether a document is wanted, and from which byte on."""
        with self._request("POST", f"offers/{quote(key)}", data=encode_json(offer)) as response:
            if response.status_code == 202:
                return read_answer(api.Wanted, response)
            return read_answer(api.Receipt, response)

    def _upload(self, key: str, document: OutgoingDocument, offset: int) -> api.Receipt:
        """Send a document from a byte on."""
        headers, size = {"X-Content-SHA256": document.digest}, document.size
        if 0 < offset < size:
            headers["Content-Range"] = f"bytes {offset}-{size - 1}/{size}"
        document.seek(offset if offset < size else 0)
        with self._request("PUT", f"gatherings/{quote(key)}", data=document, headers=headers) as response:
            return read_answer(api.Receipt, response)

    def _poll(self, key: str, download: PartialDownload, *, wait_s: float, since: str | None) -> api.Waiting | None:
        """Ask once for a result, resuming its download; None once it is complete."""
        form = "" if since is None else f"&changes=1&since={since}"
        return self._download(f"gatherings/{quote(key)}?wait={wait_s:g}{form}", download)

    def _download(self, path: str, download: PartialDownload) -> api.Waiting | None:
        """Ask once for the rest of a file; return None once it is complete."""
        try:
            with self._request("GET", path, headers=download.headers()) as response:
                if response.status_code == 202:
                    lacks = re.fullmatch("[0-9]{1,4}", response.headers.get(api.LACKS_HEADER, "0"))
                    return read_answer(api.Waiting, response).model_copy(
                        update={"lacks": int(lacks[0]) if lacks else 0}
                    )
                expected = response.headers.get("X-Content-SHA256", "")
                if not re.fullmatch("[0-9a-f]{64}", expected):  # a coordinator sends no file without
                    raise foreign_answer(response)
                digest = download.receive(response, tag=f'"{expected}"')
        except RangeError:
            download.forget()
            raise
        except OversizedError as error:
            download.path.unlink(missing_ok=True)
            raise results.too_large(path.partition("?")[0], error) from error
        if digest != expected:
            download.forget()
            raise NoAnswerError("what the coordinator sent was damaged on its way")
        return None

    @contextmanager
    def _request(
        self, method: str, path: str, *, data: Any = None, headers: Mapping[str, str] | None = None
    ) -> Iterator[requests.Response]:
        """Send one request and yield the answer if it is a good one.

        Raises:
            NoAnswerError: Asking again may help.
            RefusedError: The coordinator says no.
            NotJoinedError: It does not know this site.
        """
        with translated_errors():
            response = self._session.request(
                method,
                f"{self.credential.url}/v1/{path}",
                data=data,
                headers=headers,
                stream=True,
                allow_redirects=False,
                timeout=(min(CONNECT_TIMEOUT_S, self.timeout_s), self.timeout_s),
            )
            with response:
                check_status(response)
                yield response

    def _persist(self, ask: Callable[[], Answer], patience_s: float | None = None) -> Answer:
        """Retry a request with growing pauses until it is answered or patience ends."""
        patience_s = self.give_up_after_s if patience_s is None else patience_s
        growing = wait_exponential(multiplier=self.pause_s, max=LONGEST_PAUSE_S)

        def note_failure(state: RetryCallState) -> None:
            if state.attempt_number == 1:  # most likely a connection that was idle for too long: not worth a line
                assert state.outcome_timestamp is not None  # set with the failure
                state.start_time = state.outcome_timestamp  # patience counts from the first failure
            else:
                self._say(f"{_failure_of(state)}{TRYING_AGAIN}")

        def pause(state: RetryCallState) -> float:
            jittered = growing(state) * random.uniform(0.5, 1.0)  # sites do not come back all at once
            assert state.seconds_since_start is not None  # it has failed already
            return min(max(jittered, _failure_of(state).wait_s), patience_s - state.seconds_since_start)

        def give_up(state: RetryCallState) -> NoReturn:
            error = _failure_of(state)
            raise CoordinatorUnreachable(
                f"the coordinator at {self.credential.url} has not answered for {patience_s:g} s: {error}"
            ) from error

        retrying = Retrying(
            retry=retry_if_exception_type(NoAnswerError),
            stop=stop_after_delay(patience_s),
            wait=pause,
            sleep=lambda seconds: self._end_if(self._is_closing.wait(seconds)),
            before=lambda _: self._end_if(self._is_closing.is_set()),
            after=note_failure,
            retry_error_callback=give_up,
        )
        answer: Answer = retrying(ask)
        if retrying.statistics["attempt_number"] > 1 and (self._last_line or "").endswith(TRYING_AGAIN):
            self._say("the coordinator answers again")
        return answer

    @staticmethod
    def _end_if(is_closed: bool) -> None:
        if is_closed:
            raise FederationError("the connection was closed while it was in use")

    def _say(self, line: str) -> None:
        """Report a line unless it repeats the last one, but for the time that it may name."""
        line = printable(line)
        timeless = _MOMENT.sub("", line)
        if timeless != self._last_line:
            self._last_line = timeless
            self._report(line)

    # ----------------------------------------------------------------------------------------------------- files
    def _new_path(self) -> Path:
        self._number += 1
        return Path(self._folder.name) / f"{self._number}.safetensors"

    def _forget_document(self) -> None:
        """Close and delete the last result: files would pile up otherwise."""
        if self._document is not None:
            self._document.close()
            self._document.path.unlink(missing_ok=True)
            self._document = None


# -------------------------------------------------------------------------------------------------------- functions
def is_late(site: str, key: str, message: messages.Message) -> bool:
    """Tell whether a result shows that a site's update came too late to count."""
    if not isinstance(message, messages.Aggregate) or message.round is None:
        return False
    return site not in message.contributors or key.rpartition("/")[2] != str(message.round)


def _failure_of(state: RetryCallState) -> NoAnswerError:
    """Return the error of the last try; others are not retried."""
    error = None if state.outcome is None else state.outcome.exception()
    assert isinstance(error, NoAnswerError)
    return error
