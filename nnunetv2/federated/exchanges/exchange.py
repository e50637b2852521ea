"""Say who may do what, when: the state of exchanges as plain values, without sockets, files or a clock of its own.

An exchange is one meeting of the sites: each contributes one document, then the coordinator closes it with one result.

    open ---- all have contributed, or the deadline has passed with a quorum ----> closed   (for good)
      ^  \\-- the contributions do not go together -----------------------------> refused
      |                                                                             |
      +------------------------------ a site contributes something else ------------+

What compares a latecomer with what the others have settled is an exchange of its own, and may be repeated.

Who is expected, who has failed and whether a run is paused may change while an exchange is open: `book.py` knows, and
hands out exchanges with what holds at the moment.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Literal

from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.messages import (
    CENSUS_KEY,
    COARSE_KEY,
    FINE_KEY,
    SEGMENT_PATTERN,
    SITE_PATTERN,
    fine_key,
    initial_key,
    registration_key,
    round_key,
)
from nnunetv2.utilities.plain_text import printable

Kind = Literal[
    "census",
    "coarse",
    "fine",
    "plans",
    "late_census",
    "late_plans",
    "registration",
    "admission",
    "initial",
    "round",
    "validation",
]
FINAL_KINDS: frozenset[Kind] = frozenset({"initial", "round", "validation"})
"""Where the first acknowledged contribution stays: weights are never sent twice with different values in good faith."""
POOLED_KINDS: frozenset[Kind] = frozenset({"census", "coarse", "fine", "registration", "initial", "round"})
"""What makes one thing of the sites' contributions, and is closed with no fewer of them than `min_sites`. A validation
is closed with fewer, and then without a result; see `validation`."""
WEIGHT_KINDS: frozenset[Kind] = frozenset({"initial", "round"})
"""Whose documents carry the tensors of a network."""
MISSABLE_KINDS: frozenset[Kind] = frozenset({"census", "coarse", "fine", "plans", "registration"})
"""What a site may come too late for, and be let in afterwards by an exchange of its own."""
REGISTRATION_KINDS: frozenset[Kind] = frozenset({"registration", "admission"})
"""What a site sends again whenever its training goes on; versions of the software may word it differently."""
REFUSAL_CHARACTERS = 3900
"""Of a refusal, and of its remedy: both together fit into what tells of them."""
COMPARED_KINDS = REGISTRATION_KINDS | {"census", "plans"}
"""Of which it is worth receiving what differs from before: they are small, and a person wants to know what it is."""
LATE_KINDS: frozenset[Kind] = frozenset({"late_census", "late_plans"})
"""What only compares one site with what the others have settled: nothing is made of it, so it may be done again."""
_SEGMENT = SEGMENT_PATTERN.strip("^$")
_SITE = SITE_PATTERN.strip("^$")


# ------------------------------------------------------------------------------------------------------------ keys
@dataclass(frozen=True)
class ExchangeKey:
    """A key, taken apart."""

    text: str
    kind: Kind
    run: str | None = None
    number: int | None = None
    """The round, counted from 0; of a fine histogram, how often bins were looked into before, if they were."""
    site: str | None = None
    """The site that is let in late, in an exchange of its own."""

    def __str__(self) -> str:
        return self.text


def parse_key(text: str) -> ExchangeKey:
    """Take a key apart.

    Raises:
        RefusedError: There is no exchange of this name; its code is `unknown_gathering`.
    """
    fixed: dict[str, Kind] = {CENSUS_KEY: "census", COARSE_KEY: "coarse", FINE_KEY: "fine"}
    if text in fixed:
        return ExchangeKey(text, fixed[text])
    if match := re.fullmatch(f"{FINE_KEY}/([1-9][0-9]{{0,2}})", text):
        return ExchangeKey(text, "fine", number=int(match[1]))
    if re.fullmatch(f"plans/{_SEGMENT}", text):
        return ExchangeKey(text, "plans")
    if match := re.fullmatch(f"(fingerprint|plans/{_SEGMENT})/admissions/({_SITE})", text):
        return ExchangeKey(text, "late_census" if match[1] == "fingerprint" else "late_plans", site=match[2])
    if match := re.fullmatch(f"runs/({_SEGMENT})/(registration|initial)", text):
        return ExchangeKey(text, "registration" if match[2] == "registration" else "initial", match[1])
    if match := re.fullmatch(f"runs/({_SEGMENT})/(rounds|validations)/(0|[1-9][0-9]{{0,7}})", text):
        return ExchangeKey(text, "round" if match[2] == "rounds" else "validation", match[1], int(match[3]))
    if match := re.fullmatch(f"runs/({_SEGMENT})/admissions/({_SITE})", text):
        return ExchangeKey(text, "admission", match[1], site=match[2])
    raise RefusedError(
        f"there is no gathering {text[:200]!r}", "Use matching versions at all sites.", code="unknown_gathering"
    )


def prerequisite(key: ExchangeKey) -> ExchangeKey | None:
    """Return the exchange that must be closed before this one can begin."""
    if key.kind in ("coarse", "late_census"):
        return parse_key(CENSUS_KEY)
    if key.kind == "fine":
        return parse_key(fine_key(key.number - 1) if key.number else COARSE_KEY)
    if key.kind == "late_plans":
        return parse_key(key.text.removesuffix(f"/admissions/{key.site}"))
    if key.kind in ("initial", "admission"):
        return parse_key(registration_key(key.run))
    if key.kind == "validation":
        return parse_key(round_key(key.run, key.number))
    if key.kind == "round":
        return parse_key(round_key(key.run, key.number - 1) if key.number else initial_key(key.run))
    return None


# ------------------------------------------------------------------------------------------------------- exchanges
@dataclass(frozen=True, slots=True)  # there is one per site and round
class Contribution:
    """What is remembered of one site's document."""

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


