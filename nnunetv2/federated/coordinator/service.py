"""Own the state of a federation: take contributions, close gatherings, hand out results. Knows nothing of HTTP.

Requests come in on many threads. Each gathering has a lock; whoever changes a gathering holds it, and what is read is
immutable. One more thread, the closer, computes the results, one gathering at a time, so that memory stays small.
"""
from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nnunetv2.federated import bodies, closing
from nnunetv2.federated.coordinator.members import Members
from nnunetv2.federated.errors import FederationError, RefusedError
from nnunetv2.federated.messages import initial_key, registration_key, round_key
from nnunetv2.federated.model_keeping import keep_model
from nnunetv2.federated.rounds import (
    FINAL_KINDS,
    Closed,
    Contribution,
    Gathering,
    GatheringKey,
    Refused,
    RoundBook,
    Verdict,
    closed,
    judge,
    may_close,
    parse_key,
    refused,
    with_contribution,
)
from nnunetv2.federated.store import Event, Store
from nnunetv2.federated.wire import open_document, write_subset

logger = logging.getLogger(__name__)

RETRY_CLOSING_S = 15.0
"""Pause after a closing that failed for a reason of the machine, such as a full disk."""
SHOWN_FAILURES = 100


@dataclass(frozen=True)
class Result:
    """A file that a site may download."""

    key: str
    """The gathering it comes from: a later round than asked for, where that one took place without the site."""
    path: Path
    digest: str


