"""Build the dashboard overview: sites, runs, pending exchanges, recent failures.

`OverviewBuilder` computes an `Overview`. `OverviewCache` shares it between all who look: it
is computed at most a few times a second, however many they are, and those who wait for a change cost no thread.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import time
from collections import defaultdict
from contextlib import suppress
from typing import Annotated, Literal

from pydantic import Field
from starlette.concurrency import run_in_threadpool

from nnunetv2.federated.coordinator.dashboard.audit_tail import LogTail
from nnunetv2.federated.coordinator.models.model_folder import without_values
from nnunetv2.federated.coordinator.notifier import ANYTHING, Notifier
from nnunetv2.federated.coordinator.service import Coordinator
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.exchanges.declared_privacy import describe_privacy
from nnunetv2.federated.exchanges.exchange import Closed, Exchange, due_at
from nnunetv2.federated.exchanges.pace import RECENT_ROUNDS, seconds_left, typical_duration
from nnunetv2.federated.exchanges.steps import prerequisite
from nnunetv2.federated.protocol.api import SiteStatus, describe_methods
from nnunetv2.federated.protocol.keys import InitialKey, Key, RegistrationKey, RoundKey, RunKey, SurvivorsKey, UploadKey
from nnunetv2.federated.protocol.messages import (
    MAX_SITES,
    Count,
    Digest,
    Finite,
    LongText,
    Part,
    SiteName,
    SiteNames,
    Text,
)
from nnunetv2.federated.protocol.strict_json import encode_json

SHORTEST_INTERVAL_S = 0.5
"""Between two computations: faster changes are shown together."""

Activity = Literal["working", "sending", "waiting", "failed", "left", "idle", "invited", "revoked"]


# --------------------------------------------------------------------------------------------------------- messages
class MemberView(Part):
    """The work of a site in a run at the moment."""

    site: SiteName
    activity: Activity
    since: Finite | None = None
    """Seconds since 1970, as all times here, by the coordinator's clock."""
    note: LongText = ""
    """Why it failed, or how far its upload is."""


class SiteView(Part):
    """A site, over all runs."""

    site: SiteName
    state: Literal["invited", "active", "revoked"]
    activity: Activity
    """Its activity in the run where that matters most."""
    run: Text | None = None
    """That run."""
    last_seen: Finite | None = None
    expires: Finite | None = None
    """When its open invitation expires."""
    bytes_received: Count = 0
    """Bytes that the coordinator received from it."""
    bytes_sent: Count = 0


class ExchangeView(Part):
    """An exchange that is open: who has contributed, who has not, until when."""

    key: Text
    kind: Text
    contributed: SiteNames
    waiting_for: SiteNames
    since: Finite | None = None
    """When it began to wait: when the exchange before it was closed, or with its first contribution."""
    due: Finite | None = None
    """When it closes without those who are missing."""
    quorum: Count | None = None
    lacks: Count = 0
    """How many further sites have to contribute before anything closes it: `min_sites` says so."""
    refusal: LongText = ""
    """Why the contributions that came do not go together."""


class RunView(Part):
    """A run of training."""

    run: Text
    state: Literal["running", "paused", "stopped", "complete"]
    num_rounds: Count | None
    rounds_closed: Count
    meeting: ExchangeView | None
    """The exchange that it waits for; None once the run is over."""
    members: Annotated[tuple[MemberView, ...], Field(max_length=MAX_SITES)] = ()
    round_s: Finite | None = None
    """Median seconds of the last rounds."""
    left_s: Finite | None = None
    """Seconds until the last round is closed, if they go on like this."""
    last_closed: Finite | None = None
    last_missing: SiteNames = ()
    """Sites that the last closed round went on without."""
    validated_round: Count | None = None
    """The last aggregate that was validated."""
    mean_dice: Finite | None = None
    ema_dice: Finite | None = None
    best_round: Count | None = None
    best_ema_dice: Finite | None = None
    model: LongText = ""
    """Where the finished model is, or why there is none; before, whether there will be one."""
    networks: Annotated[tuple[LongText, ...], Field(max_length=2 * MAX_SITES)] = ()
    """Where sites have networks of their own: the share of each site, then the networks, and whether each will have a
    common model, a line each."""
    privacy: LongText = ""
    """Differential privacy, as the sites have declared it; empty if none has."""


class TroubleView(Part):
    """Something that a person should look into."""

    time: Finite
    kind: Literal["failure", "refusal", "late"]
    site: SiteName | None
    key: Text
    text: LongText


class Health(Part):
    """The state of the coordinator itself."""

    started: Finite
    uploads: Count
    """Uploads that are being received."""
    disk_free: Count
    """Bytes."""
    log_lines: Count
    log_head: Digest
    """Hash of the audit log's last line, to be noted elsewhere."""


