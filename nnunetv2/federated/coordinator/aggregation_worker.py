"""Close exchanges on a thread of its own: complete ones, due ones, after a crash.

Trouble of this machine (a full disk, say) is shown to the sites that wait, and tried again; nobody else's exchange
suffers from it.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace

from nnunetv2.federated.coordinator.members import Members
from nnunetv2.federated.coordinator.models.model_store import ModelStore
from nnunetv2.federated.coordinator.state import FederationState
from nnunetv2.federated.errors import FederationError, RefusedError, reason_without_paths
from nnunetv2.federated.exchanges.exchange import Closed, Exchange, Refused, may_close, refuse_with
from nnunetv2.federated.exchanges.steps import step_of
from nnunetv2.federated.protocol.keys import (
    InitialKey,
    Key,
    NumberedKey,
    RoundKey,
    RunKey,
    SurvivorsKey,
    UploadKey,
    ValidationKey,
    ValidationSurvivorsKey,
    ValidationUploadKey,
)

logger = logging.getLogger(__name__)

RECENT_ROUNDS = 3
"""Rounds that may have documents that nobody asks for any more; those before have been looked after."""
LONGEST_SLEEP_S = 60.0
"""The clock may be set, and the machine put to sleep: nobody tells."""
RETRY_TIDYING_S = 120.0
"""Pause after models could not be written, or documents not be deleted: nobody waits for that."""
RETRY_CLOSING_S = 15.0
"""Pause after a closing that failed for a reason of the machine, such as a full disk."""


class AggregationWorker:
    """The thread that closes the exchanges of a federation."""

    def __init__(self, state: FederationState, members: Members, models: ModelStore) -> None:
        self._state = state
        self._members = members
        self._models = models
        self._stopping = False
        self.num_closings = 0
        """Exchanges that were closed or refused since the start."""
        self.seconds_closing = 0.0
        """Time that this took altogether."""
        self._remarks: tuple[str, ...] = ()
        """Further lines for the log about the exchange that was closed last."""
        self._lacking: set[str] = set()
        """Exchanges of which it has been logged that too few sites take part."""
        self._untidy: dict[str, float] = {}
        """Run -> when to try again to tidy it up."""
        self._tidying = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="aggregation", daemon=True)

    def start(self) -> None:
        """Finish tidying that a crash cut short, and begin to close exchanges."""
        for run in self._state.registry.runs():
            self.tidy_up(run, after_crash=True)
        self._thread.start()

    def stop(self) -> None:
        """Finish the closing that is being computed, if any."""
        with self._state.changed:
            self._stopping = True
            self._state.changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    # ------------------------------------------------------------------------------------------------------- the thread
    def _run(self) -> None:
        """Sleep until there is something to do, do it, and so on until `stop`."""
        while True:
            lines: list[str] = []
            with self._state.changed:
                pause_s = self._seconds_until_next()  # asked first, lest a moment between the two be missed
                while not (self._ready() or self._overdue() or self._stopping or (lines := self._describe_lacking())):
                    self._state.changed.wait(LONGEST_SLEEP_S if pause_s is None else min(pause_s, LONGEST_SLEEP_S))
                    pause_s = self._seconds_until_next()
                if self._stopping:
                    return
            for line in lines:  # not while holding the condition that every change waits for
                self._state.log(line)
            for exchange in self._ready():
                self._close(exchange.key)
            for run in self._overdue():
                self.tidy_up(run, after_crash=True)

    def _ready(self) -> list[Exchange]:
        """List the exchanges that can be closed now, except recent failures."""
        now, obstacles = self._state.clock(), self._state.obstacles.copy()
        return [
            exchange
            for exchange in self._state.registry.ready(now)
            if str(exchange.key) not in obstacles
            or _is_over(obstacles[str(exchange.key)].retry_at, now, RETRY_CLOSING_S)
        ]

    def _overdue(self) -> list[str]:
        """List the runs that are to be tidied up once more."""
        now = self._state.clock()
        return [run for run, moment in list(self._untidy.items()) if _is_over(moment, now, RETRY_TIDYING_S)]

    def _seconds_until_next(self) -> float | None:
        now = self._state.clock()
        # An exchange whose pause is over and that is not ready has been paused or reset since: nothing to wait for.
        retries = [*self._untidy.values(), *(one.retry_at for one in list(self._state.obstacles.values()))]
        moments = [retry for retry in retries if retry > now]
        due = self._state.registry.next_due()
        if due is not None and due > now:
            moments.append(due)
        return max(0.0, min(moments) - now) if moments else None

    def _describe_lacking(self) -> list[str]:
        """Tell once of each complete exchange that too few sites take part, a line each."""
        lacking = {
            str(one.key): one
            for one in self._state.registry.open_exchanges()
            if one.outcome is None and one.counted and one.lacks and not one.waiting_for
        }
        told, self._lacking = self._lacking, set(lacking)
        return [
            f"{key} waits: {', '.join(one.counted)} have contributed, nobody else takes part at the moment, and it "
            f"needs {one.least} sites ({'--min-sites' if one.least == one.floor else '--quorum'}). Sites that have "
            "left or were revoked can come back"
            for key, one in sorted(lacking.items())
            if key not in told
        ]

    def _close(self, key: Key) -> None:
        begin = time.perf_counter()
        with self._state.closing(key):
            exchange = self._decide(key)
            if exchange is not None:
                self._count_and_log(exchange, time.perf_counter() - begin)

    def _decide(self, key: Key) -> Exchange | None:
        """Close or refuse an exchange; None if it is not ready, or cannot be closed now."""
        state = self._state
        with state.locks[str(key)]:
            exchange = state.registry.get(key)
            if exchange is None or not may_close(exchange, state.clock()):
                return None
            state.remove_obstacle(key)
            try:
                return self._compute_outcome(exchange)
            except Exception as error:  # whatever it is, the other exchanges go on
                logger.exception("closing %s", key)
                reason = f"{type(error).__name__}: {reason_without_paths(error)}"
                state.set_obstacle(key, reason, retry_s=RETRY_CLOSING_S)
                state.log(f"{key} cannot be closed, trying again in {RETRY_CLOSING_S:.0f} s: {error}")
                return None

    def _compute_outcome(self, exchange: Exchange) -> Exchange | None:
        """Compute the result of an exchange and write it, or write down why there is none.

        None if contributions were damaged on this machine: they are dropped, and it is open for them.
        """
        state = self._state
        state.store.result_folder(exchange.key)
        self._remarks = ()
        try:
            outcome = step_of(exchange.key).outcome(exchange, state.clock(), state.registry)
            done = replace(exchange, outcome=outcome)
            computed = step_of(done.key).close(done, state.settings, state.documents)
        except (FederationError, FileNotFoundError) as error:
            if self._drop_damaged(exchange):
                return None
            if not isinstance(error, FederationError):
                raise
            refusal = error if isinstance(error, RefusedError) else RefusedError(str(error), code="do_not_match")
            failed = refuse_with(exchange, refusal, state.clock())
            state.refuse(failed)
            return failed
        state.close(done, computed.digest, record=computed.record)
        self._remarks = computed.remarks
        return done

    def _drop_damaged(self, exchange: Exchange) -> bool:
        """Drop the contributions that this machine has damaged or lost, and tell whether there are any.

        Their sites are not at fault, and nobody's exchange is refused for them.
        """
        state, damaged = self._state, self._state.store.damaged_contributions(exchange)
        for site in damaged:
            exchange = state.drop_contribution(exchange, site, by=None)
            state.log(
                f"{exchange.key}: the contribution of site {site} was damaged on the disk of this machine, and is "
                "dropped: start the command of that site again, which sends it again"
            )
        return bool(damaged)

    # ------------------------------------------------------------------------------------------------------ afterwards
    def _count_and_log(self, exchange: Exchange, seconds: float) -> None:
        """Log an outcome, then tidy up its run."""
        key = exchange.key
        self.num_closings, self.seconds_closing = self.num_closings + 1, self.seconds_closing + seconds
        try:
            self._state.log(_describe_outcome(exchange, seconds))
            for remark in self._remarks:
                self._state.log(remark)
            self._log_outlook(exchange)
            if exchange.is_closed and isinstance(key, NumberedKey):
                self.tidy_up(key.run)
            self._members.save_traffic()
        except Exception:  # whatever it is, the exchange is closed, and the others go on
            logger.exception("after closing %s", key)

    def _log_outlook(self, exchange: Exchange) -> None:
        """Log whether there will be a common model, once all networks are known."""
        if exchange.is_closed and exchange.policy.settles_members and isinstance(exchange.key, RunKey):
            run = exchange.key.run
            outlook = self._models.outlook(run)
            for line in (outlook, *(outlook.details() if outlook is not None else ())):
                self._state.log(f"run {run}: {line}")

    def _forget_masked(self, run: str, number: int, *, results: bool) -> None:
        """Delete the masked documents of a closed round and its closed validation."""
        registry, store = self._state.registry, self._state.store
        keys: list[Key] = [UploadKey(run, number), SurvivorsKey(run, number)]
        if registry.is_closed(ValidationKey(run, number)):
            keys += [ValidationUploadKey(run, number), ValidationSurvivorsKey(run, number)]
        for key in keys:
            if registry.has_begun(str(key)):
                store.delete_contributions(key)
                if results:
                    store.delete_results(key)

    def tidy_up(self, run: str, *, after_crash: bool = False) -> None:
        """Write the models of a finished run, and delete superseded documents.

        If this fails, it is tried again later.

        Args:
            after_crash: Look for documents of all rounds, not of the last few only.
        """
        try:
            with self._tidying:
                self._tidy_up(run, after_crash=after_crash)
        except Exception as error:  # whatever it is, runs go on
            logger.exception("tidying up run %s", run)
            self._untidy[run] = self._state.clock() + RETRY_TIDYING_S
            self._state.log(
                f"run {run}: models cannot be written, or old documents deleted, trying again "
                f"in {RETRY_TIDYING_S:.0f} s: {error}"
            )
        else:
            self._untidy.pop(run, None)

    def _tidy_up(self, run: str, *, after_crash: bool) -> None:
        registry, store, documents = self._state.registry, self._state.store, self._state.documents
        latest = registry.latest_number(run)
        if latest is None:
            return
        if registry.run_state(run).closed:
            self._models.keep(run)
        store.delete_contributions(InitialKey(run))
        best = documents.best_round(run)
        recent = range(max(0, latest - RECENT_ROUNDS), latest)
        for number in recent if not after_crash else store.rounds_with_files(run):
            if number < latest:
                store.delete_contributions(RoundKey(run, number))
        for number in recent if not after_crash else range(latest):  # those of the last one are small, and in use
            self._forget_masked(run, number, results=True)
        self._forget_masked(run, latest, results=False)
        for number in range(max(0, latest - RECENT_ROUNDS), latest + 1):
            if registry.is_closed(ValidationKey(run, number)):  # its record stays
                store.delete_contributions(ValidationKey(run, number))
        for number in store.rounds_with_results(run):
            if number < latest - 1 and number != best:
                store.delete_results(RoundKey(run, number))


def _is_over(end: float, now: float, pause_s: float) -> bool:
    """Return whether a pause is over, or was begun before a clock was set back."""
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
