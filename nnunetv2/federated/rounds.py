"""Say who may do what, when: the state of gatherings as plain values, without sockets, files or a clock of its own.

A gathering is one meeting of the sites: each contributes one document, then the coordinator closes it with one result.

    open ---- all have contributed, or the deadline has passed with a quorum ----> closed   (for good)
      ^  \\-- the contributions do not go together -----------------------------> refused
      |                                                                             |
      +------------------------------ a site contributes something else ------------+
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Literal

from nnunetv2.federated.bodies import FederationSettings, RunState
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.messages import (
    CENSUS_KEY,
    COARSE_KEY,
    FINE_KEY,
    SEGMENT_PATTERN,
    initial_key,
    registration_key,
    round_key,
)

Kind = Literal["census", "coarse", "fine", "plans", "registration", "initial", "round"]
FINAL_KINDS: frozenset[Kind] = frozenset({"initial", "round"})
"""Where the first acknowledged contribution stays: weights are never sent twice with different values in good faith."""
_SEGMENT = SEGMENT_PATTERN.strip("^$")


# ------------------------------------------------------------------------------------------------------------ keys
@dataclass(frozen=True)
class GatheringKey:
    """A key, taken apart."""

    text: str
    kind: Kind
    run: str | None = None
    number: int | None = None
    """The round, counted from 0."""

    def __str__(self) -> str:
        return self.text


def parse_key(text: str) -> GatheringKey:
    """Take a key apart.

    Raises:
        RefusedError: There is no gathering of this name; its code is `unknown_gathering`.
    """
    fixed: dict[str, Kind] = {CENSUS_KEY: "census", COARSE_KEY: "coarse", FINE_KEY: "fine"}
    if text in fixed:
        return GatheringKey(text, fixed[text])
    if re.fullmatch(f"plans/{_SEGMENT}", text):
        return GatheringKey(text, "plans")
    if match := re.fullmatch(f"runs/({_SEGMENT})/(registration|initial)", text):
        return GatheringKey(text, "registration" if match[2] == "registration" else "initial", match[1])
    if match := re.fullmatch(f"runs/({_SEGMENT})/rounds/(0|[1-9][0-9]{{0,7}})", text):
        return GatheringKey(text, "round", match[1], int(match[2]))
    raise RefusedError(f"there is no gathering {text[:200]!r}", "Use matching versions at all sites.",
                       code="unknown_gathering")


def prerequisite(key: GatheringKey) -> GatheringKey | None:
    """Return the gathering that must be closed before this one can begin."""
    if key.kind == "coarse":
        return parse_key(CENSUS_KEY)
    if key.kind == "fine":
        return parse_key(COARSE_KEY)
    if key.kind == "initial":
        return parse_key(registration_key(key.run))
    if key.kind == "round":
        return parse_key(round_key(key.run, key.number - 1) if key.number else initial_key(key.run))
    return None


# ------------------------------------------------------------------------------------------------------- gatherings
@dataclass(frozen=True)
class Contribution:
    """What is remembered of one site's document."""

    digest: str
    size: int
    """Bytes."""
    received: float


@dataclass(frozen=True)
class Closed:
    """A gathering that has its result."""

    time: float
    contributors: tuple[str, ...]
    missing: tuple[str, ...] = ()
    """Sites that were expected and are not in the result."""


@dataclass(frozen=True)
class Refused:
    """A gathering whose contributions do not go together."""

    time: float
    message: str
    remedy: str
    code: str

    def as_error(self) -> RefusedError:
        """Return the error that every site gets to see."""
        return RefusedError(self.message, self.remedy, code=self.code)


