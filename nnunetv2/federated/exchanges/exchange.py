"""Decide which contributions an exchange takes, and when it closes.

State is plain values, without sockets, files or a clock of its own.

An exchange is one meeting of the sites: each contributes one document, then the coordinator closes it with one result.

    open ---- all have contributed, or the deadline has passed with a quorum ----> closed   (for good)
      ^  \\-- the contributions do not go together -----------------------------> refused
      |                                                                             |
      +--------- a site contributes something else, or others than then count now --+

A latecomer is compared with the settled result of the others in an exchange of its own, which may be repeated.

Who is expected, who has failed and whether a run is paused may change while an exchange is open: `registry.py` knows,
and hands out exchanges in their present state. The kinds of exchanges differ in their policies here, and else in their
steps (`steps/`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.protocol.keys import Key
from nnunetv2.utilities.plain_text import printable

REFUSAL_CHARACTERS = 3900
"""Of a refusal, and of its remedy: both together fit into the text of a status."""


# -------------------------------------------------------------------------------------------------------- policies
@dataclass(frozen=True, kw_only=True)
class Policy:
    """The rules of one kind of exchange. By default, none holds."""

    pooled: bool = False
    """One thing is made of the contributions, so it is closed with no fewer of them than `min_sites`."""
    by_quorum: bool = False
    """Quorum and deadline of the federation close it; else it is about all expected sites, or about nothing."""
    first_stays: bool = False
    """The first acknowledged contribution stays: weights are never sent twice with different values in good faith."""
    compared: bool = False
    """A contribution that comes again after the closing is received and compared with the first: it is small, and
    people want to know the difference."""
    repeatable: bool = False
    """It only compares one site with the settled result of others: nothing is made of it, so it may be done again."""
    missable: bool = False
    """A site may come too late for it, and be let in afterwards by an exchange of its own."""
    carries_weights: bool = False
    """Its documents carry the tensors of a network."""
    settles_members: bool = False
    """Its result lists the sites of a run, and the tensors that they share."""
    pauses_with_run: bool = False
    """Contributions are taken while the run is paused, and nothing is closed."""
    stops_with_run: bool = False
    """Once the run is stopped, its last aggregate is the result."""
    recurs: bool = False
    """There is one after another in a run: a site that misses one goes on with the newest."""
    closes_first: bool = False
    """It is closed before others that can be closed at the same time."""


# ------------------------------------------------------------------------------------------------------- exchanges
@dataclass(frozen=True, slots=True)  # there is one per site and round
class Contribution:
    """The record of one site's document."""

    digest: str
    size: int
    """Bytes."""
    received: float


@dataclass(frozen=True)
class Closed:
    """An exchange that has its result."""

    time: float
    contributors: tuple[str, ...]
    missing: tuple[str, ...] = ()
    """Sites that were expected and are not in the result."""
    cohort: tuple[str, ...] = ()
    """Sites that mask with each other in the round that follows, where updates are masked."""


@dataclass(frozen=True)
class Refused:
    """An exchange whose contributions do not go together."""

    time: float
    message: str
    remedy: str
    code: str
    counted: tuple[str, ...] = ()
    """Sites whose contributions these were. Once others count, it says nothing any more."""

    def as_error(self) -> RefusedError:
        """Return the error that every site gets to see."""
        return RefusedError(self.message, self.remedy, code=self.code)


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One exchange at one moment."""

    key: Key
    policy: Policy
    expected: frozenset[str]
    """Sites that are to contribute."""
    required: frozenset[str] = frozenset()
    """Sites without which no deadline closes it."""
    quorum: int | None = None
    """Contributions that suffice at the deadline. None: all."""
    floor: int = 1
    """Contributions without which nothing closes it: no deadline, no failure, no operator, nobody's leaving."""
    closes_at: int | None = None
    """Contributions that suffice at any time: nobody else is waited for. None: there is no such number."""
    deadline_s: float | None = None
    """Seconds from `opened` to the deadline. None: there is none."""
    opened: float = 0.0
    """Time of the first contribution, or of the coordinator's last start: its absence is nobody's delay."""
    dropped_out: frozenset[str] = frozenset()
    """Sites that have reported a failure: not waited for once there is a quorum."""
    is_paused: bool = False
    """Whether the operator has paused the run: contributions are taken, nothing is closed."""
    is_overtaken: bool = False
    """Whether a later exchange has been closed already: nobody else is waited for."""
    is_forced: bool = False
    """Whether the operator wants it closed with the contributions so far: nobody else is waited for."""
    contributions: Mapping[str, Contribution] = field(default_factory=dict)
    outcome: Closed | Refused | None = None

    @property
    def is_closed(self) -> bool:
        """Tell whether there is a result."""
        return isinstance(self.outcome, Closed)

    @property
    def is_hurried(self) -> bool:
        """Tell whether nobody else is waited for once something can be made of it."""
        return self.is_overtaken or self.is_forced

    @property
    def refusal(self) -> str:
        """Say why there is no result although all have contributed, as people read it.

        Empty where that is not so.
        """
        return str(self.outcome.as_error()) if isinstance(self.outcome, Refused) else ""

    @property
    def waiting_for(self) -> tuple[str, ...]:
        """Name the expected sites that have not contributed."""
        return tuple(sorted(self.expected - self.contributions.keys()))

    @property
    def least(self) -> int:
        """Return the smallest number of contributions with which it is closed.

        The operator can go below a quorum.
        """
        if self.quorum is None or self.is_hurried or not self.policy.pooled:
            return self.floor
        return max(self.floor, self.quorum)

    @property
    def lacks(self) -> int:
        """Return how many contributions are missing to that number."""
        return max(0, self.least - len(self.counted))

    @property
    def counted(self) -> tuple[str, ...]:
        """Name the expected sites that have contributed.

        A site that was sent away does not count any more.
        """
        return tuple(sorted(self.expected & self.contributions.keys()))


