"""Own the state of a federation: take contributions, hand out results, let members in and out. Knows nothing of HTTP.

Requests come in on many threads. Each exchange has a lock; whoever changes an exchange holds it, and what is read is
immutable. One more thread, the closer (`closer.py`), computes the results, one exchange at a time, so that memory
stays small. What operators and sites say about a run is in `steering.py`.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunetv2.federated.coordinator.aggregation_worker import Closer
from nnunetv2.federated.coordinator.http.rate_limits import Allowance
from nnunetv2.federated.coordinator.members import INVITATION_LIFETIME_S, Member, Members
from nnunetv2.federated.coordinator.models.model_folder import without_values
from nnunetv2.federated.coordinator.storage.audit_log import LOGGED_CHARACTERS, Event
from nnunetv2.federated.coordinator.storage.partial_uploads import PartialUploads
from nnunetv2.federated.coordinator.storage.quotas import check_room
from nnunetv2.federated.coordinator.storage.store import Role, Store, flush
from nnunetv2.federated.errors import FederationError, RefusedError
from nnunetv2.federated.exchanges.documents import Agreement, DocumentReader
from nnunetv2.federated.exchanges.exchange import (
    Closed,
    Contribution,
    Exchange,
    Refused,
    Verdict,
    judge,
    with_contribution,
    without_contribution,
)
from nnunetv2.federated.exchanges.outlook import Outlook
from nnunetv2.federated.exchanges.registry import ExchangeRegistry
from nnunetv2.federated.exchanges.steps import parse_key, step_of
from nnunetv2.federated.protocol import api
from nnunetv2.federated.protocol.document import Document, open_document
from nnunetv2.federated.protocol.keys import Key, NumberedKey, RunKey, run_with_plans
from nnunetv2.utilities.plain_text import excerpt

logger = logging.getLogger(__name__)

FAILURES_PER_DAY = 200
"""Failures that one site may report in the long run, and at once: a training that fails reports one."""
SHOWN_FAILURES = 100
SHOWN_EXCHANGES = 1000
"""Open exchanges, and runs, that the status lists. Sites can open many; people cannot read more."""
RECENT_ROUNDS = 10
"""Rounds whose durations tell how long the others will take."""


@dataclass(frozen=True)
class Result:
    """A file that a site may download."""

    key: str
    """The exchange it comes from: a later round than asked for, where that one took place without the site."""
    path: Path
    digest: str


class Locks:
    """One lock per name, made when it is first asked for."""

    def __init__(self) -> None:
        self._locks: dict[str, threading.RLock] = {}

    def __getitem__(self, name: str) -> threading.RLock:
        # A defaultdict can make two for two threads that ask at once; what setdefault does cannot be interrupted.
        return self._locks.setdefault(name, threading.RLock())


class Coordinator:
    """The coordinator of one federation.

    Args:
        store: Its durable state; a federation has been created in it. The coordinator does not close it.
        announce: Told in one line whatever a person at the coordinator wants to know.
        clock: Seconds since 1970.
    """

    def __init__(
        self, store: Store, *, announce: Callable[[str], None] = logger.info, clock: Callable[[], float] = time.time
    ) -> None:
        settings = store.load_settings()
        if settings is None:
            raise FederationError(f"{store.folder} holds no federation yet")
        self.store = store
        self.members = Members(store)
        self.announce = announce
        self.clock = clock
        self.book = ExchangeRegistry(settings, store.load_exchanges(settings), store.load_controls())
        self.book.restarted(clock())
        self.archive = DocumentReader(
            store.contribution_path, store.result_path, self.book.get, self.book.admitted, store.load_last_validation
        )
        self.on_change: Callable[[str], None] = lambda key: None
        """Called with a key whenever its exchange has changed in a way that sites wait for, on any thread."""
        self.on_progress: Callable[[str], None] = lambda key: None
        """The same for what people like to know: that one site less is waited for."""
        self.locks = Locks()
        """One per exchange or run, for whoever changes it."""
        self.failure_reports = Allowance(per_s=FAILURES_PER_DAY / 86_400, at_once=FAILURES_PER_DAY)
        """What each site may still report, since the start."""
        self._reading = threading.Lock()
        self.outlooks: dict[str, tuple[Agreement, Outlook]] = {}
        """Run -> what will become of its averages, and what that follows from."""
        self.uploads = PartialUploads(store.folder / "incoming")
        self.closer = Closer(self)

    @property
    def settings(self) -> api.FederationSettings:
        """What holds for all sites at the moment."""
        return self.book.settings

    # ------------------------------------------------------------------------------------------- start and stop
    def start(self) -> None:
        """Finish what a crash may have left undone, and begin to close exchanges."""
        self.uploads.remove_old()
        self.closer.start()

    def stop(self) -> None:
        """Finish the closing that is being computed, if any, and write the counters."""
        self.closer.stop()
        try:
            self.members.save_traffic()
        except OSError as error:
            self.announce(f"the newest counters of traffic are lost: {error}")

    # -------------------------------------------------------------------------------------------------- members
    def join(self, request: api.JoinRequest) -> api.JoinAnswer:
        """Let a member join; see `Members.join`."""
        member, is_new = self.members.join(request.invitation, request.token, now=self.clock())
        if is_new:
            self.announce(f"{member.role} {member.name} has joined")
        return api.JoinAnswer(
            federation=self.settings.federation, site=member.name, role=member.role, settings=self.settings
        )

    def invite(self, name: str, role: Role, *, by: str, lifetime_s: float = INVITATION_LIFETIME_S) -> str:
        """Invite a member and return the secret of its invitation; see `Members.invite`."""
        with self.locks["settings"]:
            if self.members.is_revoked(name):
                self._drop_contributions(name, by=by)  # before they could count again
            secret, settings = self.members.invite(
                name, role, self.settings, now=self.clock(), by=by, lifetime_s=lifetime_s
            )
            self._take_over(settings)
        self.announce(f"{by} invites {role} {name}")
        return secret

    def revoke(self, name: str, *, by: str) -> None:
        """Take a member's credential away. Open exchanges neither wait for a revoked site nor count it."""
        with self.locks["settings"]:
            self._take_over(self.members.revoke(name, self.settings, now=self.clock(), by=by))
        self.announce(f"{by} has revoked the credential of {name}")

    def _drop_contributions(self, site: str, *, by: str) -> None:
        """Forget what a site that was revoked had contributed to what is open: it may have been somebody else."""
        for one in self.book.open_exchanges():
            with self.locks[str(one.key)]:
                exchange = self.book.get(one.key)
                if exchange is None or exchange.is_closed or site not in exchange.contributions:
                    continue
                self.store.drop_contribution(
                    exchange,
                    site,
                    Event(
                        self.clock(),
                        "dropped",
                        by,
                        str(one.key),
                        {"site": site, "digest": exchange.contributions[site].digest},
                    ),
                )
                self.book.put(without_contribution(exchange, site))

    def change_settings(self, change: api.SettingsChange, *, by: str) -> api.FederationSettings:
        """Change what may be changed while a federation is at work; it holds from the next closing on.

        Raises:
            FederationError: No round could ever close with the quorum, or the smallest number of sites is lowered.
        """
        with self.locks["settings"]:
            values = {**self.settings.model_dump(), **change.model_dump(exclude_unset=True)}
            settings = api.FederationSettings.model_validate(values)
            if change.model_fields_set & {"quorum", "deadline_s"}:  # a revocation may leave fewer sites than a quorum
                api.check_quorum(settings)
            if settings.min_sites < self.settings.min_sites:
                raise FederationError(
                    f"--min-sites is {self.settings.min_sites}, with which sites have joined: it can "
                    "be raised, not lowered. For another one, start a new federation"
                )
            if change.model_fields_set & {"quorum", "min_sites"}:
                api.check_floor(settings)
            if "late_updates" in change.model_fields_set:
                api.check_late_updates(settings)
            self.store.save_settings(
                settings, Event(self.clock(), "settings", by, None, change.model_dump(mode="json", exclude_unset=True))
            )
            self._take_over(settings)
        return settings

    def _take_over(self, settings: api.FederationSettings) -> None:
        self.book.settings = settings
        self.wake_everybody()

    def wake_everybody(self) -> None:
        """Let the closer and all that wait look again: who is expected has changed."""
        self.closer.wake()
        for exchange in self.book.open_exchanges():
            self.on_change(str(exchange.key))

    # --------------------------------------------------------------------------------------------- contributing
    def offer(self, key: str, site: str, digest: str, size: int) -> api.Receipt | None:
        """Return the receipt for a document that need not be sent, or None if it is wanted.

        Raises:
            RefusedError: It would not be accepted.
        """
        sent_to = parse_key(key)
        exchange = self._begin(self._place_of(sent_to, site, digest))
        verdict = judge(exchange, site, digest)
        self._take_back_failure(sent_to, site)
        if verdict in (Verdict.SAME, Verdict.KEEP_FIRST):
            self._note_late(exchange, site)
            return _receipt(exchange, site, digest, verdict, sent_to=key)
        limit = step_of(exchange.key).limits(exchange.key, site, self.archive).file_bytes
        if size > limit:
            raise RefusedError(
                f"the contribution of site {site} to {key} has {size} bytes, at most {limit} are allowed",
                code="too_large",
            )
        check_room(exchange.key, site, size, book=self.book, folder=self.store.folder)
        return None

    def contribute(self, key: str, site: str, incoming: Path, digest: str, size: int) -> api.Receipt:
        """Take over a document that has been received completely; it is durable on return.

        Args:
            incoming: The document, in the store's folder for uploads. The caller removes what is left of it.

        Raises:
            WireError: It is not what its exchange is about.
            RefusedError: It comes too early, too late or from the wrong site.
        """
        sent_to = parse_key(key)
        try:
            self._begin(sent_to)
            with self._opened(sent_to, site, incoming) as document:
                step_of(sent_to).check_contribution(sent_to, site, document, self.archive, self.settings)
        except FederationError as error:
            self._log_refusal(key, site, error)
            raise
        flush(incoming)  # the bulk of the work, and not under the lock that all sites of the exchange wait for
        place = self._place_of(sent_to, site, digest)
        with self.locks[str(place)]:
            exchange = self._begin(place)
            verdict = judge(exchange, site, digest)
            if verdict is Verdict.COMPARE:
                with self._opened(sent_to, site, incoming) as document:
                    step_of(place).check_unchanged(place, site, document.message, self.archive)
            self._take_back_failure(sent_to, site)
            if verdict is Verdict.STORE:
                exchange = with_contribution(exchange, site, Contribution(digest, size, self.clock()))
                self.store.save_contribution(exchange, site, incoming)
                self.book.put(exchange)
        if verdict is Verdict.STORE:
            # Else the closing, which comes at once, is what the others want to hear of.
            if exchange.waiting_for or exchange.lacks:
                self.on_progress(str(place))
            self.closer.wake()
        self._note_late(exchange, site)
        return _receipt(exchange, site, digest, verdict, sent_to=key)

    @contextmanager
    def _opened(self, key: Key, site: str, incoming: Path) -> Iterator[Document[Any]]:
        """Open what a site has sent. Of documents that are all JSON, one at a time: they take time and memory."""
        step = step_of(key)
        limits = step.limits(key, site, self.archive)
        with (
            nullcontext() if step.policy.carries_weights else self._reading,
            open_document(incoming, limits=limits) as document,
        ):
            yield document

    def _take_back_failure(self, key: Key, site: str) -> None:
        """Wait for a site again that has reported a failure and is back.

        An update of that round or an earlier one may have been on its way when it failed, and tells nothing: a site
        that is back registers first.
        """
        if not isinstance(key, RunKey):
            return
        failed = self.book.control(key.run).failed
        if site not in failed or (isinstance(key, NumberedKey) and key.number <= failed[site]):
            return
        with self.locks[key.run]:
            control = self.book.control(key.run)
            control = replace(control, failed={name: number for name, number in control.failed.items() if name != site})
            self.store.save_control(
                key.run, control, Event(self.clock(), "control", site, key.run, {"action": "is back"})
            )
            self.book.controls[key.run] = control
        self.wake_everybody()

    def _begin(self, key: Key) -> Exchange:
        """Return an exchange; one that has not begun is not remembered before its first contribution."""
        step = step_of(key)
        before = step.prerequisite(key)
        may_begin = before is None or self.book.is_closed(before)
        return self.book.begin(key, required=step.required(key, self.archive) if may_begin else ())

    def _place_of(self, key: Key, site: str, digest: str) -> Key:
        """Return where a contribution counts: a late update may be carried into the round that is open now."""
        return step_of(key).place(key, site, digest, self.book)

    def _log_refusal(self, key: str, site: str, error: FederationError) -> None:
        self.store.add_event(
            Event(self.clock(), "refusal", site, key, {"message": excerpt(str(error), LOGGED_CHARACTERS)})
        )
        self.announce(f"{key}: the contribution of site {site} is not accepted: {error}")

    def _note_late(self, exchange: Exchange, site: str) -> None:
        """Write down, once, that a site's update came when its round was closed already."""
        outcome = exchange.outcome
        if not exchange.policy.recurs or not isinstance(outcome, Closed) or site not in outcome.missing:
            return
        key = str(exchange.key)
        with self.locks[key]:
            if self.store.has_event("late", site, key):
                return
            delay = self.clock() - outcome.time
            self.store.add_event(Event(self.clock(), "late", site, key, {"seconds": delay}))
        self.announce(f"{key}: the update of site {site} is {delay:.1f} s late and does not count")
        self.on_progress(key)

    # --------------------------------------------------------------------------------------------------- results
    def result(self, key: str, site: str) -> Result | api.Waiting:
        """Return the result of an exchange for a site, or, while it is open, the sites that it waits for.

        Raises:
            RefusedError: The contributions do not go together, the exchange cannot begin yet, or its run was stopped.
        """
        exchange = self._begin(parse_key(key))
        if not self.book.may_read(exchange, site):
            raise RefusedError(f"site {site} does not take part in {key}", code="not_expected")
        if isinstance(exchange.outcome, Refused):
            raise exchange.outcome.as_error()
        if isinstance(exchange.outcome, Closed):
            return self._result_of_closed(exchange, site)
        run = exchange.key.run if isinstance(exchange.key, RunKey) and exchange.policy.stops_with_run else None
        if run is not None and self.book.control(run).state == "stopped":
            return self._result_of_stopped(run, site)
        self.closer.raise_trouble(exchange)
        return api.Waiting(
            waiting_for=exchange.waiting_for,
            paused=exchange.is_paused,
            lacks=0 if exchange.waiting_for else exchange.lacks,
        )

    def _result_of_stopped(self, run: str, site: str) -> Result:
        """Return the last aggregate of a run that the operator has stopped."""
        latest = self.book.latest_round(run)
        if latest is None:
            raise RefusedError(
                f"the operator has stopped run {run} before its first round was closed",
                "Ask the coordinating site.",
                code="run_stopped",
            )
        return self._result_of_closed(latest, site)

    def _result_of_closed(self, exchange: Exchange, site: str) -> Result:
        """Return the result of a closed exchange, or of the run's last round for a site that missed this one."""
        key, step = exchange.key, step_of(exchange.key)
        is_gone = self.store.load_result_digest(key) is None
        if is_gone or (isinstance(exchange.outcome, Closed) and site in exchange.outcome.missing):
            key = step.newest(key, self.book)
        names = step.tensors_for(key, site, self.archive)
        if names is None:
            return Result(str(key), self.store.result_path(key), self.store.load_result_digest(key) or "")
        return self._subset(key, names)

    def _subset(self, key: Key, names: tuple[str, ...]) -> Result:
        """Return these tensors of a result as they travel, written when they are first asked for."""
        subset = hashlib.sha256("\n".join(names).encode()).hexdigest()
        path = self.store.result_path(key, subset)
        with self.locks[str(key)]:
            digest = self.store.load_result_digest(key, subset)
            if digest is None:
                digest = step_of(key).write_for_sites(key, names, path, self.archive)
                self.store.save_subset(key, subset, digest)
        return Result(str(key), path, digest)

    # ---------------------------------------------------------------------------------------------------- status
    def run_state(self, run: str) -> api.RunState:
        """Say how far a run is."""
        registration_of(run)
        return self.book.run_state(run)

    def run_of_plans(self, run: str, site: str, plans_name: str) -> str:
        """Return the name of the run that a site's training with these plans belongs to.

        The plans that a run began with have its plain name `<configuration>.fold_<fold>.<trainer>`, as have all in
        federations of earlier versions. A further training of the same site, with other plans, has theirs behind it.
        Plans of other names belong to the plain run where a site registers for it first, or comes late: networks may
        differ.
        """
        registration = self.book.get(registration_of(run))
        names = self.archive.plans_names(run) if registration is not None else {}
        if names.get(site) == plans_name:
            return run
        further = f"{run}.{plans_name}"
        if registration is None or not registration.is_closed:
            may_be_plain = site not in names or plans_name in names.values() or registration.outcome is not None
        else:
            may_be_plain = site not in names and (plans_name in names.values() or not self.book.run_state(run).closed)
        if may_be_plain and further not in self.book.runs():
            return run
        try:
            return run_with_plans(run, plans_name)
        except ValueError as error:
            raise RefusedError(
                str(error), "Give the plans a shorter name (-overwrite_plans_name).", code="incomplete_request"
            ) from error

    def status(self, viewer: Member | None = None) -> api.Status:
        """Say what the federation is doing.

        Args:
            viewer: Who asks. A site sees its own traffic only: sizes tell how many cases the others have.
        """
        status = self._status()
        if viewer is None or viewer.role != "site":
            return status
        return status.model_copy(
            update={
                "sites": tuple(
                    one if one.site == viewer.name else one.model_copy(update={"bytes_received": 0, "bytes_sent": 0})
                    for one in status.sites
                ),
                "traffic": tuple(one for one in status.traffic if one.site == viewer.name),
            }
        )

    def _status(self) -> api.Status:
        open_exchanges = self.book.open_exchanges()[:SHOWN_EXCHANGES]
        runs = self.book.runs()[:SHOWN_EXCHANGES]
        failures = self.store.load_events("failure", last=SHOWN_FAILURES)
        return api.Status(
            federation=self.settings.federation,
            time=self.clock(),
            sites=self.members.status(),
            waiting=tuple(
                api.GatheringStatus(
                    key=str(exchange.key),
                    contributed=tuple(sorted(exchange.contributions)),
                    waiting_for=exchange.waiting_for,
                    opened=exchange.opened,
                    lacks=exchange.lacks,
                    refusal=without_values(exchange.refusal)[:8000],
                )
                for exchange in open_exchanges
            ),
            runs=tuple(self.book.run_state(run) for run in runs),
            progress=tuple(self._progress(run) for run in runs),
            failures=tuple(_failure_status(event) for event in failures),
            traffic=self.members.traffic_status(),
        )

    def _progress(self, run: str) -> api.RunProgress:
        """Say how fast a run is, and what validating its aggregates has shown for all sites together."""
        latest = self.book.latest_round(run)
        if latest is None:
            return api.RunProgress(run=run)
        moments = self.book.closed_at(run, RECENT_ROUNDS + 1)
        durations = [later - earlier for earlier, later in itertools.pairwise(moments)]
        found = self.store.load_last_validation(run)
        return api.RunProgress(
            run=run,
            last_closed=latest.outcome.time,
            round_s=statistics.median(durations) if durations else None,
            validation=None
            if found is None
            else api.ValidationStatus(**{name: found[name] for name in api.ValidationStatus.model_fields}),
        )


