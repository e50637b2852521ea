"""Hold every exchange of a federation.

Also tell which exchanges may begin, which sites are expected, and how far the runs are.

Exchanges are stored as they were written down. Whatever can change while one is open (the sites of the federation, who
has left a run, who has failed, whether the run is paused) is put in when it is handed out. So a refusal that was about
other sites' contributions than those that count at the moment does not leave this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.exchanges.exchange import Closed, Exchange, due_at, may_close, without_stale_refusal
from nnunetv2.federated.exchanges.steps import fresh_exchange, prerequisite, step_of
from nnunetv2.federated.protocol.api import FederationSettings, RunState
from nnunetv2.federated.protocol.keys import InitialKey, Key, NumberedKey, RegistrationKey, RoundKey, RunKey


@dataclass(frozen=True, kw_only=True)
class RunControl:
    """The wishes of the operator and the sites for a run."""

    state: Literal["running", "paused", "stopped"] = "running"
    left: frozenset[str] = frozenset()
    """Sites that have left the run, and are not expected until they return."""
    failed: Mapping[str, int] = field(default_factory=dict)
    """Site -> the round from which on it cannot go on, as it has reported. Contributing again takes that back."""
    forced: frozenset[str] = frozenset()
    """Open exchanges that the operator wants closed with the contributions so far."""


class ExchangeRegistry:
    """Every exchange of a federation, and the control of its runs.

    Not safe for concurrent changes: its owner sees to that. Exchanges are immutable, so one that was read stays
    true of its moment.
    """

    def __init__(
        self,
        settings: FederationSettings,
        exchanges: Iterable[Exchange] = (),
        controls: Mapping[str, RunControl] | None = None,
    ) -> None:
        self.settings = settings
        self.controls = dict(controls or {})
        self._exchanges: dict[Key, Exchange] = {}
        self._open: set[Key] = set()
        self._runs: dict[str, None] = {}
        self._latest: dict[str, int] = {}
        self._admitted: dict[str, set[str]] = {}
        self._asking: dict[str, set[str]] = {}
        """Run -> sites that want to mask with the others from the next round on. They ask again after a restart."""
        for exchange in exchanges:
            self.put(exchange)

    def __iter__(self) -> Iterator[Exchange]:
        return (self._present(exchange) for exchange in list(self._exchanges.values()))

    def get(self, key: Key) -> Exchange | None:
        """Return an exchange that has begun, as it is at this moment, or None."""
        exchange = self._exchanges.get(key)
        return None if exchange is None else self._present(exchange)

    def has_begun(self, key: str) -> bool:
        """Tell whether there is an exchange under a key, proper or not."""
        return key in self._exchanges

    def put(self, exchange: Exchange) -> None:
        """Remember the newest state of an exchange."""
        key = exchange.key
        self._exchanges[key] = exchange
        if isinstance(key, RunKey):
            self._runs[key.run] = None
        if not exchange.is_closed:
            self._open.add(key)
            return
        self._open.discard(key)
        if isinstance(key, RunKey):
            if isinstance(key, NumberedKey) and exchange.policy.recurs:
                self._latest[key.run] = max(key.number, self._latest.get(key.run, 0))
                self._asking.pop(key.run, None)
            if (newcomer := step_of(key).newcomer(key)) is not None:
                self._admitted.setdefault(key.run, set()).add(newcomer)

    def forget_run(self, run: str) -> None:
        """Forget a run in which no round has been closed."""
        for key in list(self._exchanges):  # a copy: others put exchanges of other runs meanwhile
            if not isinstance(key, RunKey) or key.run != run:
                continue
            del self._exchanges[key]
            self._open.discard(key)
        self._runs.pop(run, None)
        self._admitted.pop(run, None)
        self._asking.pop(run, None)
        self.controls.pop(run, None)

    def begin(self, key: Key, *, required: Iterable[str] = ()) -> Exchange:
        """Return the exchange, or a fresh one if it may begin now.

        Args:
            required: Sites without which a fresh one cannot be closed at its deadline.

        Raises:
            RefusedError: The exchange before is not closed yet, or the run has fewer rounds or is stopped.
        """
        existing = self.get(key)
        if existing is not None:
            return existing
        before = prerequisite(key)
        if before is not None and not self.is_closed(before):
            raise RefusedError(
                f"{key} cannot begin before {before} is closed",
                "If the coordinator was restored from a backup, start the training without --c.",
                code="too_early",
            )
        step_of(key).check_may_begin(key, self.settings)
        return self._present(fresh_exchange(key, self.settings, required=required))

    def is_closed(self, key: Key) -> bool:
        """Tell whether an exchange has its result."""
        exchange = self._exchanges.get(key)
        return exchange is not None and exchange.is_closed

    # ---------------------------------------------------------------------------------------- who is expected where
    def control(self, run: str) -> RunControl:
        """Return the control of a run."""
        return self.controls.get(run, RunControl())

    def left(self, run: str) -> frozenset[str]:
        """Name the sites that have left a run."""
        return self.control(run).left

    def expected(self, key: Key) -> frozenset[str]:
        """Return the sites that are to contribute to an open exchange now."""
        return step_of(key).expected(key, self)

    def members(self, run: str) -> frozenset[str]:
        """Return the sites that take part in the rounds of a run.

        Registered or admitted, and not gone since.
        """
        registered = self.contributors(RegistrationKey(run)) | self._admitted.get(run, set())
        return (registered & frozenset(self.settings.sites)) - self.left(run)

    def may_read(self, exchange: Exchange, site: str) -> bool:
        """Tell whether a site may have the result.

        It is expected, takes part in the run, or plans late.
        """
        return site in exchange.expected or step_of(exchange.key).may_read(exchange.key, site, self)

    def admitted(self, run: str) -> tuple[str, ...]:
        """Name the sites that joined a run after it had begun."""
        return tuple(sorted(self._admitted.get(run, ())))

    def contributors(self, key: Key) -> frozenset[str]:
        """Name the sites whose contributions are in a result.

        Empty as long as there is no result.
        """
        exchange = self._exchanges.get(key)
        outcome = None if exchange is None else exchange.outcome
        return frozenset(outcome.contributors) if isinstance(outcome, Closed) else frozenset()

    # ------------------------------------------------------------------------------------- who masks with each other
    def cohort(self, run: str, number: int) -> frozenset[str]:
        """Name the sites that mask with each other in a round, once they are known."""
        before = self._exchanges.get(RoundKey(run, number - 1) if number else InitialKey(run))
        outcome = None if before is None else before.outcome
        return frozenset(outcome.cohort) if isinstance(outcome, Closed) else frozenset()

    def ask(self, run: str, site: str) -> None:
        """Note that a site outside the open round's cohort wants to be in the next."""
        cohort = self.cohort(run, self._latest.get(run, -1) + 1)
        if cohort and site not in cohort:
            self._asking.setdefault(run, set()).add(site)

    def next_cohort(self, run: str, number: int, missing: Iterable[str]) -> tuple[str, ...]:
        """Name the sites that mask in the round after one that closes now.

        Number -1 stands for the initial weights.

        Those are the members of the run that were in it, and those that have asked since. With too few of them, those
        that were missing are waited for.
        """
        members, before = self.members(run), self.cohort(run, number) if number >= 0 else self.members(run)
        least = max(3, self.settings.min_sites)
        cohort = ((before - frozenset(missing)) | self._asking.get(run, set())) & members
        for larger in (members, before):
            cohort = cohort if len(cohort) >= least else larger
        return tuple(sorted(cohort))

    def _present(self, exchange: Exchange) -> Exchange:
        """Return an exchange in its present state; closed ones keep theirs."""
        key = exchange.key
        if isinstance(exchange.outcome, Closed):
            outcome = exchange.outcome
            return replace(exchange, expected=frozenset(outcome.contributors) | frozenset(outcome.missing))
        control = self.control(key.run) if isinstance(key, RunKey) else RunControl()
        step = step_of(key)
        now = fresh_exchange(key, self.settings, expected=self.expected(key))
        present = replace(
            exchange,
            expected=now.expected,
            quorum=now.quorum,
            floor=step.floor(key, self),
            closes_at=step.closes_at(key, self),
            deadline_s=now.deadline_s,
            dropped_out=frozenset(
                site for site, number in control.failed.items() if isinstance(key, NumberedKey) and number <= key.number
            ),
            is_paused=control.state != "running" and exchange.policy.pauses_with_run,
            is_overtaken=step.is_overtaken(key, self),
            is_forced=str(key) in control.forced,
        )
        return without_stale_refusal(present)

    # ------------------------------------------------------------------------------------------------------ closing
    def ready(self, now: float) -> list[Exchange]:
        """List the exchanges that can be closed now, in order of closing."""
        ready = [exchange for exchange in self.open_exchanges() if may_close(exchange, now)]
        return sorted(ready, key=_order_of_closing)

    def next_due(self) -> float | None:
        """Return when the next exchange closes by itself."""
        return min((due for exchange in self.open_exchanges() if (due := due_at(exchange)) is not None), default=None)

    def restarted(self, now: float) -> None:
        """Let deadlines count from the coordinator's start: nobody could contribute while it was away."""
        for exchange in self.open_exchanges():
            if exchange.outcome is None:
                self._exchanges[exchange.key] = replace(self._exchanges[exchange.key], opened=now)

    def open_exchanges(self) -> list[Exchange]:
        """List the exchanges that have begun and have no result.

        Among them those that were refused.
        """
        found = (self._exchanges.get(key) for key in sorted(self._open))  # None: its run has just been forgotten
        return [self._present(exchange) for exchange in found if exchange is not None]

    # --------------------------------------------------------------------------------------------------------- runs
    @property
    def num_rounds(self) -> int | None:
        """Number of rounds of every run.

        None where the trainers decide, so that a run never counts as complete.
        """
        return self.settings.num_rounds

    def runs(self) -> list[str]:
        """Name the runs that some site has registered for."""
        return sorted(self._runs)

    def has_run(self, run: str) -> bool:
        """Tell whether some site has registered for a run."""
        return run in self._runs

    def latest_round(self, run: str) -> Exchange | None:
        """Return the last round of a run that is closed, or None."""
        return self.get(RoundKey(run, self._latest[run])) if run in self._latest else None

    def latest_number(self, run: str) -> int | None:
        """Return the number of the last round of a run that is closed, or None."""
        return self._latest.get(run)

    def closed_at(self, run: str, rounds: int) -> list[float]:
        """Return when the last rounds of a run were closed.

        At most so many, in order.
        """
        last = self._latest.get(run, -1)
        found = (self._exchanges.get(RoundKey(run, number)) for number in range(max(0, last + 1 - rounds), last + 1))
        return [one.outcome.time for one in found if one is not None and isinstance(one.outcome, Closed)]

    def run_state(self, run: str) -> RunState:
        """Say how far a run is.

        Of one that nobody has registered for, all fields are empty.
        """
        registration = self.get(RegistrationKey(run))
        next_round = self._latest.get(run, -1) + 1
        control = self.control(run)
        complete = self.num_rounds is not None and next_round >= self.num_rounds
        is_over = complete or control.state == "stopped"
        takes_updates = self.is_closed(InitialKey(run)) and not is_over
        return RunState(
            run=run,
            registered=tuple(sorted(registration.contributions)) if registration else (),
            members=tuple(sorted(self.members(run))),
            left=tuple(sorted(control.left)),
            state="complete" if complete else control.state,
            num_rounds=self.num_rounds,
            closed=is_over,
            open_round=next_round if takes_updates else None,
            rounds_closed=next_round,
        )


def _order_of_closing(exchange: Exchange) -> tuple[bool, int]:
    """Return the sort key: validations first, since they belong to earlier rounds."""
    return not exchange.policy.closes_first, exchange.key.number if isinstance(exchange.key, NumberedKey) else 0