@dataclass(frozen=True)
class Refused:
    """An exchange whose contributions do not go together."""

    time: float
    message: str
    remedy: str
    code: str

    def as_error(self) -> RefusedError:
        """Return the error that every site gets to see."""
        return RefusedError(self.message, self.remedy, code=self.code)


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One exchange at one moment."""

    key: ExchangeKey
    expected: frozenset[str]
    """Sites that are to contribute."""
    required: frozenset[str] = frozenset()
    """Sites without which no deadline closes it."""
    quorum: int | None = None
    """Contributions that suffice at the deadline. None: all."""
    floor: int = 1
    """Contributions without which nothing closes it: no deadline, no failure, no operator, nobody's leaving."""
    deadline_s: float | None = None
    """Seconds from `opened` to the deadline. None: there is none."""
    opened: float = 0.0
    """Time of the first contribution, or of the coordinator's last start: its absence is nobody's delay."""
    excused: frozenset[str] = frozenset()
    """Sites that have reported a failure: not waited for once there is a quorum."""
    is_held: bool = False
    """Whether the operator has paused the run: contributions are taken, nothing is closed."""
    is_superseded: bool = False
    """Whether what follows has happened already, or the operator wants to proceed: nobody else is waited for."""
    contributions: Mapping[str, Contribution] = field(default_factory=dict)
    outcome: Closed | Refused | None = None

    @property
    def is_closed(self) -> bool:
        """Tell whether there is a result."""
        return isinstance(self.outcome, Closed)

    @property
    def refusal(self) -> str:
        """Say why there is no result although all have contributed, as people read it; empty where that is not so."""
        return str(self.outcome.as_error()) if isinstance(self.outcome, Refused) else ""

    @property
    def waiting_for(self) -> tuple[str, ...]:
        """Name the expected sites that have not contributed."""
        return tuple(sorted(self.expected - self.contributions.keys()))

    @property
    def least(self) -> int:
        """Return the smallest number of contributions with which it is closed. The operator can go below a quorum."""
        if self.quorum is None or self.is_superseded or self.key.kind not in POOLED_KINDS:
            return self.floor
        return max(self.floor, self.quorum)

    @property
    def lacks(self) -> int:
        """Return how many contributions are missing to that number."""
        return max(0, self.least - len(self.counted))

    @property
    def counted(self) -> tuple[str, ...]:
        """Name the expected sites that have contributed. A site that was sent away does not count any more."""
        return tuple(sorted(self.expected & self.contributions.keys()))


def fresh_exchange(
    key: ExchangeKey,
    settings: FederationSettings,
    *,
    expected: Iterable[str] | None = None,
    required: Iterable[str] = (),
) -> Exchange:
    """Return an exchange that nobody has contributed to; all sites are expected unless told otherwise."""
    by_quorum = key.kind in FINAL_KINDS  # statistics, plans and matches are about all sites or about nothing
    return Exchange(
        key=key,
        expected=frozenset(settings.sites if expected is None else expected),
        required=frozenset(required),
        quorum=settings.quorum if by_quorum else None,
        floor=settings.min_sites if key.kind in POOLED_KINDS else 1,
        deadline_s=settings.deadline_s if by_quorum else None,
    )


class Verdict(Enum):
    """What is to be done with a contribution."""

    STORE = "store"
    """It is new, or replaces an earlier one."""
    SAME = "same"
    """It is held already, byte for byte."""
    KEEP_FIRST = "keep first"
    """Another one stays, or it comes too late to count."""
    COMPARE = "compare"
    """Another one stays, and is to say the same."""