# --------------------------------------------------------------------------------------------------------- helpers
def _receipt(exchange: Exchange, site: str, digest: str, verdict: Verdict, *, sent_to: str) -> api.Receipt:
    held = exchange.contributions.get(site)
    already = verdict is Verdict.KEEP_FIRST or (exchange.is_closed and exchange.policy.first_stays)
    return api.Receipt(
        digest=held.digest if held else digest,
        already=already,
        waiting_for=exchange.waiting_for,
        key="" if str(exchange.key) == sent_to else str(exchange.key),
    )


def registration_of(run: str) -> Key:
    """Return the key of a run's registration.

    Raises:
        RefusedError: There can be no run of this name.
    """
    return parse_key(f"runs/{run}/registration")


def _failure_status(event: Event) -> api.FailureStatus:
    """Return what a line of the log says; before 2.8.1+fed.4, its texts could be longer than a status holds."""
    run, reason = (excerpt(event.detail[name], LOGGED_CHARACTERS) for name in ("run", "reason"))
    return api.FailureStatus(
        site=event.site, time=event.time, run=run[:500], round=event.detail["round"], reason=reason
    )


def require_role(member: Member, *roles: Role) -> str:
    """Return the name of a member, or raise RefusedError if its role does not allow what it asks."""
    if member.role not in roles:
        raise RefusedError(
            f"{member.name} is {'an' if member.role[0] == 'o' else 'a'} {member.role}: this is for "
            f"{' and '.join(f'{role}s' for role in roles)}",
            code="forbidden",
        )
    return member.name