class Verdict(Enum):
    """The decision on a contribution."""

    STORE = "store"
    """It is new, or replaces an earlier one."""
    SAME = "same"
    """It is held already, byte for byte."""
    KEEP_FIRST = "keep first"
    """Another one stays, or it comes too late to count."""
    COMPARE = "compare"
    """Another one stays, and is to say the same."""


def judge(exchange: Exchange, site: str, digest: str) -> Verdict:
    """Return the verdict on a contribution that is offered or has arrived.

    Raises:
        RefusedError: The site is not expected here, or the exchange is closed, without the site (then the code is
            `closed_without`) or with something else from it.
    """
    held = exchange.contributions.get(site)
    if held is not None and held.digest == digest:
        return Verdict.SAME
    if site not in exchange.expected:
        if exchange.is_closed and exchange.policy.missable:
            raise RefusedError(
                f"{exchange.key} was closed before site {site} came",
                "Start the command again: it asks to be let in late.",
                code="closed_without",
            )
        raise RefusedError(f"site {site} does not take part in {exchange.key}", code="not_expected")
    if exchange.policy.first_stays and not isinstance(exchange.outcome, Refused):  # else nothing was made of the first
        is_over = held is not None or exchange.is_closed or (exchange.is_hurried and is_enough(exchange))
        return Verdict.KEEP_FIRST if is_over else Verdict.STORE
    if exchange.is_closed and held is not None and exchange.policy.compared:
        return Verdict.COMPARE
    if exchange.is_closed and not exchange.policy.repeatable:
        raise changed_since(exchange.key, site)
    return Verdict.STORE


def changed_since(key: Key, site: str, change: str = "") -> RefusedError:
    """Return the refusal of a contribution that differs from the one that counted.

    Args:
        change: The change in words, where it is known.
    """
    return RefusedError(
        f"{key} is closed, and what site {site} sends now differs from what it sent before{change and f': {change}'}",
        "Its data, plans or network have changed since: undo the change, or start a new federation "
        "(nnUNetv2_fed_coordinator --folder NEW). Where all sites plan the same network, "
        "changed plans can also go by another name (-overwrite_plans_name).",
        code="already_closed",
    )


def with_contribution(exchange: Exchange, site: str, contribution: Contribution) -> Exchange:
    """Return the exchange after a contribution that `judge` wants stored.

    One that was refused is open again.
    """
    opened = exchange.opened if exchange.contributions else contribution.received
    contributions = {**exchange.contributions, site: contribution}
    return replace(exchange, contributions=contributions, opened=opened, outcome=None)


def without_contribution(exchange: Exchange, site: str) -> Exchange:
    """Return an open exchange without the contribution of a site."""
    contributions = {name: one for name, one in exchange.contributions.items() if name != site}
    return replace(exchange, contributions=contributions)


def without_stale_refusal(exchange: Exchange) -> Exchange:
    """Return the exchange, open again if other contributions were refused than count now.

    The site at fault may have been revoked, or have left the run.
    """
    outcome = exchange.outcome
    is_stale = isinstance(outcome, Refused) and outcome.counted != exchange.counted
    return replace(exchange, outcome=None) if is_stale else exchange


def may_close(exchange: Exchange, now: float) -> bool:
    """Tell whether the exchange can be closed: it is complete, due, or overtaken."""
    if exchange.outcome is not None or exchange.is_paused or not exchange.counted or exchange.lacks:
        return False
    if exchange.closes_at is not None and len(exchange.counted) >= exchange.closes_at:
        return True
    due = due_at(exchange)
    return not exchange.waiting_for or (exchange.is_hurried and is_enough(exchange)) or (due is not None and now >= due)


def is_enough(exchange: Exchange) -> bool:
    """Tell whether a result can be made if the operator wants it now."""
    counted = exchange.counted
    return bool(counted) and len(counted) >= exchange.floor and exchange.required.issubset(counted)


def due_at(exchange: Exchange) -> float | None:
    """Return when the exchange closes without those that are missing.

    None as long as it must wait for more.
    """
    if exchange.outcome is not None or exchange.is_paused or not has_quorum(exchange):
        return None
    if exchange.dropped_out.issuperset(exchange.waiting_for):
        return exchange.opened  # nobody else is going to contribute
    return None if exchange.deadline_s is None else exchange.opened + exchange.deadline_s


def has_quorum(exchange: Exchange) -> bool:
    """Tell whether enough sites have contributed to go on without the others.

    All that are needed are among them.
    """
    enough = max(exchange.least, min(exchange.quorum or len(exchange.expected), len(exchange.expected)))
    return 0 < enough <= len(exchange.counted) and exchange.required <= exchange.contributions.keys()


def close_with(exchange: Exchange, now: float) -> Exchange:
    """Return the exchange, closed with a result made of the contributions that count."""
    outcome = Closed(now, contributors=exchange.counted, missing=exchange.waiting_for)
    return replace(exchange, outcome=outcome)


def refuse_with(exchange: Exchange, error: RefusedError, now: float) -> Exchange:
    """Return the exchange, refused because the contributions do not go together."""
    message, remedy = (printable(text, most=REFUSAL_CHARACTERS) for text in (error.message, error.remedy))
    return replace(exchange, outcome=Refused(now, message, remedy, error.code, exchange.counted))