class Coordinator:
    """The coordinator of one federation.

    Args:
        store: Its durable state; a federation has been created in it. The coordinator does not close it.
        announce: Told in one line whatever a person at the coordinator wants to know.
        clock: Seconds since 1970.
    """

    def __init__(self, store: Store, *, announce: Callable[[str], None] = logger.info,
                 clock: Callable[[], float] = time.time) -> None:
        settings = store.load_settings()
        if settings is None:
            raise FederationError(f"{store.folder} holds no federation yet")
        self.store = store
        self.settings = settings
        self.members = Members(store)
        self.announce = announce
        self.clock = clock
        self.book = RoundBook(settings, store.load_gatherings(settings))
        self.book.restarted(clock())
        self.archive = closing.Archive(store.contribution_path, store.result_path, self.book.get)
        self.on_change: Callable[[str], None] = lambda key: None
        """Called with a key whenever its gathering has changed, on any thread."""
        self._gathering_locks: defaultdict[str, threading.RLock] = defaultdict(threading.RLock)
        self._wake = threading.Condition()
        self._stopping = False
        self._trouble: dict[str, tuple[float, str]] = {}
        self._closer = threading.Thread(target=self._close_what_is_ready, name="closer", daemon=True)

    # ------------------------------------------------------------------------------------------- start and stop
    def start(self) -> None:
        """Finish what a crash may have left undone, and begin to close gatherings."""
        for run in self.book.runs():
            self._tidy_up(run, num_rounds=None)
        self._closer.start()

    def stop(self) -> None:
        """Finish the closing that is being computed, if any, and write the counters."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._closer.is_alive():
            self._closer.join()
        self.members.save_traffic()

    # ---------------------------------------------------------------------------------------------------- sites
    def join(self, request: bodies.JoinRequest) -> bodies.JoinAnswer:
        """Let a site join; see `Members.join`."""
        site, is_new = self.members.join(request.invitation, request.token, now=self.clock())
        if is_new:
            self.announce(f"site {site} has joined")
        return bodies.JoinAnswer(federation=self.settings.federation, site=site, settings=self.settings)

    def report_failure(self, site: str, report: bodies.FailureReport) -> None:
        """Remember that a site cannot go on."""
        self.store.add_event(Event(self.clock(), "failure", site, None, report.model_dump(mode="json")))
        where = f"run {report.run}" + (f", round {report.round}" if report.round is not None else "")
        self.announce(f"site {site} reports a failure in {where}: {report.reason}")

    # --------------------------------------------------------------------------------------------- contributing
    def offer(self, key: str, site: str, digest: str, size: int) -> bodies.Receipt | None:
        """Return the receipt for a document that need not be sent, or None if it is wanted.

        Raises:
            RefusedError: It would not be accepted.
        """
        gathering = self._begin(parse_key(key))
        verdict = judge(gathering, site, digest)
        if verdict is not Verdict.STORE:
            return _receipt(gathering, site, digest, verdict)
        limit = closing.size_limit(gathering.key, site, self.archive)
        if size > limit:
            raise RefusedError(f"the contribution of site {site} to {key} has {size} bytes, at most {limit} are "
                               "allowed", code="too_large")
        return None

    def contribute(self, key: str, site: str, incoming: Path, digest: str, size: int) -> bodies.Receipt:
        """Take over a document that has been received completely; it is durable on return.

        Args:
            incoming: The document, in the store's folder for uploads. The caller removes what is left of it.

        Raises:
            WireError: It is not what its gathering is about.
            RefusedError: It comes too early, too late or from the wrong site.
        """
        parsed = parse_key(key)
        try:
            self._begin(parsed)
            with open_document(incoming) as document:
                closing.check_contribution(parsed, site, document, self.archive)
        except FederationError as error:
            self._log_refusal(key, site, error)
            raise
        with self._gathering_locks[key]:
            gathering = self._begin(parsed)
            verdict = judge(gathering, site, digest)
            if verdict is Verdict.STORE:
                gathering = with_contribution(gathering, site, Contribution(digest, size, self.clock()))
                self.store.save_contribution(gathering, site, incoming)
                self.book.put(gathering)
        if verdict is Verdict.STORE:
            if gathering.waiting_for:  # else the closing, which comes at once, is what the others want to hear of
                self.on_change(key)
            with self._wake:
                self._wake.notify_all()
        return _receipt(gathering, site, digest, verdict)

    def _begin(self, key: GatheringKey) -> Gathering:
        """Return a gathering; one that has not begun is not remembered before its first contribution."""
        required = ()
        if key.kind == "initial" and self.book.is_closed(registration_key(key.run)):
            required = set(self.archive.agreement(key.run).match.initial_owner.values())
        return self.book.begin(key, required=required)

    def _log_refusal(self, key: str, site: str, error: FederationError) -> None:
        self.store.add_event(Event(self.clock(), "refusal", site, key, {"message": str(error)[:1000]}))
        self.announce(f"{key}: the contribution of site {site} is not accepted: {error}")

    # --------------------------------------------------------------------------------------------------- results
    def result(self, key: str, site: str) -> Result | tuple[str, ...]:
        """Return the result of a gathering for a site, or, while it is open, the sites that it waits for.

        Raises:
            RefusedError: The contributions do not go together, or the gathering cannot begin yet.
        """
        gathering = self._begin(parse_key(key))
        if site not in gathering.expected:
            raise RefusedError(f"site {site} does not take part in {key}", code="not_expected")
        if isinstance(gathering.outcome, Refused):
            raise gathering.outcome.as_error()
        if not isinstance(gathering.outcome, Closed):
            self._raise_trouble(key)
            return gathering.waiting_for
        return self._result_of_closed(gathering, site)

    def _raise_trouble(self, key: str) -> None:
        """Let sites know why a complete gathering does not close. They try again: the error is not theirs."""
        if key in self._trouble:
            raise OSError(f"{key} cannot be closed at the moment: {self._trouble[key][1]}")

    def _result_of_closed(self, gathering: Gathering, site: str) -> Result:
        """Return the result of a closed gathering, or of the run's last round for a site that missed this one."""
        key = gathering.key
        is_gone = self.store.load_result_digest(key) is None
        if key.kind == "round" and (is_gone or site in gathering.outcome.missing):
            key = self.book.latest_round(key.run).key
        names = closing.names_for_site(key, site, self.archive)
        if names is None:
            return Result(str(key), self.store.result_path(key), self.store.load_result_digest(key) or "")
        return self._subset(key, names)

    def _subset(self, key: GatheringKey, names: tuple[str, ...]) -> Result:
        """Return the part of a result with these tensors, written when it is first asked for."""
        subset = hashlib.sha256("\n".join(names).encode()).hexdigest()
        path = self.store.result_path(key, subset)
        with self._gathering_locks[str(key)]:
            digest = self.store.load_result_digest(key, subset)
            if digest is None:
                with open_document(self.store.result_path(key)) as whole:
                    digest = write_subset(whole, path, names)
                self.store.save_subset(key, subset, digest)
        return Result(str(key), path, digest)

    # --------------------------------------------------------------------------------------------------- closing
    def _close_what_is_ready(self) -> None:
        """Run the closer: sleep until a gathering is complete or due, close it, and so on until `stop`."""
        while True:
            with self._wake:
                ready = self._ready()
                while not ready and not self._stopping:
                    self._wake.wait(self._seconds_until_next())
                    ready = self._ready()
                if self._stopping:
                    return
            for gathering in ready:
                self._close(gathering.key)

    def _ready(self) -> list[Gathering]:
        now = self.clock()
        return [gathering for gathering in self.book.ready(now)
                if self._trouble.get(str(gathering.key), (0.0, ""))[0] <= now]

    def _seconds_until_next(self) -> float | None:
        moments = [retry for retry, _ in self._trouble.values()]
        due = self.book.next_due()
        if due is not None and due > self.clock():
            moments.append(due)
        return max(0.0, min(moments) - self.clock()) if moments else None

    def _close(self, key: GatheringKey) -> None:
        """Close one gathering. Trouble of this machine is shown and tried again; nobody else's gathering suffers."""
        begin = time.perf_counter()
        try:
            with self._gathering_locks[str(key)]:
                gathering = self.book.get(key)
                if gathering is None or not may_close(gathering, self.clock()):
                    return
                self._trouble.pop(str(key), None)
                gathering = self._compute_outcome(gathering)
                self.book.put(gathering)
            self.announce(_describe_outcome(gathering, time.perf_counter() - begin))
            if key.run is not None and gathering.is_closed:
                self._tidy_up(key.run)
            self.members.save_traffic()
        except Exception as error:  # whatever it is, the other gatherings go on
            logger.exception("closing %s", key)
            self._trouble[str(key)] = (self.clock() + RETRY_CLOSING_S, f"{type(error).__name__}: {error}")
            self.announce(f"{key} cannot be closed, trying again in {RETRY_CLOSING_S:.0f} s: {error}")
        self.on_change(str(key))

    def _compute_outcome(self, gathering: Gathering) -> Gathering:
        """Compute the result of a gathering and write it, or write down why there is none."""
        self.store.result_folder(gathering.key)
        try:
            done = closed(gathering, self.clock())
            digest = closing.close(done, self.settings, self.archive)
        except FederationError as error:
            refusal = error if isinstance(error, RefusedError) else RefusedError(str(error), code="do_not_match")
            failed = refused(gathering, refusal, self.clock())
            self.store.save_refusal(failed)
            return failed
        self.store.save_closing(done, digest)
        return done

    def _tidy_up(self, run: str, *, num_rounds: int | None = 3) -> None:
        """Write the model of a run that is complete, and delete the documents that nobody will ask for again.

        Args:
            num_rounds: How many of the last rounds to look at. None: all.
        """
        gathering = self.book.latest_round(run)
        if gathering is None:
            return
        if self.book.run_state(run).closed:
            self._keep_model(run)
        self.store.delete_contributions(initial_key(run))
        latest = gathering.key.number
        for number in range(0 if num_rounds is None else max(0, latest - num_rounds), latest):
            self.store.delete_contributions(round_key(run, number))
            if number < latest - 1:
                self.store.delete_results(round_key(run, number))

    def _keep_model(self, run: str) -> None:
        """Write the model folder of a complete run, once."""
        if any(event.key == run for event in self.store.load_events("model")):
            return
        text = keep_model(run, self.store.folder / "models", self.settings, self.archive)
        self.store.add_event(Event(self.clock(), "model", None, run, {"outcome": text}))
        self.announce(f"run {run} is complete: {text}")

    # ---------------------------------------------------------------------------------------------------- status
    def run_state(self, run: str) -> bodies.RunState:
        """Say how far a run is."""
        parse_key(f"runs/{run}/registration")
        return self.book.run_state(run)

    def status(self) -> bodies.Status:
        """Say what the federation is doing."""
        open_gatherings = [gathering for gathering in self.book if not gathering.is_closed]
        failures = self.store.load_events("failure")[-SHOWN_FAILURES:]
        return bodies.Status(
            federation=self.settings.federation,
            sites=self.members.status(),
            waiting=tuple(bodies.GatheringStatus(
                key=str(gathering.key), contributed=tuple(sorted(gathering.contributions)),
                waiting_for=gathering.waiting_for, opened=gathering.opened) for gathering in open_gatherings),
            runs=tuple(self.book.run_state(run) for run in self.book.runs()),
            failures=tuple(bodies.FailureStatus(site=event.site, time=event.time, **dict(event.detail))
                           for event in failures),
            traffic=self.members.traffic_status())


# --------------------------------------------------------------------------------------------------------- helpers
def _receipt(gathering: Gathering, site: str, digest: str, verdict: Verdict) -> bodies.Receipt:
    held = gathering.contributions.get(site)
    already = verdict is Verdict.KEEP_FIRST or (gathering.is_closed and gathering.key.kind in FINAL_KINDS)
    return bodies.Receipt(digest=held.digest if held else digest, already=already, waiting_for=gathering.waiting_for)


def _describe_outcome(gathering: Gathering, seconds: float) -> str:
    key, outcome = gathering.key, gathering.outcome
    name = f"run {key.run}, round {key.number}" if key.kind == "round" else str(key)
    if isinstance(outcome, Refused):
        return f"{name} is refused: {outcome.message} {outcome.remedy}".rstrip()
    assert isinstance(outcome, Closed)
    missing = f", missing {', '.join(outcome.missing)}" if outcome.missing else ""
    waited = outcome.time - gathering.opened
    return (f"{name} is closed: {', '.join(outcome.contributors)}{missing}; "
            f"{waited:.1f} s from the first contribution, {seconds:.2f} s to compute")
