"""Answer the gateways of the sites, in the process of the coordinator.

The engine has proved which site asks. The sites drive transfers: they send and read pieces. A document that has arrived
is checked and synced on threads of its own; meanwhile the site asks for its receipt.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from nnunetv2.federated.coordinator.http.error_responses import problem_of
from nnunetv2.federated.coordinator.http.rate_limits import Limits, lines_of_contribution
from nnunetv2.federated.coordinator.members import Member
from nnunetv2.federated.coordinator.service import Coordinator
from nnunetv2.federated.coordinator.site_service import Result
from nnunetv2.federated.coordinator.token_bucket import TokenBucket
from nnunetv2.federated.engine.channel import PIECE_BYTES, Answer, Available, Held, Request, decode_frame, encode_frame
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.protocol import api
from nnunetv2.federated.protocol.strict_json import decode_json, encode_json

logger = logging.getLogger(__name__)

STORING_THREADS = 4
SHOWN_FILES = 8
"""Files of one site that it may still read: the latest ones."""
REPORTING = ("act", "report_failure", "identify")
"""Requests that may leave a line in the audit log,"""
CHANGING = (*REPORTING, "offer", "piece")
"""and those whose refusal may."""


class Responder:
    """Answers the requests of gateways. Safe for use by many threads.

    Args:
        coordinator: Whose answers they are; the caller starts and stops it.
        clock: Seconds, from any moment on.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        *,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._coordinator = coordinator
        self._clock = clock
        self._requests = TokenBucket(per_s=limits.requests_per_s, at_once=limits.requests_at_once)
        self._lines = TokenBucket(per_s=limits.lines_per_s, at_once=limits.lines_at_once)
        self._pool = ThreadPoolExecutor(STORING_THREADS, thread_name_prefix="storing")
        self._lock = threading.Lock()
        self._storing: dict[tuple[str, str, str], Future[api.Receipt]] = {}
        """(site, exchange, digest) -> the receipt of a document that has arrived completely."""
        self._files: dict[str, dict[str, Path]] = {}
        """Site -> digest -> file that it may read."""

    def close(self) -> None:
        """Wait until documents under way are stored."""
        self._pool.shutdown(wait=True)

    def answer(self, site: str, frame: bytes | bytearray | memoryview) -> bytes:
        """Return the frame that answers a frame of a site; errors are answers, too.

        Args:
            site: Who asks, as the engine has proved.
        """
        key, content, op = "", b"", ""
        try:
            request, piece = decode_frame(Request, frame)
            key = request.name
            self._check_budget(site, request.op)
            op = request.op  # from here on: being told to wait costs nothing
            self._check_member(site)
            answer, content = self._do(site, request, piece)
            if op in REPORTING:
                self._spend_lines(site)
        except Exception as error:  # noqa: BLE001 - the one table of refusals, as over HTTP
            answer = self._refuse(site, op, error)
        reply = encode_frame(answer, content)
        self._coordinator.count_traffic(site, key, received=len(frame), sent=len(reply))
        return reply

    # ------------------------------------------------------------------------------------------------- who may ask
    def _check_budget(self, site: str, op: str) -> None:
        now = self._clock()
        wait_s = (self._lines.wait_s(site, now) if op in CHANGING else 0.0) or self._requests.take(site, now)
        if wait_s:
            raise RefusedError(f"{site} asks too much", f"Ask again in {wait_s:.0f} s.", code="too_many_requests")

    def _spend_lines(self, site: str, lines: int = 1) -> None:
        if lines:
            self._lines.spend(site, self._clock(), lines)

    def _check_member(self, site: str) -> None:
        if site not in self._coordinator.settings.sites:
            raise RefusedError(
                f"{site} is no site of {self._coordinator.settings.federation}, or was revoked",
                "Ask the operator of the coordinator, who can let it back in (nnUNetv2_fed_admin invite).",
                code="unauthorized",
            )

    def _refuse(self, site: str, op: str, error: Exception) -> Answer:
        status, problem = problem_of(error)
        if status >= 500:
            logger.error("%s of site %s", op or "a request", site, exc_info=error)
        if op in CHANGING:
            self._spend_lines(site)
        return Answer(problem=problem)

    # -------------------------------------------------------------------------------------------------- operations
    def _do(self, site: str, request: Request, piece: memoryview) -> tuple[Answer, bytes]:
        """Return the answer to a request, and its content."""
        if request.op == "read":
            return Answer(), self._read(site, request)
        if request.op == "offer":
            return Answer(held=self._offer(site, request)), b""
        if request.op == "piece":
            return Answer(held=self._take(site, request, piece)), b""
        if request.op == "result":
            return self._result(site, request), b""
        if request.op == "model":
            kept = self._coordinator.fetch_model(request.name, member=site)
            return Answer(file=self._show(site, request.name, kept.path, kept.digest)), b""
        message = self._ask(site, request)
        return Answer(body="" if message is None else encode_json(message).decode()), b""

    def _ask(self, site: str, request: Request) -> BaseModel | None:
        """Return the coordinator's message for a request without documents."""
        coordinator, op = self._coordinator, request.op
        if op == "identify":
            coordinator.identify(site, request.identity or "")
            return None
        if op == "act":
            action = decode_json(api.RunAction, request.body.encode())
            return coordinator.act(request.name, action, Member(site, "site"))
        if op == "report_failure":
            coordinator.report_failure(site, decode_json(api.FailureReport, request.body.encode()))
            return None
        if op == "run_state":
            return coordinator.run_state(request.name)
        if op == "run_of_plans":
            return coordinator.run_state(coordinator.run_of_plans(request.name, site, request.plans))
        if op == "status":
            return coordinator.status(Member(site, "site"))
        answers: dict[str, Callable[[], BaseModel]] = {
            "settings": lambda: coordinator.settings,
            "roster": coordinator.roster,
            "outlooks": coordinator.outlooks,
            "declared_privacy": coordinator.declared_privacy,
        }
        return answers[op]()

    # ---------------------------------------------------------------------------------------------------- documents
    def _offer(self, site: str, request: Request) -> Held:
        """Return the size of a document's held part, or its receipt."""
        digest = _digest_of(request)
        done = self._find_stored(site, request.name, digest)
        if done is not None:
            return Held(offset=request.size, is_storing=True) if not done.done() else Held(receipt=done.result())
        receipt = self._coordinator.offer(request.name, site, digest, request.size)
        if receipt is not None:
            return Held(receipt=receipt)
        return Held(offset=self._coordinator.uploads.offset(request.name, site, digest))

    def _find_stored(self, site: str, key: str, digest: str) -> Future[api.Receipt] | None:
        """Return the outcome of a document that has arrived; it is told once."""
        with self._lock:
            future = self._storing.get((site, key, digest))
            if future is not None and future.done():
                del self._storing[site, key, digest]
            return future

    def _take(self, site: str, request: Request, piece: memoryview) -> Held:
        """Append a piece to a document; the last one has it checked and stored."""
        digest, end = _digest_of(request), request.offset + len(piece)
        if (not len(piece) and request.size) or end > request.size:
            raise RefusedError(
                f"a piece from byte {request.offset} to {end} does not go into {request.size} bytes",
                code="incomplete_request",
            )
        receipt = self._coordinator.offer(request.name, site, digest, request.size)  # each time: the size is a claim
        if receipt is not None:
            return Held(receipt=receipt)
        if end < request.size:
            uploads = self._coordinator.uploads
            with uploads.writing(request.name, site, digest, offset=request.offset) as upload:
                upload.append(piece, hashed=False)
                return Held(offset=upload.size)
        if request.size <= PIECE_BYTES:
            return Held(receipt=self._store(site, request, digest, bytes(piece)))
        self._begin_storing(site, request, digest, bytes(piece))
        return Held(offset=request.size, is_storing=True)

    def _begin_storing(self, site: str, request: Request, digest: str, piece: bytes) -> None:
        """Have a document stored by another thread, unless that is being done: the request may have come twice."""
        place = site, request.name, digest
        with self._lock:
            for other in [one for one, future in self._storing.items() if one[0] == site and future.done()]:
                del self._storing[other]
            if place not in self._storing:
                future = self._storing[place] = self._pool.submit(self._store, site, request, digest, piece)
                # Whether the site asks for the outcome or not.
                future.add_done_callback(lambda done: self._spend_lines(site, int(done.exception() is not None)))

    def _store(self, site: str, request: Request, digest: str, piece: bytes) -> api.Receipt:
        """Append the last piece, check the document, and give it to the coordinator."""
        coordinator, key = self._coordinator, request.name
        with coordinator.uploads.writing(key, site, digest, offset=request.offset) as upload:
            try:
                upload.read_beginning()
                upload.append(piece)
                if upload.hexdigest() != digest:
                    raise RefusedError(
                        "the document was damaged on its way: its SHA-256 differs", code="damaged_in_transit"
                    )
                upload.complete()
                receipt = coordinator.contribute(key, site, upload.path, digest, request.size)
            finally:
                upload.discard()
        self._spend_lines(site, lines_of_contribution(key, is_refused=False))
        return receipt

    # ------------------------------------------------------------------------------------------------------ results
    def _result(self, site: str, request: Request) -> Answer:
        """Return where the result of an exchange can be read, or whom it waits for."""
        form: dict[str, Any] = {"changes": True, "since": request.since} if request.changes else {}
        outcome = self._coordinator.result(request.name, site, **form)
        if isinstance(outcome, Result):
            return Answer(file=self._show(site, outcome.key, outcome.path, outcome.digest))
        return Answer(waiting=outcome, lacks=outcome.lacks)

    def _show(self, site: str, name: str, path: Path, digest: str) -> Available:
        """Let a site read a file."""
        size = path.stat().st_size
        with self._lock:
            files = self._files.setdefault(site, {})
            files.pop(digest, None)
            files[digest] = path
            if len(files) > SHOWN_FILES:
                del files[next(iter(files))]
        return Available(name=name, digest=digest, size=size)

    def _read(self, site: str, request: Request) -> bytes:
        """Return a piece of a file that the site may read."""
        with self._lock:
            path = self._files.get(site, {}).get(_digest_of(request))
        if path is None:
            raise RefusedError("this file was not shown to the site since the coordinator started", code="not_open")
        with path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), PIECE_BYTES, request.offset)


def _digest_of(request: Request) -> str:
    if request.digest is None:
        raise RefusedError(f"{request.op} needs the SHA-256 of its document", code="incomplete_request")
    return request.digest