@dataclass(frozen=True, kw_only=True)
class Gathering:
    """One gathering at one moment."""

    key: GatheringKey
    expected: frozenset[str]
    """Sites that are to contribute."""
    required: frozenset[str] = frozenset()
    """Sites without which no deadline closes it."""
    quorum: int | None = None
    """Contributions that suffice at the deadline. None: all."""
    deadline_s: float | None = None
    """Seconds from `opened` to the deadline. None: there is none."""
    opened: float = 0.0
    """Time of the first contribution, or of the coordinator's last start: its absence is nobody's delay."""
    contributions: Mapping[str, Contribution] = field(default_factory=dict)
    outcome: Closed | Refused | None = None

    @property
    def is_closed(self) -> bool:
        """Tell whether there is a result."""
        return isinstance(self.outcome, Closed)

    @property
    def waiting_for(self) -> tuple[str, ...]:
        """Name the expected sites that have not contributed."""
        return tuple(sorted(self.expected - self.contributions.keys()))


def fresh_gathering(key: GatheringKey, settings: FederationSettings, *, required: Iterable[str] = ()) -> Gathering:
    """Return a gathering that nobody has contributed to."""
    by_quorum = key.kind in FINAL_KINDS  # statistics, plans and matches are about all sites or about nothing
    return Gathering(key=key, expected=frozenset(settings.sites), required=frozenset(required),
                     quorum=settings.quorum if by_quorum else None,
                     deadline_s=settings.deadline_s if by_quorum else None)


class Verdict(Enum):
    """What is to be done with a contribution."""

    STORE = "store"
    """It is new, or replaces an earlier one."""
    SAME = "same"
    """It is held already, byte for byte."""
    KEEP_FIRST = "keep first"
    """Another one stays, or it comes too late to count."""


def judge(gathering: Gathering, site: str, digest: str) -> Verdict:
    """Decide what happens to a contribution that is offered or has arrived.

    Raises:
        RefusedError: The site is not expected here, or the gathering is closed and this differs from what counted.
    """
    if site not in gathering.expected:
        raise RefusedError(f"site {site} does not take part in {gathering.key}", code="not_expected")
    held = gathering.contributions.get(site)
    if held is not None and held.digest == digest:
        return Verdict.SAME
    if gathering.key.kind in FINAL_KINDS:
        return Verdict.KEEP_FIRST if held is not None or gathering.is_closed else Verdict.STORE
    if gathering.is_closed:
        raise RefusedError(
            f"{gathering.key} is closed, and what site {site} sends now differs from what it sent before",
            "Its data, plans or network have changed since: undo the change, or start a new federation "
            "(nnUNetv2_fed_coordinator --folder NEW). Changed plans can also go by another name "
            "(-overwrite_plans_name).", code="already_closed")
    return Verdict.STORE


def with_contribution(gathering: Gathering, site: str, contribution: Contribution) -> Gathering:
    """Return the gathering after a contribution that `judge` wants stored. One that was refused is open again."""
    opened = gathering.opened if gathering.contributions else contribution.received
    contributions = {**gathering.contributions, site: contribution}
    return replace(gathering, contributions=contributions, opened=opened, outcome=None)


def may_close(gathering: Gathering, now: float) -> bool:
    """Tell whether the gathering can be closed: it is complete, or due."""
    if gathering.outcome is not None:
        return False
    due = due_at(gathering)
    return not gathering.waiting_for or (due is not None and now >= due)


def due_at(gathering: Gathering) -> float | None:
    """Return when the gathering closes without those that are missing; None as long as it must wait for more."""
    if gathering.outcome is not None or gathering.deadline_s is None or not gathering.contributions:
        return None
    enough = len(gathering.contributions) >= (gathering.quorum or len(gathering.expected))
    return gathering.opened + gathering.deadline_s if enough and has_required(gathering) else None


def has_required(gathering: Gathering) -> bool:
    """Tell whether all sites have contributed without which the gathering makes no sense."""
    return gathering.required <= gathering.contributions.keys()


def closed(gathering: Gathering, now: float) -> Gathering:
    """Return the gathering with a result made of all its contributions."""
    outcome = Closed(now, contributors=tuple(sorted(gathering.contributions)), missing=gathering.waiting_for)
    return replace(gathering, outcome=outcome)


