"""Close exchanges, one at a time, on a thread of their own: when they are complete, when they are due, after a crash.

Trouble of this machine (a full disk, say) is shown to the sites that wait, and tried again; nobody else's exchange
suffers from it.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from nnunetv2.federated.coordinator.models import model_store
from nnunetv2.federated.errors import FederationError, RefusedError
from nnunetv2.federated.exchanges.exchange import Closed, Exchange, Refused, close_with, may_close, refuse_with
from nnunetv2.federated.exchanges.steps import step_of
from nnunetv2.federated.protocol.keys import InitialKey, Key, NumberedKey, RoundKey, RunKey, ValidationKey

if TYPE_CHECKING:
    from nnunetv2.federated.coordinator.service import Coordinator

logger = logging.getLogger(__name__)

RECENT_ROUNDS = 3
"""Rounds that may have documents that nobody asks for any more; those before have been looked after."""
LONGEST_SLEEP_S = 60.0
"""The clock may be set, and the machine put to sleep: nobody tells."""
RETRY_TIDYING_S = 120.0
"""Pause after models could not be written, or documents not be deleted: nobody waits for that."""
RETRY_CLOSING_S = 15.0
"""Pause after a closing that failed for a reason of the machine, such as a full disk."""


class Closer:
    """The thread that closes the exchanges of a coordinator."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._wake = threading.Condition()
        self._stopping = False
        self.num_closings = 0
        """Exchanges that were closed or refused since the start."""
        self.seconds_closing = 0.0
        """Time that this took altogether."""
        self._trouble: dict[str, tuple[float, str]] = {}
        """Exchange -> when to try again, and why it could not be closed."""
        self._remarks: tuple[str, ...] = ()
        """What is to be said of the exchange that was closed last."""
        self._lacking: set[str] = set()
        """Exchanges of which it has been said that too few sites take part."""
        self._untidy: dict[str, float] = {}
        """Run -> when to try again to tidy it up."""
        self._tidying = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="closer", daemon=True)

    def start(self) -> None:
        """Finish what a crash may have left undone, and begin to close exchanges."""
        for run in self._coordinator.book.runs():
            self.tidy_up(run, after_crash=True)
        self._thread.start()

    def stop(self) -> None:
        """Finish the closing that is being computed, if any."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def wake(self) -> None:
        """Look again: something may have become ready."""
        with self._wake:
            self._wake.notify_all()

    def forget(self, run: str) -> None:
        """Forget the trouble with the exchanges of a run that begins anew."""
        for key in [key for key in list(self._trouble) if key.startswith(f"runs/{run}/")]:
            self._trouble.pop(key, None)

    def raise_trouble(self, exchange: Exchange) -> None:
        """Let sites know why a complete exchange does not close. They try again: the error is not theirs."""
        _, reason = self._trouble.get(str(exchange.key), (0.0, ""))
        if reason and may_close(exchange, self._coordinator.clock()):
            raise OSError(f"{exchange.key} cannot be closed at the moment: {reason}")

    # ------------------------------------------------------------------------------------------------------- the thread
    def _run(self) -> None:
        """Sleep until there is something to do, do it, and so on until `stop`."""
        while True:
            with self._wake:
                pause_s = self._seconds_until_next()  # asked first, lest a moment between the two be missed
                while not (self._ready() or self._overdue() or self._stopping):
                    self._announce_lacking()
                    self._wake.wait(LONGEST_SLEEP_S if pause_s is None else min(pause_s, LONGEST_SLEEP_S))
                    pause_s = self._seconds_until_next()
                if self._stopping:
                    return
            for exchange in self._ready():
                self._close(exchange.key)
            for run in self._overdue():
                self.tidy_up(run, after_crash=True)

    def _ready(self) -> list[Exchange]:
        """List what can be closed now, but for what has just failed."""
        now = self._coordinator.clock()
        return [
            exchange
            for exchange in self._coordinator.book.ready(now)
            if _is_over(self._trouble.get(str(exchange.key), (now, ""))[0], now, RETRY_CLOSING_S)
        ]

    def _overdue(self) -> list[str]:
        """List the runs that are to be tidied up once more."""
        now = self._coordinator.clock()
        return [run for run, moment in list(self._untidy.items()) if _is_over(moment, now, RETRY_TIDYING_S)]

    def _seconds_until_next(self) -> float | None:
        now = self._coordinator.clock()
        # An exchange whose pause is over and that is not ready has been paused or reset since: nothing to wait for.
        retries = [*self._untidy.values(), *(retry for retry, _ in list(self._trouble.values()))]
        moments = [retry for retry in retries if retry > now]
        due = self._coordinator.book.next_due()
        if due is not None and due > now:
            moments.append(due)
        return max(0.0, min(moments) - now) if moments else None

    def _announce_lacking(self) -> None:
        """Say once of each exchange that all who take part have contributed, and that they are too few."""
        lacking = {
            str(one.key): one
            for one in self._coordinator.book.open_exchanges()
            if one.outcome is None and one.counted and one.lacks and not one.waiting_for
        }
        for key in sorted(lacking.keys() - self._lacking):
            one = lacking[key]
            self._coordinator.announce(
                f"{key} waits: {', '.join(one.counted)} have contributed, nobody else takes part at the moment, and it "
                f"needs {one.least} sites ({'--min-sites' if one.least == one.floor else '--quorum'}). Sites that have "
                "left or were revoked can come back"
            )
        self._lacking = set(lacking)

    def _close(self, key: Key) -> None:
        coordinator = self._coordinator
        begin = time.perf_counter()
        exchange = self._decide(key)
        if exchange is not None:
            seconds = time.perf_counter() - begin
            self.num_closings, self.seconds_closing = self.num_closings + 1, self.seconds_closing + seconds
            try:
                coordinator.announce(_describe_outcome(exchange, seconds))
                for remark in self._remarks:
                    coordinator.announce(remark)
                self._announce_outlook(exchange)
                if exchange.is_closed and isinstance(key, NumberedKey):
                    self.tidy_up(key.run)
                coordinator.members.save_traffic()
            except Exception:  # whatever it is, the exchange is closed, and the others go on
                logger.exception("after closing %s", key)
        coordinator.on_change(str(key))

    def _decide(self, key: Key) -> Exchange | None:
        """Close or refuse an exchange; None if that is not to be done any more, or cannot be done now."""
        coordinator = self._coordinator
        with coordinator.locks[str(key)]:
            exchange = coordinator.book.get(key)
            if exchange is None or not may_close(exchange, coordinator.clock()):
                return None
            self._trouble.pop(str(key), None)
            try:
                exchange = self._compute_outcome(exchange)
            except Exception as error:  # whatever it is, the other exchanges go on
                logger.exception("closing %s", key)
                self._trouble[str(key)] = (coordinator.clock() + RETRY_CLOSING_S, f"{type(error).__name__}: {error}")
                coordinator.announce(f"{key} cannot be closed, trying again in {RETRY_CLOSING_S:.0f} s: {error}")
                return None
            coordinator.book.put(exchange)
            return exchange

    def _announce_outlook(self, exchange: Exchange) -> None:
        """Say whether there will be a common model as soon as it is known who takes part with what."""
        if exchange.is_closed and exchange.policy.settles_members and isinstance(exchange.key, RunKey):
            run = exchange.key.run
            self._coordinator.announce(f"run {run}: {model_store.outlook(self._coordinator, run)}")

    def _compute_outcome(self, exchange: Exchange) -> Exchange:
        """Compute the result of an exchange and write it, or write down why there is none."""
        coordinator = self._coordinator
        coordinator.store.result_folder(exchange.key)
        self._remarks = ()
        try:
            done = close_with(exchange, coordinator.clock())
            computed = step_of(done.key).close(done, coordinator.settings, coordinator.archive)
        except FederationError as error:
            refusal = error if isinstance(error, RefusedError) else RefusedError(str(error), code="do_not_match")
            failed = refuse_with(exchange, refusal, coordinator.clock())
            coordinator.store.save_refusal(failed)
            return failed
        coordinator.store.save_closing(done, computed.digest, record=computed.record)
        self._remarks = computed.remarks
        return done

    # ---------------------------------------------------------------------------------------------------- afterwards
    def tidy_up(self, run: str, *, after_crash: bool = False) -> None:
        """Write the models of a run that is over, and delete the documents that nobody will ask for again.

        What the machine does not let happen now is tried again later.

        Args:
            after_crash: Look for documents of all rounds, not of the last few only.
        """
        try:
            with self._tidying:
                self._tidy_up(run, after_crash=after_crash)
        except Exception as error:  # whatever it is, runs go on
            logger.exception("tidying up run %s", run)
            self._untidy[run] = self._coordinator.clock() + RETRY_TIDYING_S
            self._coordinator.announce(
                f"run {run}: models cannot be written, or old documents deleted, trying again "
                f"in {RETRY_TIDYING_S:.0f} s: {error}"
            )
        else:
            self._untidy.pop(run, None)

    def _tidy_up(self, run: str, *, after_crash: bool) -> None:
        coordinator, store = self._coordinator, self._coordinator.store
        latest = coordinator.book.latest_number(run)
        if latest is None:
            return
        if coordinator.book.run_state(run).closed:
            model_store.keep(coordinator, run)
        store.delete_contributions(InitialKey(run))
        best = coordinator.archive.best_round(run)
        recent = range(max(0, latest - RECENT_ROUNDS), latest)
        for number in recent if not after_crash else store.rounds_with_files(run):
            if number < latest:
                store.delete_contributions(RoundKey(run, number))
        for number in range(max(0, latest - RECENT_ROUNDS), latest + 1):
            if coordinator.book.is_closed(ValidationKey(run, number)):  # its record stays
                store.delete_contributions(ValidationKey(run, number))
        for number in store.rounds_with_results(run):
            if number < latest - 1 and number != best:
                store.delete_results(RoundKey(run, number))


def _is_over(end: float, now: float, pause_s: float) -> bool:
    """Tell whether a pause is over, or was begun before the clock was set back."""
    return not 0 < end - now <= pause_s


def _describe_outcome(exchange: Exchange, seconds: float) -> str:
    outcome, step = exchange.outcome, step_of(exchange.key)
    name = step.describe(exchange.key)
    if isinstance(outcome, Refused):
        return f"{name} is refused: {exchange.refusal}"
    assert isinstance(outcome, Closed)
    if achieved := step.describe_closing(exchange.key):
        return f"{name} is closed: {achieved}"
    missing = f", missing {', '.join(outcome.missing)}" if outcome.missing else ""
    waited = outcome.time - exchange.opened
    return (
        f"{name} is closed: {', '.join(outcome.contributors)}{missing}; "
        f"{waited:.1f} s from the first contribution, {seconds:.2f} s to compute"
    )
