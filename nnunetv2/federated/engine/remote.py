"""Reach the coordinator of one site through an engine, as the `SiteService` of its gateway.

Small questions are asked until they are answered, for ten seconds: then the engine is away, the gateway answers 503,
and the site's command asks again, for a day if need be. Documents are on this machine before they travel and before
they are handed out; a transfer goes on while nobody waits for it, and after a break at its last piece.

The coordinator is not trusted with this machine's disk: a file is fetched only if it is no larger than the requested
result or model can be, one at a time for each of them, and few files stay that nobody fetches any more.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from nnunetv2.federated.coordinator.http.error_responses import STATUS_OF_CODE
from nnunetv2.federated.coordinator.members import Member, hash_secret
from nnunetv2.federated.coordinator.models.model_store import KeptModel
from nnunetv2.federated.coordinator.notifier import Notifier
from nnunetv2.federated.coordinator.site_service import Result
from nnunetv2.federated.coordinator.storage.partial_uploads import PartialUploads
from nnunetv2.federated.engine.channel import (
    PIECE_BYTES,
    Answer,
    Available,
    Channel,
    Held,
    Request,
    decode_frame,
    encode_frame,
)
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.exchanges import document_limits
from nnunetv2.federated.exchanges.steps import parse_key, step_of
from nnunetv2.federated.protocol import api
from nnunetv2.federated.protocol.document import file_digest, open_document
from nnunetv2.federated.protocol.keys import Key
from nnunetv2.federated.protocol.messages import Registration
from nnunetv2.federated.protocol.strict_json import decode_json, encode_json
from nnunetv2.federated.site.results import ResultSizes, largest_model, too_large
from nnunetv2.utilities.size_limits import OversizedError, check_size

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=BaseModel)
Outcome = TypeVar("Outcome")

AWAY_S = 10.0
"""How long a question is asked again before the engine counts as away."""
PIECE_TIMEOUT_S = 60.0
"""How long a piece may make no progress."""
PAUSE_S = 0.25
"""First pause before a question is asked again; it doubles."""
TRANSFER_WAIT_S = 20.0
"""How long a request waits for a transfer. Below the rest of the minute that the client waits for an answer."""
TRANSFERS = 4
KEPT_RESULTS = 3
"""Files of results, whole or not, that stay here beside those that are being fetched: the latest ones."""
COPIES_OF_A_MODEL = 2
"""How often a model is written at the site: here, and by the command that fetches it."""


class RemoteCoordinator:
    """The coordinator at the other end of an engine, for the one site here.

    Used by many threads.

    Args:
        channel: The way there.
        site: Who the site is, as the engine knows it.
        token: With which the commands of this site prove themselves to the gateway.
        folder: For documents under way.
        away_s: How long a question is asked again before the engine counts as away.
        piece_bytes: How much of a document travels at a time.
    """

    def __init__(
        self,
        channel: Channel,
        *,
        site: str,
        token: str,
        folder: Path,
        away_s: float = AWAY_S,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        self._channel = channel
        self._site = site
        self._token_hash = hash_secret(token)
        self._away_s = away_s
        self._piece_bytes = piece_bytes
        self._notifier = Notifier(hears_progress=False)
        for name in ("incoming", "outgoing", "results"):
            (folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        self._outgoing, self._results = folder / "outgoing", folder / "results"
        self._uploads = PartialUploads(folder / "incoming")
        self._pool = ThreadPoolExecutor(TRANSFERS, thread_name_prefix="transfer")
        self._lock = threading.Lock()
        self._transfers: dict[tuple[str, str], Future[api.Receipt | Path]] = {}
        self._progress: dict[tuple[str, str], tuple[int, int]] = {}
        self._given_up: dict[tuple[str, str], threading.Event] = {}
        """File that is being fetched -> set when another one takes its place."""
        self._sizes = ResultSizes()
        self._is_closing = threading.Event()
        self.last_asked = time.monotonic()
        """When a command of this site has last asked anything."""

    def close(self) -> None:
        """End transfers at their present piece."""
        self._is_closing.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def notifier(self) -> Notifier:
        """Notified of the coordinator's changes."""
        return self._notifier

    @property
    def uploads(self) -> PartialUploads:
        """The documents that this site's commands hand in."""
        return self._uploads

    # ---------------------------------------------------------------------------------------------- small questions
    @property
    def settings(self) -> api.FederationSettings:
        """The settings that hold for all sites at the moment."""
        return self._ask(Request(op="settings"), api.FederationSettings)

    def authenticate(self, token: str) -> Member:
        """Return this site for its token."""
        if not secrets.compare_digest(hash_secret(token), self._token_hash):
            raise RefusedError(
                "this gateway does not know this credential: it is of an earlier job, or of another site",
                "Use the credential that the job has written, and let no other variable name an old one.",
                code="unauthorized",
            )
        return Member(self._site, "site")

    def count_traffic(self, member: str, key: str, *, received: int, sent: int) -> None:
        """Note that a command has asked.

        Transfers on this machine are no traffic; the coordinator counts its own.
        """
        self.last_asked = time.monotonic()

    def identify(self, identity: str) -> None:
        """Tell the public part of this site's identity, where the federation aggregates securely."""
        self._send(Request(op="identify", identity=identity))

    def roster(self) -> api.Roster:
        """Return the identities of the sites that take part."""
        return self._ask(Request(op="roster"), api.Roster)

    def status(self, viewer: Member | None = None) -> api.Status:
        """Return the state of the federation, as this site may see it."""
        return self._ask(Request(op="status"), api.Status)

    def run_state(self, run: str) -> api.RunState:
        """Return how far a run is."""
        return self._ask(Request(op="run_state", name=run), api.RunState)

    def run_of_plans(self, run: str, site: str, plans_name: str) -> str:
        """Return the name of the run that this site's training with these plans belongs to."""
        return self._ask(Request(op="run_of_plans", name=run, plans=plans_name), api.RunState).run

    def outlooks(self) -> api.Outlooks:
        """Foresee the averages of every run, as far as they are known."""
        return self._ask(Request(op="outlooks"), api.Outlooks)

    def declared_privacy(self) -> api.DeclaredPrivacy:
        """Return the privacy that sites have declared, of the runs where any has."""
        return self._ask(Request(op="declared_privacy"), api.DeclaredPrivacy)

    def act(self, run: str, action: api.RunAction, member: Member) -> api.RunState:
        """Apply this site's action to a run and return the run's state."""
        return self._ask(Request(op="act", name=run, body=encode_json(action).decode()), api.RunState)

    def report_failure(self, site: str, report: api.FailureReport) -> None:
        """Report that this site cannot go on."""
        self._send(Request(op="report_failure", body=encode_json(report).decode()))

    def note_rehearsal(self, site: str, size: int) -> None:
        """Do nothing: a rehearsal ends at the gateway, and has not left this machine."""

    # ------------------------------------------------------------------------------------------------- contributing
    def offer(self, key: str, site: str, digest: str, size: int) -> api.Receipt | None:
        """Return the receipt for a document already held; None if it is wanted.

        Raises:
            OSError: It is under way from here; asking again may help.
        """
        place = key, digest
        with self._lock:
            is_here = place in self._transfers or self._outgoing_path(key, digest).exists()
        held = Held(is_storing=True) if is_here else self._offer(key, digest, size)
        receipt = self._wait_for_receipt(key, digest, size) if held.is_storing else held.receipt
        # A registration says how large the results of its run may be: it has to come by once, whoever holds it already.
        return None if self._sizes.lacks(parse_key(key)) else receipt

    def contribute(self, key: str, site: str, incoming: Path, digest: str, size: int) -> api.Receipt:
        """Send a document that has been received completely; on return, the coordinator holds it.

        Raises:
            OSError: It is still under way; asking again may help.
        """
        self._note_registration(parse_key(key), incoming)
        incoming.replace(self._outgoing_path(key, digest))
        return self._wait_for_receipt(key, digest, size)

    def _note_registration(self, key: Key, document: Path) -> None:
        if step_of(key).contribution is Registration:
            with open_document(document, limits=document_limits.REGISTRATION) as registration:
                self._sizes.note(key, registration.message)

    def _wait_for_receipt(self, key: str, digest: str, size: int) -> api.Receipt:
        receipt = self._transferred((key, digest), size, lambda: self._send_document(key, digest, size))
        assert isinstance(receipt, api.Receipt)
        return receipt

    def _outgoing_path(self, key: str, digest: str) -> Path:
        return self._outgoing / f"{hash_secret(key)[:24]}.{digest}"

    def _offer(self, key: str, digest: str, size: int) -> Held:
        held = self._answer(Request(op="offer", name=key, digest=digest, size=size))[0].held
        return _given(held)

    def _send_document(self, key: str, digest: str, size: int) -> api.Receipt:
        """Send a document from where the coordinator holds it on, and return its receipt."""
        path = self._outgoing_path(key, digest)
        try:
            held = Held() if size <= self._piece_bytes else self._offer(key, digest, size)
            pause_s = PAUSE_S
            while held.receipt is None:
                self._note_progress((key, digest), held.offset, size)
                if held.is_storing:
                    self._pause(pause_s)
                    pause_s = min(2 * pause_s, 4.0)
                    held = self._offer(key, digest, size)
                elif not path.exists():
                    raise RefusedError("the document has to be handed in again", code="damaged_in_transit")
                else:
                    held = self._send_piece(path, key, digest, size, held.offset) or self._offer(key, digest, size)
        except RefusedError as error:
            if STATUS_OF_CODE.get(error.code, 409) < 500 and error.code != "too_many_requests":
                path.unlink(missing_ok=True)  # it is of no use
            raise
        path.unlink(missing_ok=True)
        return held.receipt

    def _send_piece(self, path: Path, key: str, digest: str, size: int, offset: int) -> Held | None:
        """Send the piece from a byte on; None if the coordinator holds another part of the document by now."""
        with path.open("rb") as file:
            file.seek(offset)
            piece = file.read(self._piece_bytes)
        request = Request(op="piece", name=key, digest=digest, size=size, offset=offset)
        try:
            return _given(self._answer(request, piece, timeout_s=PIECE_TIMEOUT_S)[0].held)
        except RefusedError as error:
            if error.code not in ("wrong_offset", "taken_over"):  # the same piece has come twice, or it has restarted
                raise
            self._pause(PAUSE_S)
            return None

    # ------------------------------------------------------------------------------------------------------ results
    def result(self, key: str, site: str, *, changes: bool = False, since: str | None = None) -> Result | api.Waiting:
        """Return the result of an exchange, or the sites that it waits for.

        Raises:
            OSError: It is still under way; asking again may help.
        """
        answer = self._answer(Request(op="result", name=key, changes=changes, since=since))[0]
        if answer.waiting is not None:
            return answer.waiting.model_copy(update={"lacks": answer.lacks})
        file = _given(answer.file)
        largest = self._sizes.largest(parse_key(key))
        return Result(file.name, self._fetch(f"the result of {key}", file, largest=largest), file.digest)

    def find_model(self, run: str) -> Path:
        """Fetch the model of a run, and return where it is."""
        return self.fetch_model(run, member=self._site).path

    def fetch_model(self, run: str, *, member: str) -> KeptModel:
        """Fetch the model of a run.

        Raises:
            OSError: It is still under way; asking again may help.
            WireError: It is larger than nnUNet_max_model_gb or the disk allows.
        """
        what, file = f"the model of {run}", _given(self._answer(Request(op="model", name=run))[0].file)
        partial = self._partial_path(what, file.digest)
        held = partial.stat().st_size if partial.exists() else 0
        largest = largest_model(self._results, copies=COPIES_OF_A_MODEL, held=held)
        return KeptModel(self._fetch(what, file, largest=largest), file.digest)

    def _partial_path(self, what: str, digest: str) -> Path:
        return self._results / f"{hash_secret(what)[:24]}.{digest}.part"

    def _fetch(self, what: str, file: Available, *, largest: int) -> Path:
        """Return a file of the coordinator, once it is here.

        Args:
            what: Its name in words; one file of a name is fetched at a time.
            largest: Bytes that it may have.

        Raises:
            WireError: It is announced with more.
        """
        path, place = self._results / file.digest, (what, file.digest)
        if path.exists():
            return path
        try:
            check_size(file.size, largest)
        except OversizedError as error:
            raise too_large(what, error) from error
        with self._lock:
            self._give_up_others(place)
            self._make_room()
            given_up = self._given_up.setdefault(place, threading.Event())
        fetched = self._transferred(place, file.size, lambda: self._read_file(what, file, path, given_up))
        assert isinstance(fetched, Path)
        return fetched

    def _give_up_others(self, place: tuple[str, str]) -> None:
        """End transfers of the name's earlier files. The caller holds the lock."""
        for other in [one for one in self._given_up if one[0] == place[0] and one != place]:
            self._given_up.pop(other).set()
            self._partial_path(*other).unlink(missing_ok=True)
            future = self._transfers.pop(other, None)
            if future is not None:
                future.cancel()

    def _make_room(self) -> None:
        """Remove all but the latest files that nobody fetches. The caller holds the lock."""
        fetched = {self._partial_path(*place) for place in self._given_up if self._is_under_way(place)}
        left = [path for path in self._results.iterdir() if path not in fetched]
        for old in sorted(left, key=lambda path: path.stat().st_mtime)[:-KEPT_RESULTS]:
            old.unlink(missing_ok=True)

    def _is_under_way(self, place: tuple[str, str]) -> bool:
        return place in self._transfers and not self._transfers[place].done()

    def _read_file(self, what: str, file: Available, path: Path, given_up: threading.Event) -> Path:
        """Read a file from where it has come to, and check it."""
        place, partial = (what, file.digest), self._partial_path(what, file.digest)
        try:
            self._read_pieces(place, file, partial, given_up)
        except (RefusedError, _UselessFileError):
            self._forget(place, given_up)
            raise
        is_whole = file_digest(partial) == file.digest
        with self._lock:
            self._check_is_wanted(file, given_up)
            self._given_up.pop(place)
            if not is_whole:
                partial.unlink()
                raise _UselessFileError(f"{file.name} was damaged on its way")
            partial.replace(path)
            self._make_room()
        return path

    def _read_pieces(self, place: tuple[str, str], file: Available, partial: Path, given_up: threading.Event) -> None:
        with self._lock:  # else a transfer that is given up would leave a file behind
            self._check_is_wanted(file, given_up)
            target = partial.open("ab")
        with target:
            while target.tell() < file.size:
                self._note_progress(place, target.tell(), file.size)
                request = Request(op="read", digest=file.digest, offset=target.tell())
                piece = self._answer(request, timeout_s=PIECE_TIMEOUT_S)[1]
                self._check_is_wanted(file, given_up)
                if not len(piece) or target.tell() + len(piece) > file.size:
                    raise _UselessFileError(f"{file.name} has another size than was said")
                target.write(piece)

    def _forget(self, place: tuple[str, str], given_up: threading.Event) -> None:
        """Remove a partial file, unless another transfer has its place by now."""
        with self._lock:
            if self._given_up.get(place) is given_up:
                del self._given_up[place]
                self._partial_path(*place).unlink(missing_ok=True)

    @staticmethod
    def _check_is_wanted(file: Available, given_up: threading.Event) -> None:
        if given_up.is_set():
            raise OSError(f"the coordinator has another file for {file.name} by now")

    # ---------------------------------------------------------------------------------------------------- transfers
    def _transferred(
        self, place: tuple[str, str], size: int, transfer: Callable[[], api.Receipt | Path]
    ) -> api.Receipt | Path:
        """Return the outcome of a transfer, which is begun unless it is under way.

        Raises:
            OSError: It is not over yet.
        """
        with self._lock:
            future = self._transfers.get(place)
            if future is None:
                future = self._transfers[place] = self._pool.submit(transfer)
        try:
            outcome = future.result(TRANSFER_WAIT_S)
        except FutureTimeoutError as error:
            if not future.done():
                done, size = self._progress.get(place, (0, size))
                raise OSError(
                    f"{done / 2**20:.1f} of {size / 2**20:.1f} MiB have passed the engine; the transfer goes on"
                ) from error
            raise
        except CancelledError as error:
            raise OSError("the coordinator has another file by now") from error
        finally:
            if future.done():
                with self._lock:
                    if self._transfers.get(place) is future:
                        del self._transfers[place]
                        self._progress.pop(place, None)
        return outcome

    def _note_progress(self, place: tuple[str, str], done: int, size: int) -> None:
        self._progress[place] = done, size
        if self._is_closing.is_set():
            raise OSError("the job is ending")

    def _pause(self, seconds: float) -> None:
        if self._is_closing.wait(seconds):
            raise OSError("the job is ending")

    # ------------------------------------------------------------------------------------------------------- asking
    def _ask(self, request: Request, model: type[Model]) -> Model:
        return decode_json(model, self._answer(request)[0].body.encode())

    def _send(self, request: Request) -> None:
        self._answer(request)

    def _answer(
        self, request: Request, content: bytes = b"", *, timeout_s: float | None = None
    ) -> tuple[Answer, memoryview]:
        """Ask until there is an answer, and return it with its content.

        Raises:
            RefusedError: The coordinator refuses the request, or has trouble of its own.
            OSError: The engine is away.
        """
        frame = encode_frame(request, content)
        is_piece = request.op in ("piece", "read")
        deadline, pause_s = time.monotonic() + self._away_s, PAUSE_S
        while True:
            try:
                left_s = max(1.0, deadline - time.monotonic())
                reply = self._channel.ask(frame, timeout_s=timeout_s or left_s, is_piece=is_piece)
                answer, piece = decode_frame(Answer, reply)
                break
            except OSError as error:
                if time.monotonic() + pause_s > deadline:
                    raise OSError(f"the engine does not reach the coordinator: {error!s:.200}") from error
            self._pause(pause_s)
            pause_s *= 2
        if answer.problem is not None:
            problem = answer.problem
            raise RefusedError(problem.message, problem.remedy, code=problem.code)
        return answer, piece


class _UselessFileError(OSError):
    """The received bytes are not the beginning of the announced file."""


def _given(value: Outcome | None) -> Outcome:
    """Return the part of an answer that there is in answers of this kind."""
    if value is None:
        raise OSError("the coordinator answers something else than was asked: use matching versions")
    return value