def refused(gathering: Gathering, error: RefusedError, now: float) -> Gathering:
    """Return the gathering after contributions that do not go together."""
    return replace(gathering, outcome=Refused(now, error.message, error.remedy, error.code))


# ------------------------------------------------------------------------------------------------------------- book
class RoundBook:
    """Hold every gathering of a federation: what exists, what may begin, how far the runs are.

    Not safe for concurrent changes: its owner sees to that. Gatherings are immutable, so what was read stays true
    of its moment.
    """

    def __init__(self, settings: FederationSettings, gatherings: Iterable[Gathering] = ()) -> None:
        self.settings = settings
        self._gatherings = {gathering.key.text: gathering for gathering in gatherings}

    def __iter__(self) -> Iterator[Gathering]:
        return iter(list(self._gatherings.values()))

    def get(self, key: GatheringKey | str) -> Gathering | None:
        """Return a gathering that has begun, or None."""
        return self._gatherings.get(str(key))

    def put(self, gathering: Gathering) -> None:
        """Remember the newest state of a gathering."""
        self._gatherings[gathering.key.text] = gathering

    def begin(self, key: GatheringKey, *, required: Iterable[str] = ()) -> Gathering:
        """Return the gathering, or a fresh one if it may begin now.

        Args:
            required: Sites without which a fresh one cannot be closed at its deadline.

        Raises:
            RefusedError: What comes before is not closed yet, or the run has fewer rounds.
        """
        existing = self.get(key)
        if existing is not None:
            return existing
        before = prerequisite(key)
        if before is not None and not self.is_closed(before):
            raise RefusedError(f"{key} cannot begin before {before} is closed", code="too_early")
        if key.kind == "round" and self.num_rounds is not None and key.number >= self.num_rounds:
            raise RefusedError(f"{key}: the run has {self.num_rounds} rounds, counted from 0", code="unknown_gathering")
        return fresh_gathering(key, self.settings, required=required)

    def is_closed(self, key: GatheringKey | str) -> bool:
        """Tell whether a gathering has its result."""
        gathering = self.get(key)
        return gathering is not None and gathering.is_closed

    @property
    def num_rounds(self) -> int | None:
        """Number of rounds of every run; None where the trainers decide, so that a run never counts as complete."""
        return self.settings.num_epochs

    def ready(self, now: float) -> list[Gathering]:
        """List what can be closed now."""
        return [gathering for gathering in self if may_close(gathering, now)]

    def next_due(self) -> float | None:
        """Return when the next gathering closes by itself."""
        return min((due for gathering in self if (due := due_at(gathering)) is not None), default=None)

    def restarted(self, now: float) -> None:
        """Let deadlines count from the coordinator's start: nobody could contribute while it was away."""
        for gathering in self:
            if gathering.outcome is None:
                self.put(replace(gathering, opened=max(gathering.opened, now)))

    def runs(self) -> list[str]:
        """Name the runs that some site has registered for."""
        return sorted({gathering.key.run for gathering in self if gathering.key.run is not None})

    def latest_round(self, run: str) -> Gathering | None:
        """Return the last round of a run that is closed, or None."""
        rounds = [gathering for gathering in self
                  if gathering.key.run == run and gathering.key.kind == "round" and gathering.is_closed]
        return max(rounds, key=lambda gathering: gathering.key.number, default=None)

    def run_state(self, run: str) -> RunState:
        """Say how far a run is. Of one that nobody has registered for, all fields are empty."""
        registration = self.get(registration_key(run))
        latest = self.latest_round(run)
        next_round = 0 if latest is None else latest.key.number + 1
        complete = self.num_rounds is not None and next_round >= self.num_rounds
        takes_updates = self.is_closed(initial_key(run)) and not complete
        return RunState(run=run, registered=tuple(sorted(registration.contributions)) if registration else (),
                        open_round=next_round if takes_updates else None, num_rounds=self.num_rounds, closed=complete)
