"""Own the state of a federation.

It is changed on the disk, then in memory, then those who wait are notified.

Every change of the durable state has one method here, which does all three. Notified are the aggregation worker, the
sites that wait for an exchange, and people. A change that the disk refuses has not happened.

Requests come in on many threads. Each exchange and each run has a lock, held during each change; values that
are read are immutable.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunetv2.federated.coordinator.notifier import NEWS, Notifier
from nnunetv2.federated.coordinator.storage.audit_log import Event
from nnunetv2.federated.coordinator.storage.store import InvitationRecord, MemberRecord, Store
from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.exchanges.documents import DocumentReader
from nnunetv2.federated.exchanges.exchange import (
    Contribution,
    Exchange,
    may_close,
    with_contribution,
    without_contribution,
)
from nnunetv2.federated.exchanges.registry import ExchangeRegistry, RunControl
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.keys import Key, NumberedKey, RunKey

logger = logging.getLogger(__name__)


class Locks:
    """One lock per name, made when it is first asked for."""

    def __init__(self) -> None:
        self._locks: dict[str, threading.RLock] = {}

    def __getitem__(self, name: str) -> threading.RLock:
        # A defaultdict can make two for two threads that ask at once; setdefault is atomic.
        return self._locks.setdefault(name, threading.RLock())


@dataclass(frozen=True)
class Obstacle:
    """The reason why a complete exchange could not be closed, such as a full disk."""

    retry_at: float
    reason: str


class FederationState:
    """The state of one federation.

    Args:
        store: Its durable part; a federation has been created in it. The owner of the state closes it.
        notifier: Told of every change that somebody may wait for.
        log: Told in one line whatever a person at the coordinator wants to know.
        clock: Seconds since 1970.
    """

    def __init__(
        self,
        store: Store,
        *,
        notifier: Notifier | None = None,
        log: Callable[[str], None] = logger.info,
        clock: Callable[[], float] = time.time,
    ) -> None:
        settings = store.load_settings()
        if settings is None:
            raise FederationError(f"{store.folder} holds no federation yet")
        self.store = store
        self.notifier = notifier or Notifier()
        self.clock = clock
        self.registry = ExchangeRegistry(settings, store.load_exchanges(settings), store.load_controls())
        self.registry.restarted(clock())
        self.member_records: dict[str, MemberRecord] = store.load_members()
        """By name. Among them are those that have not joined, and those that were revoked."""
        self.invitation_records: dict[str, InvitationRecord] = store.load_invitations()
        """By hash."""
        self.documents = DocumentReader(
            store.contribution_path,
            store.result_path,
            self.registry.get,
            self.registry.admitted,
            store.load_last_validation,
            lambda: self.registry.settings,
            store.given_path,
        )
        self.locks = Locks()
        """One per exchange or run, for whoever changes it. The lock of a run is taken last."""
        self.changed = threading.Condition()
        """Notified of every change that may let an exchange close. Held for moments only."""
        self.obstacles: dict[str, Obstacle] = {}
        """Exchange -> why it could not be closed. Not on the disk: a restart tries again."""
        self._log = log
        self._closing: set[tuple[int, str]] = set()
        """Threads, and the exchanges that they close. One may still leave an exchange when another comes to it."""

    @property
    def settings(self) -> FederationSettings:
        """The settings that hold for all sites at the moment."""
        return self.registry.settings

    # ------------------------------------------------------------------------------------------ log and audit log
    def log(self, line: str) -> None:
        """Log a line for people, and notify those who look at the dashboard."""
        self._log(line)
        self.notifier.notify(NEWS)

    def record(self, kind: str, who: str | None, key: str | None, detail: Mapping[str, Any]) -> None:
        """Append to the audit log."""
        self.store.add_event(self.event(kind, who, key, detail))

    def event(self, kind: str, who: str | None, key: str | None, detail: Mapping[str, Any]) -> Event:
        """Return a line for the audit log, of this moment."""
        return Event(self.clock(), kind, who, key, detail)

    # ------------------------------------------------------------------------------------------------ one exchange
    def save_contribution(self, exchange: Exchange, site: str, incoming: Path, digest: str, size: int) -> Exchange:
        """Take over an upload and return its exchange, whose lock the caller holds."""
        exchange = with_contribution(exchange, site, Contribution(digest, size, self.clock()))
        self.store.save_contribution(exchange, site, incoming)
        self.registry.put(exchange)
        # Else the closing, which comes at once, is the news that the others wait for.
        if exchange.waiting_for or exchange.lacks:
            self.notifier.notify_progress(str(exchange.key))
        self._wake_worker()
        return exchange

    def drop_contribution(self, exchange: Exchange, site: str, *, by: str | None) -> Exchange:
        """Drop a contribution to an open exchange, whose lock the caller holds.

        Args:
            by: The operator who wants it; None: the coordinator itself, as the file is damaged.

        Returns:
            The exchange without it.
        """
        key, digest = str(exchange.key), exchange.contributions[site].digest
        self.store.drop_contribution(exchange, site, self.event("dropped", by, key, {"site": site, "digest": digest}))
        exchange = without_contribution(exchange, site)
        self.registry.put(exchange)
        self._notify([key])
        return exchange

    @contextmanager
    def closing(self, key: Key) -> Iterator[None]:
        """Notify those who wait for an exchange when the block ends.

        The consequences of an outcome are there by then, such as the model of a run after its last round.
        """
        closing = (threading.get_ident(), str(key))
        self._closing.add(closing)
        try:
            yield
        finally:
            self._closing.discard(closing)
            self._notify([str(key)])

    def close(self, exchange: Exchange, digest: str, *, record: Mapping[str, Any] | None) -> None:
        """Close an exchange, within `closing`, whose result has been written.

        Args:
            record: The record of a round or of a validation, which outlasts its documents.
        """
        assert self._is_closing(exchange.key), "close an exchange within `closing`, which notifies"
        self.store.save_closing(exchange, digest, record=record)
        self.registry.put(exchange)

    def _is_closing(self, key: Key) -> bool:
        return (threading.get_ident(), str(key)) in self._closing

    def refuse(self, exchange: Exchange) -> None:
        """Refuse the contributions of an exchange, within `closing`."""
        assert self._is_closing(exchange.key), "refuse an exchange within `closing`, which notifies"
        self.store.save_refusal(exchange)
        self.registry.put(exchange)

    def set_obstacle(self, key: Key, reason: str, *, retry_s: float) -> None:
        """Remember why an exchange cannot be closed, and when to try again."""
        self.obstacles[str(key)] = Obstacle(self.clock() + retry_s, reason)

    def remove_obstacle(self, key: Key) -> None:
        """Try to close an exchange again."""
        self.obstacles.pop(str(key), None)

    def raise_obstacle(self, exchange: Exchange) -> None:
        """Raise OSError if a complete exchange could not be closed: sites try again."""
        obstacle = self.obstacles.get(str(exchange.key))
        if obstacle is not None and may_close(exchange, self.clock()):
            raise OSError(f"{exchange.key} cannot be closed at the moment: {obstacle.reason}")

    # ----------------------------------------------------------------------------------------------------- one run
    def set_control(self, run: str, control: RunControl, event: Event) -> None:
        """Change the control of a run, whose lock the caller holds."""
        self.store.save_control(run, control, event)
        self.registry.controls[run] = control
        self._notify_all()

    def report_failure(self, run: str, site: str, number: int, event: Event) -> None:
        """Expect a site no more in a run, from this round on."""
        with self.locks[run]:
            control = self.registry.control(run)
            self.set_control(run, replace(control, failed={**control.failed, site: number}), event)

    def take_back_failure(self, key: Key, site: str) -> None:
        """Expect a failed site again that contributes to an exchange: it is back.

        An update of that round or an earlier one may have been on its way when it failed, and tells nothing: a site
        that is back registers first.
        """
        if not isinstance(key, RunKey):
            return
        failed = self.registry.control(key.run).failed
        if site not in failed or (isinstance(key, NumberedKey) and key.number <= failed[site]):
            return
        with self.locks[key.run]:
            control = self.registry.control(key.run)
            failed = {name: number for name, number in control.failed.items() if name != site}
            event = self.event("control", site, key.run, {"action": "is back"})
            self.set_control(key.run, replace(control, failed=failed), event)

    def forget_run(self, run: str, event: Event) -> None:
        """Forget a run without closed rounds, whose locks the caller holds."""
        keys = [str(one.key) for one in self.registry if isinstance(one.key, RunKey) and one.key.run == run]
        self.store.forget_run(run, event)
        self.registry.forget_run(run)
        self.documents.forget(run)
        for key in keys:
            self.obstacles.pop(key, None)
        self._notify(keys)

    # ------------------------------------------------------------------------------------- settings and members
    def change_settings(self, settings: FederationSettings, event: Event) -> None:
        """Change the settings from the next closing on, under the lock "settings"."""
        self.store.save_settings(settings, event)
        self._use_settings(settings)

    def save_members(
        self,
        members: Iterable[MemberRecord],
        invitations: Iterable[InvitationRecord],
        *,
        event: Event,
        settings: FederationSettings | None = None,
    ) -> None:
        """Save changed members and invitations, together with changed settings."""
        members, invitations = list(members), list(invitations)
        self.store.save_members(members, invitations, event=event, settings=settings)
        self.member_records.update((record.name, record) for record in members)
        self.invitation_records.update((record.hash, record) for record in invitations)
        if settings is not None:
            self._use_settings(settings)

    def _use_settings(self, settings: FederationSettings) -> None:
        self.registry.settings = settings
        self._notify_all()

    # --------------------------------------------------------------------------------------------------- notifying
    def _notify_all(self) -> None:
        """Wake all who wait: who is expected has changed."""
        self._notify([str(exchange.key) for exchange in self.registry.open_exchanges()])

    def _notify(self, keys: Iterable[str]) -> None:
        self._wake_worker()
        for key in keys:
            self.notifier.notify(key)

    def _wake_worker(self) -> None:
        with self.changed:
            self.changed.notify_all()