def judge(exchange: Exchange, site: str, digest: str) -> Verdict:
    """Decide what happens to a contribution that is offered or has arrived.

    Raises:
        RefusedError: The site is not expected here, or the exchange is closed, without the site (then the code is
            `closed_without`) or with something else from it.
    """
    held = exchange.contributions.get(site)
    if held is not None and held.digest == digest:
        return Verdict.SAME
    if site not in exchange.expected:
        if exchange.is_closed and exchange.key.kind in MISSABLE_KINDS:
            raise RefusedError(
                f"{exchange.key} was closed before site {site} came",
                "Start the command again: it asks to be let in late.",
                code="closed_without",
            )
        raise RefusedError(f"site {site} does not take part in {exchange.key}", code="not_expected")
    if exchange.key.kind in FINAL_KINDS:
        is_over = held is not None or exchange.is_closed or (exchange.is_superseded and is_enough(exchange))
        return Verdict.KEEP_FIRST if is_over else Verdict.STORE
    if exchange.is_closed and held is not None and exchange.key.kind in COMPARED_KINDS:
        return Verdict.COMPARE
    if exchange.is_closed and exchange.key.kind not in LATE_KINDS:
        raise changed_since(exchange.key, site)
    return Verdict.STORE


def changed_since(key: ExchangeKey, site: str, change: str = "") -> RefusedError:
    """Return the refusal of what differs from a contribution that a closed exchange was made of.

    Args:
        change: What has changed, where that is known.
    """
    return RefusedError(
        f"{key} is closed, and what site {site} sends now differs from what it sent before{change and f': {change}'}",
        "Its data, plans or network have changed since: undo the change, or start a new federation "
        "(nnUNetv2_fed_coordinator --folder NEW). Changed plans can also go by another name "
        "(-overwrite_plans_name).",
        code="already_closed",
    )


def with_contribution(exchange: Exchange, site: str, contribution: Contribution) -> Exchange:
    """Return the exchange after a contribution that `judge` wants stored. One that was refused is open again."""
    opened = exchange.opened if exchange.contributions else contribution.received
    contributions = {**exchange.contributions, site: contribution}
    return replace(exchange, contributions=contributions, opened=opened, outcome=None)


def without_contribution(exchange: Exchange, site: str) -> Exchange:
    """Return an open exchange without what a site has contributed."""
    contributions = {name: one for name, one in exchange.contributions.items() if name != site}
    return replace(exchange, contributions=contributions)


def may_close(exchange: Exchange, now: float) -> bool:
    """Tell whether the exchange can be closed: it is complete, due, or overtaken."""
    if exchange.outcome is not None or exchange.is_held or not exchange.counted or exchange.lacks:
        return False
    due = due_at(exchange)
    return (
        not exchange.waiting_for or (exchange.is_superseded and is_enough(exchange)) or (due is not None and now >= due)
    )


def is_enough(exchange: Exchange) -> bool:
    """Tell whether something can be made of the contributions that count, if the operator wants that."""
    counted = exchange.counted
    return bool(counted) and len(counted) >= exchange.floor and exchange.required.issubset(counted)


def due_at(exchange: Exchange) -> float | None:
    """Return when the exchange closes without those that are missing; None as long as it must wait for more."""
    if exchange.outcome is not None or exchange.is_held or not has_quorum(exchange):
        return None
    if exchange.excused.issuperset(exchange.waiting_for):
        return exchange.opened  # nobody else is going to contribute
    return None if exchange.deadline_s is None else exchange.opened + exchange.deadline_s


def has_quorum(exchange: Exchange) -> bool:
    """Tell whether enough sites have contributed to go on without the others, among them all that are needed."""
    enough = max(exchange.least, min(exchange.quorum or len(exchange.expected), len(exchange.expected)))
    return 0 < enough <= len(exchange.counted) and exchange.required <= exchange.contributions.keys()


def closed(exchange: Exchange, now: float) -> Exchange:
    """Return the exchange with a result made of the contributions that count."""
    outcome = Closed(now, contributors=exchange.counted, missing=exchange.waiting_for)
    return replace(exchange, outcome=outcome)


def refused(exchange: Exchange, error: RefusedError, now: float) -> Exchange:
    """Return the exchange after contributions that do not go together."""
    message, remedy = (printable(text, most=REFUSAL_CHARACTERS) for text in (error.message, error.remedy))
    return replace(exchange, outcome=Refused(now, message, remedy, error.code))
