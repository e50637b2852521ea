"""Serve the requests of sites and operators: contributions, results, members, settings.

Nothing here knows of HTTP. Requests come in on many threads. The state that they change is in `state.py`; one more
thread, the aggregation worker, computes the results, one exchange at a time, so that memory stays small.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from nnunetv2.federated.coordinator import run_control
from nnunetv2.federated.coordinator.aggregation_worker import AggregationWorker
from nnunetv2.federated.coordinator.members import INVITATION_LIFETIME_S, Member, Members
from nnunetv2.federated.coordinator.models.model_folder import without_values
from nnunetv2.federated.coordinator.models.model_store import KeptModel, ModelStore
from nnunetv2.federated.coordinator.notifier import Notifier
from nnunetv2.federated.coordinator.site_service import Result
from nnunetv2.federated.coordinator.state import FederationState
from nnunetv2.federated.coordinator.storage.audit_log import LOGGED_CHARACTERS, Event
from nnunetv2.federated.coordinator.storage.partial_uploads import PartialUploads
from nnunetv2.federated.coordinator.storage.quotas import check_room
from nnunetv2.federated.coordinator.storage.store import Role, Store, Traffic
from nnunetv2.federated.errors import FederationError, RefusedError
from nnunetv2.federated.exchanges.exchange import Closed, Exchange, Refused, Verdict, judge
from nnunetv2.federated.exchanges.pace import RECENT_ROUNDS, typical_duration
from nnunetv2.federated.exchanges.secure_sums import check_secure_settings
from nnunetv2.federated.exchanges.steps import parse_key, prerequisite, step_of
from nnunetv2.federated.protocol import api
from nnunetv2.federated.protocol.document import Document, open_document
from nnunetv2.federated.protocol.keys import Key, RegistrationKey, RunKey, UploadKey, run_with_plans
from nnunetv2.utilities.atomic_write import flush_to_disk
from nnunetv2.utilities.plain_text import excerpt

logger = logging.getLogger(__name__)

SHOWN_FAILURES = 100
SHOWN_EXCHANGES = 1000
"""Open exchanges, and runs, that the status lists. Sites can open many; people cannot read more."""


class Coordinator:
    """The coordinator of one federation, and the `SiteService` of its sites.

    Args:
        store: Its durable state; a federation has been created in it. The coordinator does not close it.
        notifier, log, clock: See `FederationState`.
    """

    def __init__(
        self,
        store: Store,
        *,
        notifier: Notifier | None = None,
        log: Callable[[str], None] = logger.info,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.state = FederationState(store, notifier=notifier, log=log, clock=clock)
        self.members = Members(self.state)
        self.models = ModelStore(self.state)
        self.worker = AggregationWorker(self.state, self.members, self.models)
        self.uploads = PartialUploads(store.folder / "incoming")
        self._failure_budget = run_control.FailureBudget()
        self._reading = threading.Lock()

    @property
    def settings(self) -> api.FederationSettings:
        """The settings that hold for all sites at the moment."""
        return self.state.settings

    @property
    def notifier(self) -> Notifier:
        """Notified of every change that somebody may wait for."""
        return self.state.notifier

    # ------------------------------------------------------------------------------------------- start and stop
    def start(self) -> None:
        """Remove old uploads, finish interrupted tidying, and begin to close exchanges."""
        self.uploads.remove_old()
        self.worker.start()

    def stop(self) -> None:
        """Finish the closing that is being computed, if any, and write the counters."""
        self.worker.stop()
        try:
            self.members.save_traffic()
        except OSError as error:
            self.state.log(f"the newest counters of traffic are lost: {error}")

    # -------------------------------------------------------------------------------------------------- members
    def authenticate(self, token: str) -> Member:
        """Return the member that a bearer token belongs to; see `Members.authenticate`."""
        return self.members.authenticate(token)

    def count_traffic(self, member: str, key: str, *, received: int, sent: int) -> None:
        """Count the bytes of a member's request and its response, per exchange."""
        if not self.state.registry.has_begun(key):
            key = ""  # anybody can make up names: no counter for each
        self.members.count(member, key, Traffic(received, sent, self.state.clock()))

    def join(self, request: api.JoinRequest) -> api.JoinAnswer:
        """Let a member join; see `Members.join`."""
        before = self.members.identity_of(request.token.partition(".")[0])
        member, is_new = self.members.join(request.invitation, request.token, request.identity)
        if is_new:
            self.state.log(f"{member.role} {member.name} has joined")
        if is_new and request.identity is not None and before not in (None, request.identity):
            self._log_other_identity(member.name)
        return api.JoinAnswer(
            federation=self.settings.federation, site=member.name, role=member.role, settings=self.settings
        )

    def admit(self, names: Iterable[str], *, by: str) -> None:
        """Expect further sites that an engine knows; see `Members.admit`."""
        with self.state.locks["settings"]:
            new = self.members.admit(names, by=by)
        if new:
            self.state.log(f"{by} admits {', '.join(new)}")

    def identify(self, site: str, identity: str) -> None:
        """Note the identity of a site that an engine knows; see `Members.identify`."""
        before = self.members.identity_of(site)
        self.members.identify(site, identity)
        if before not in (None, identity):
            self._log_other_identity(site)

    def _log_other_identity(self, site: str) -> None:
        self.state.log(
            f"site {site} has another identity than before: the other sites refuse it until their people "
            "have compared the new number of the roster (nnUNetv2_fed_roster --verified)"
        )

    def roster(self) -> api.Roster:
        """Return the identities of the sites that take part."""
        return api.Roster(sites=self.members.identities())

    def invite(self, name: str, role: Role, *, by: str, lifetime_s: float = INVITATION_LIFETIME_S) -> str:
        """Invite a member and return the secret of its invitation; see `Members.invite`."""
        with self.state.locks["settings"]:
            if self.members.is_revoked(name):
                self._drop_contributions(name, by=by)  # before they could count again
            secret = self.members.invite(name, role, by=by, lifetime_s=lifetime_s)
        self.state.log(f"{by} invites {role} {name}")
        return secret

    def revoke(self, name: str, *, by: str) -> None:
        """Take a member's credential away.

        Open exchanges neither wait for a revoked site nor count it.
        """
        with self.state.locks["settings"]:
            self.members.revoke(name, by=by)
        self.state.log(f"{by} has revoked the credential of {name}")

    def _drop_contributions(self, site: str, *, by: str) -> None:
        """Drop the open contributions of a revoked site: somebody else's, perhaps."""
        for one in self.state.registry.open_exchanges():
            with self.state.locks[str(one.key)]:
                exchange = self.state.registry.get(one.key)
                if exchange is not None and not exchange.is_closed and site in exchange.contributions:
                    self.state.drop_contribution(exchange, site, by=by)

    def change_settings(self, change: api.SettingsChange, *, by: str) -> api.FederationSettings:
        """Change settings of a federation at work, from the next closing on.

        Raises:
            FederationError: No round could ever close with the quorum, or the smallest number of sites is lowered.
        """
        with self.state.locks["settings"]:
            settings = _changed(self.settings, change)
            detail = change.model_dump(mode="json", exclude_unset=True)
            self.state.change_settings(settings, self.state.event("settings", by, None, detail))
        return settings

    # ---------------------------------------------------------------------------------------------------- runs
    def act(self, run: str, action: api.RunAction, member: Member) -> api.RunState:
        """Apply a member's action to a run; see `run_control.act`."""
        state = run_control.act(self.state, run, action, member)
        if action.action in ("stop", "abandon"):
            self.worker.tidy_up(run)
        return state

    def report_failure(self, site: str, report: api.FailureReport) -> None:
        """Remember that a site cannot go on; see `run_control.report_failure`."""
        run_control.report_failure(self.state, self._failure_budget, site, report)

    def note_rehearsal(self, site: str, size: int) -> None:
        """Note in the audit log that a site has rehearsed an upload."""
        self.state.record("rehearsal", site, None, {"bytes": size})

    def outlooks(self) -> api.Outlooks:
        """Foresee the averages of every run, as far as they are known."""
        return self.models.outlooks(self.state.registry.runs()[:SHOWN_EXCHANGES])

    def declared_privacy(self) -> api.DeclaredPrivacy:
        """Return the privacy that sites have declared, of the runs where any has."""
        registry, documents = self.state.registry, self.state.documents
        found = {
            run: documents.agreement(run).privacy
            for run in registry.runs()[:SHOWN_EXCHANGES]
            if registry.is_closed(RegistrationKey(run))
        }
        return api.DeclaredPrivacy(
            runs=tuple(
                api.RunPrivacy(run=run, sites=dict(declared))
                for run, declared in found.items()
                if any(declared.values())
            )
        )

    def find_model(self, run: str) -> Path:
        """Return where the model of a run is; see `ModelStore.find`."""
        return self.models.find(run)

    def fetch_model(self, run: str, *, member: str) -> KeptModel:
        """Return the model of a run for a member; see `ModelStore.fetch`."""
        return self.models.fetch(run, member=member)

    # --------------------------------------------------------------------------------------------- contributing
    def offer(self, key: str, site: str, digest: str, size: int) -> api.Receipt | None:
        """Return the receipt for a document already held; None if it is wanted.

        Raises:
            RefusedError: It would not be accepted.
        """
        sent_to = parse_key(key)
        exchange = self._begin(self._place_of(sent_to, site, digest))
        verdict = judge(exchange, site, digest)
        self.state.take_back_failure(sent_to, site)
        if verdict in (Verdict.SAME, Verdict.KEEP_FIRST):
            self._note_late(exchange, site)
            return _receipt(exchange, site, digest, verdict, sent_to=key)
        limit = step_of(exchange.key).limits(exchange.key, site, self.state.documents).file_bytes
        if size > limit:
            raise RefusedError(
                f"the contribution of site {site} to {key} has {size} bytes, at most {limit} are allowed",
                code="too_large",
            )
        check_room(exchange.key, site, size, registry=self.state.registry, folder=self.state.store.folder)
        return None

    def contribute(self, key: str, site: str, incoming: Path, digest: str, size: int) -> api.Receipt:
        """Take over a completely received document; it is durable on return.

        Args:
            incoming: The document, in the store's folder for uploads. The caller removes it if it is still there.

        Raises:
            WireError: It is no valid document of its exchange.
            RefusedError: It comes too early, too late or from the wrong site.
        """
        sent_to = parse_key(key)
        try:
            self._begin(sent_to)
            with self._opened(sent_to, site, incoming) as document:
                step_of(sent_to).check_contribution(sent_to, site, document, self.state.documents, self.settings)
        except FederationError as error:
            self._log_refusal(key, site, error)
            raise
        flush_to_disk(incoming)  # the bulk of the work, and not under the lock that all sites of the exchange wait for
        place = self._place_of(sent_to, site, digest)
        with self.state.locks[str(place)]:
            exchange = self._begin(place)
            verdict = judge(exchange, site, digest)
            if verdict is Verdict.COMPARE:
                with self._opened(sent_to, site, incoming) as document:
                    step_of(place).check_unchanged(place, site, document.message, self.state.documents)
            self.state.take_back_failure(sent_to, site)
            if verdict is Verdict.STORE:
                exchange = self.state.save_contribution(exchange, site, incoming, digest, size)
        self._note_late(exchange, site)
        return _receipt(exchange, site, digest, verdict, sent_to=key)

    @contextmanager
    def _opened(self, key: Key, site: str, incoming: Path) -> Iterator[Document[Any]]:
        """Open a received document; of those that are all JSON, one at a time."""
        step = step_of(key)
        limits = step.limits(key, site, self.state.documents)
        with (
            nullcontext() if step.policy.carries_weights else self._reading,
            open_document(incoming, limits=limits) as document,
        ):
            yield document

    def _begin(self, key: Key) -> Exchange:
        """Return an exchange; one that has not begun is not remembered before its first contribution."""
        step = step_of(key)
        before = step.prerequisite(key)
        may_begin = before is None or self.state.registry.is_closed(before)
        return self.state.registry.begin(key, required=step.required(key, self.state.documents) if may_begin else ())

    def _place_of(self, key: Key, site: str, digest: str) -> Key:
        """Return the exchange in which a contribution counts; late ones may be carried."""
        return step_of(key).place(key, site, digest, self.state.registry)

    def _log_refusal(self, key: str, site: str, error: FederationError) -> None:
        self.state.record("refusal", site, key, {"message": excerpt(str(error), LOGGED_CHARACTERS)})
        self.state.log(f"{key}: the contribution of site {site} is not accepted: {error}")

    def _note_late(self, exchange: Exchange, site: str) -> None:
        """Log, once, that a site's update came when its round was closed already."""
        outcome = exchange.outcome
        is_of_round = exchange.policy.recurs or isinstance(exchange.key, UploadKey)
        if not is_of_round or not isinstance(outcome, Closed) or site not in outcome.missing:
            return
        key = str(exchange.key)
        with self.state.locks[key]:
            if self.state.store.has_event("late", site, key):
                return
            delay = self.state.clock() - outcome.time
            self.state.record("late", site, key, {"seconds": delay})
        self.state.log(f"{key}: the update of site {site} is {delay:.1f} s late and does not count")
        self.state.notifier.notify_progress(key)

    # --------------------------------------------------------------------------------------------------- results
    def result(self, key: str, site: str, *, changes: bool = False, since: str | None = None) -> Result | api.Waiting:
        """Return the result of an exchange, or the sites that it waits for.

        Args:
            changes: Whether the changes since the result before suffice, where weights travel as such.
            since: SHA-256 of the result before, as the site has received it.

        Raises:
            RefusedError: The contributions do not go together, the exchange cannot begin yet, or its run was stopped.
        """
        exchange = self._begin(parse_key(key))
        if not self.state.registry.may_read(exchange, site):
            raise RefusedError(f"site {site} does not take part in {key}", code="not_expected")
        if isinstance(exchange.key, RunKey) and exchange.policy.carries_weights and self.settings.secure is not None:
            self.state.registry.ask(exchange.key.run, site)
        if isinstance(exchange.outcome, Refused):
            raise exchange.outcome.as_error()
        if isinstance(exchange.outcome, Closed):
            return self._result_of_closed(exchange, site, changes=changes, since=since)
        run = exchange.key.run if isinstance(exchange.key, RunKey) and exchange.policy.stops_with_run else None
        if run is not None and self.state.registry.control(run).state == "stopped":
            return self._result_of_stopped(run, site)
        self.state.raise_obstacle(exchange)
        return api.Waiting(
            waiting_for=exchange.waiting_for,
            paused=exchange.is_paused,
            lacks=0 if exchange.waiting_for else exchange.lacks,
        )

    def _result_of_stopped(self, run: str, site: str) -> Result:
        """Return the last aggregate of a run that the operator has stopped."""
        latest = self.state.registry.latest_round(run)
        if latest is None:
            raise RefusedError(
                f"the operator has stopped run {run} before its first round was closed",
                "Ask the coordinating site.",
                code="run_stopped",
            )
        return self._result_of_closed(latest, site)

    def _result_of_closed(
        self, exchange: Exchange, site: str, *, changes: bool = False, since: str | None = None
    ) -> Result:
        """Return the result of a closed exchange, or a newer one for latecomers."""
        key, step = exchange.key, step_of(exchange.key)
        is_gone = self.state.store.load_result_digest(key) is None
        is_missing = isinstance(exchange.outcome, Closed) and site in exchange.outcome.missing
        if is_gone or is_missing or step.is_used_up(key, self.state.registry):
            key = step.newest(key, self.state.registry)
        names = step_of(key).tensors_for(key, site, self.state.documents)
        if names is None:
            return Result(str(key), self.state.store.result_path(key), self.state.store.load_result_digest(key) or "")
        is_whole = not changes or key != exchange.key or not self._had_result_before(key, site, since)
        return self._subset(key, names, whole=is_whole)

    def _had_result_before(self, key: Key, site: str, since: str | None) -> bool:
        """Tell whether the changes of a result fit the site's previous result.

        They do not if this coordinator was restored from a backup, and has closed the round before anew.
        """
        before = prerequisite(key)
        names = None if before is None else step_of(before).tensors_for(before, site, self.state.documents)
        if before is None or names is None:
            return False
        load = self.state.store.load_result_digest
        return since is None or since in [load(before, _subset_name(names, whole=whole)) for whole in (True, False)]

    def _subset(self, key: Key, names: tuple[str, ...], *, whole: bool) -> Result:
        """Return these tensors of a result as they travel, written when they are first asked for."""
        subset = _subset_name(names, whole=whole)
        path = self.state.store.result_path(key, subset)
        with self.state.locks[str(key)]:
            digest = self.state.store.load_result_digest(key, subset)
            if digest is None:
                digest = step_of(key).write_for_sites(key, names, path, self.state.documents, whole=whole)
                self.state.store.save_subset(key, subset, digest)
        return Result(str(key), path, digest)

    # ---------------------------------------------------------------------------------------------------- status
    def run_state(self, run: str) -> api.RunState:
        """Return how far a run is."""
        registration_of(run)
        return self.state.registry.run_state(run)

    def run_of_plans(self, run: str, site: str, plans_name: str) -> str:
        """Return the name of the run that a site's training with these plans belongs to.

        The plans that a run began with have its plain name `<configuration>.fold_<fold>.<trainer>`, as have all in
        federations of earlier versions. A further training of the same site, with other plans, has theirs behind it.
        Plans of other names belong to the plain run where a site registers for it first, or comes late: networks may
        differ.
        """
        registry = self.state.registry
        registration = registry.get(registration_of(run))
        names = self.state.documents.plans_names(run) if registration is not None else {}
        if names.get(site) == plans_name:
            return run
        further = f"{run}.{plans_name}"
        if registration is None or not registration.is_closed:
            was_refused = registration is not None and registration.outcome is not None
            may_be_plain = site not in names or plans_name in names.values() or was_refused
        else:
            may_be_plain = site not in names and (
                plans_name in names.values() or not self.state.registry.run_state(run).closed
            )
        if may_be_plain and further not in registry.runs():
            return run
        try:
            return run_with_plans(run, plans_name)
        except ValueError as error:
            raise RefusedError(
                str(error), "Give the plans a shorter name (-overwrite_plans_name).", code="incomplete_request"
            ) from error

    def status(self, viewer: Member | None = None) -> api.Status:
        """Return the state of the federation, as much as a member may see.

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
        open_exchanges = self.state.registry.open_exchanges()[:SHOWN_EXCHANGES]
        runs = self.state.registry.runs()[:SHOWN_EXCHANGES]
        failures = self.state.store.load_events("failure", last=SHOWN_FAILURES)
        return api.Status(
            federation=self.settings.federation,
            time=self.state.clock(),
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
            runs=tuple(self.state.registry.run_state(run) for run in runs),
            progress=tuple(self._progress(run) for run in runs),
            failures=tuple(_failure_status(event) for event in failures),
            traffic=self.members.traffic_status(),
        )

    def _progress(self, run: str) -> api.RunProgress:
        """Return the pace of a run, and the last validation of its aggregates."""
        latest = self.state.registry.latest_round(run)
        if latest is None:
            return api.RunProgress(run=run)
        moments = self.state.registry.closed_at(run, RECENT_ROUNDS + 1)
        found = self.state.store.load_last_validation(run)
        return api.RunProgress(
            run=run,
            last_closed=moments[-1],
            round_s=typical_duration(moments),
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


def _changed(settings: api.FederationSettings, change: api.SettingsChange) -> api.FederationSettings:
    """Return the settings after a change, or raise FederationError if it is not possible."""
    values = {**settings.model_dump(), **change.model_dump(exclude_unset=True)}
    changed = api.FederationSettings.model_validate(values)
    if change.model_fields_set & {"quorum", "deadline_s"}:  # a revocation may leave fewer sites than a quorum
        api.check_quorum(changed)
    if changed.min_sites < settings.min_sites:
        raise FederationError(
            f"--min-sites is {settings.min_sites}, with which sites have joined: it can "
            "be raised, not lowered. For another one, start a new federation"
        )
    if change.model_fields_set & {"quorum", "min_sites"}:
        api.check_floor(changed)
    if "late_updates" in change.model_fields_set:
        api.check_late_updates(changed)
    if change.model_fields_set & {"quorum", "late_updates"}:
        check_secure_settings(changed)
    return changed


def _failure_status(event: Event) -> api.FailureStatus:
    """Return a failure in the audit log for the status.

    Before 2.8.1+fed.4, its texts could be longer than a status holds.
    """
    run, reason = (excerpt(event.detail[name], LOGGED_CHARACTERS) for name in ("run", "reason"))
    return api.FailureStatus(
        site=str(event.site), time=event.time, run=run[:500], round=event.detail["round"], reason=reason
    )


def _subset_name(names: tuple[str, ...], *, whole: bool) -> str:
    """Return the name under which a subset of a result is kept.

    The tensors themselves and their changes have different names.
    """
    return hashlib.sha256("\n".join((*names, *(() if whole else ("changes of these",)))).encode()).hexdigest()