class Overview(Part):
    """The work of a federation at the moment."""

    version: Literal[1] = 1
    revision: Text
    """Changes whenever an exchange changes; `?seen=` waits until it does."""
    time: Finite
    federation: Text
    quorum: Count | None
    min_sites: Count
    """Nothing is averaged over fewer sites."""
    deadline_s: Finite | None
    methods: Annotated[tuple[LongText, ...], Field(max_length=10)] = ()
    """Methods of the sites beside plain averaging, a line each."""
    sites: Annotated[tuple[SiteView, ...], Field(max_length=10 * MAX_SITES)]
    runs: Annotated[tuple[RunView, ...], Field(max_length=10_000)]
    meetings: Annotated[tuple[ExchangeView, ...], Field(max_length=10_000)]
    """Open exchanges that belong to no run: fingerprints and plans."""
    troubles: Annotated[tuple[TroubleView, ...], Field(max_length=1000)]
    """The latest first."""
    health: Health


# --------------------------------------------------------------------------------------------------------- building
class OverviewBuilder:
    """Build overviews of a coordinator, and follow its audit log."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._state = coordinator.state
        self.tail = LogTail(self._state.store, is_run=self._state.registry.has_run)
        self._started = self._state.clock()
        self._invited: set[str] = set()

    def build(self, revision: str = "") -> Overview:
        """Return the overview of this moment."""
        state, settings = self._state, self._state.settings
        self.tail.read_on()
        sites = self._coordinator.members.status()
        self._invited = {status.site for status in sites if status.state == "invited"}
        runs = tuple(self._run(run) for run in state.registry.runs())
        return Overview(
            revision=revision,
            time=state.clock(),
            federation=settings.federation,
            quorum=settings.quorum,
            min_sites=settings.min_sites,
            deadline_s=settings.deadline_s,
            methods=describe_methods(settings),
            runs=runs,
            sites=self._sites(sites, runs),
            meetings=tuple(
                self._exchange_view(one) for one in state.registry.open_exchanges() if not isinstance(one.key, RunKey)
            ),
            troubles=tuple(
                TroubleView(time=one.time, kind=one.kind, site=one.site, key=one.key[:500], text=one.text[:8000])
                for one in reversed(list(self.tail.troubles))
            ),
            health=self._health(),
        )

    def _health(self) -> Health:
        return Health(
            started=self._started,
            uploads=len(self._coordinator.uploads.in_progress()),
            disk_free=shutil.disk_usage(self._state.store.folder).free,
            log_lines=self.tail.number,
            log_head=self.tail.head,
        )

    def _sites(self, sites: tuple[SiteStatus, ...], runs: tuple[RunView, ...]) -> tuple[SiteView, ...]:
        invitations = self._coordinator.members.open_invitations(self._state.clock())
        expiries = {one.member: one.expires for one in invitations}
        found, activities = [], _what_matters(runs)
        for status in sites:
            run: str | None = None
            activity: Activity = "idle"
            if status.state != "active":
                activity = status.state
            elif status.site in activities:
                run, activity = activities[status.site]
            found.append(
                SiteView(
                    site=status.site,
                    state=status.state,
                    activity=activity,
                    run=run,
                    last_seen=status.last_seen,
                    expires=expiries.get(status.site),
                    bytes_received=status.bytes_received,
                    bytes_sent=status.bytes_sent,
                )
            )
        return tuple(sorted(found, key=lambda site: (site.state == "revoked", site.site.lower())))

    # ---------------------------------------------------------------------------------------------------- one run
    def _run(self, run: str) -> RunView:
        registry = self._state.registry
        state = registry.run_state(run)  # all else is about this moment: a round may close meanwhile
        latest = self._closing(run, state.rounds_closed - 1)
        exchange = None if state.closed else self._open_exchange(run, state.rounds_closed)
        validation = self._state.store.load_last_validation(run) or {}
        round_s = typical_duration(registry.closed_at(run, RECENT_ROUNDS + 1))
        last_closed = latest.time if latest else None
        return RunView(
            run=run,
            state=state.state,
            num_rounds=state.num_rounds,
            rounds_closed=state.rounds_closed,
            meeting=None if exchange is None else self._exchange_view(exchange),
            members=() if exchange is None else self._members(run, exchange),
            round_s=round_s,
            left_s=seconds_left(state, round_s=round_s, last_closed=last_closed, now=self._state.clock()),
            last_closed=last_closed,
            last_missing=latest.missing if latest else (),
            validated_round=validation.get("round"),
            model=self._model(run)[:8000],
            networks=self._networks(run),
            privacy=self._privacy(run)[:8000],
            **{name: validation.get(name) for name in ("mean_dice", "ema_dice", "best_round", "best_ema_dice")},
        )

    def _closing(self, run: str, number: int) -> Closed | None:
        """Return how a round was closed, or None."""
        exchange = self._state.registry.get(RoundKey(run, number)) if number >= 0 else None
        return exchange.outcome if exchange is not None and isinstance(exchange.outcome, Closed) else None

    def _model(self, run: str) -> str:
        return self.tail.models.get(run, "") or str(self._coordinator.models.outlook(run) or "")

    def _networks(self, run: str) -> tuple[str, ...]:
        outlook = self._coordinator.models.outlook(run)
        return () if outlook is None else tuple(line[:8000] for line in outlook.details())

    def _privacy(self, run: str) -> str:
        if not self._state.registry.is_closed(RegistrationKey(run)):
            return ""
        return describe_privacy(self._state.documents.agreement(run).privacy)

    def _open_exchange(self, run: str, number: int) -> Exchange | None:
        """Return the first open exchange of a run, up to a round.

        It may not have begun; None if all were closed meanwhile.
        """
        registry = self._state.registry
        keys: list[Key] = [RegistrationKey(run), InitialKey(run)]
        if self._state.settings.secure is not None:
            keys += [UploadKey(run, number), SurvivorsKey(run, number)]
        keys.append(RoundKey(run, number))
        key = next((key for key in keys if not registry.is_closed(key)), None)
        try:
            return None if key is None else registry.begin(key)
        except RefusedError:  # the run was reset
            return None

    def _exchange_view(self, exchange: Exchange) -> ExchangeView:
        return ExchangeView(
            key=str(exchange.key),
            kind=exchange.key.kind,
            since=self._since(exchange),
            contributed=exchange.counted,
            waiting_for=exchange.waiting_for,
            quorum=exchange.quorum,
            due=due_at(exchange),
            lacks=exchange.lacks,
            refusal=without_values(exchange.refusal)[:8000],
        )

    def _since(self, exchange: Exchange) -> float | None:
        before = prerequisite(exchange.key)
        earlier = None if before is None else self._state.registry.get(before)
        if earlier is not None and isinstance(earlier.outcome, Closed):
            return earlier.outcome.time
        return exchange.opened if exchange.contributions else None

    def _members(self, run: str, exchange: Exchange) -> tuple[MemberView, ...]:
        control, since = self._state.registry.control(run), self._since(exchange)
        uploads = {site: size for (_, site), size in self._coordinator.uploads.in_progress(str(exchange.key)).items()}
        views = []
        for site in sorted(exchange.expected | (control.left & frozenset(self._state.settings.sites))):
            held = exchange.contributions.get(site)
            if site in control.left:
                view = MemberView(site=site, activity="left")
            elif site in self._invited:
                view = MemberView(site=site, activity="invited")
            elif held is not None:
                view = MemberView(site=site, activity="waiting", since=held.received)
            elif site in uploads:
                view = MemberView(site=site, activity="sending", since=since, note=f"{uploads[site] / 1e6:.1f} MB")
            elif site in exchange.dropped_out:
                view = MemberView(site=site, activity="failed", since=since, note=self.tail.reason(run, site)[:8000])
            else:
                view = MemberView(site=site, activity="working", since=since)
            views.append(view)
        return tuple(views)


def _what_matters(runs: tuple[RunView, ...]) -> dict[str, tuple[str, Activity]]:
    """Return, for each site, its most important activity and the run of that."""
    order = ("failed", "sending", "working", "waiting", "left", "invited")
    found: dict[str, list[tuple[int, str, Activity]]] = defaultdict(list)
    for run in runs:
        for member in run.members:
            found[member.site].append((order.index(member.activity), run.run, member.activity))
    return {site: min(entries)[1:] for site, entries in found.items()}


# ---------------------------------------------------------------------------------------------------------- sharing
class OverviewCache:
    """The overview that all who look share, as JSON. Belongs to the event loop."""

    def __init__(self, builder: OverviewBuilder, notifier: Notifier) -> None:
        self.builder = builder
        self._notifier = notifier
        self._lock = asyncio.Lock()
        self._start = secrets.token_hex(4)
        self._made = 0.0
        self._overview: Overview | None = None
        self._body = b""
        self._revision = ""
        """Of the body."""

    @property
    def revision(self) -> str:
        """Name of the present state: another after every change, and after a restart."""
        return f"{self._start}.{self._notifier.count}"

    async def wait(self, seen: str, wait_s: float) -> None:
        """Wait, for a limited time, until something differs from a seen revision."""
        change = self._notifier.expect(ANYTHING)
        if seen == self.revision and wait_s > 0 and not self._notifier.stopping:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(change.wait(), wait_s)

    async def read(self) -> bytes:
        """Return the overview, which may be half a second old, as JSON."""
        return (await self._share())[1]

    async def get(self) -> Overview:
        """Return the same for programs here."""
        return (await self._share())[0]

    async def _share(self) -> tuple[Overview, bytes]:
        async with self._lock:
            age = time.monotonic() - self._made
            if self._overview is not None and age < SHORTEST_INTERVAL_S:
                if self._revision == self.revision:
                    return self._overview, self._body
                await asyncio.sleep(SHORTEST_INTERVAL_S - age)
            revision = self.revision
            shared = await run_in_threadpool(self._build, revision)
            self._overview, self._body = shared
            self._revision, self._made = revision, time.monotonic()
            return shared

    def _build(self, revision: str) -> tuple[Overview, bytes]:
        overview = self.builder.build(revision)
        return overview, encode_json(overview)  # not on the event loop: it can be large
