"""Let operators steer runs, and sites say what becomes of their own part in one.

pause    contributions are taken, no round is closed      resume   rounds are closed again
stop     the run is over with its last closed round       proceed  close an exchange with what there is
reset    forget a run in which no round has been closed
leave    rounds do not wait for the site any more         return   they do again
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from nnunetv2.federated.coordinator.members import Member
from nnunetv2.federated.coordinator.service import FAILURES_PER_DAY, Coordinator, require_role
from nnunetv2.federated.coordinator.storage.audit_log import LOGGED_CHARACTERS, Event
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.exchanges.exchange import is_enough
from nnunetv2.federated.exchanges.registry import RunControl
from nnunetv2.federated.exchanges.steps import parse_key
from nnunetv2.federated.protocol import api
from nnunetv2.federated.protocol.keys import AdmissionKey, InitialKey, RegistrationKey, RoundKey, RunKey
from nnunetv2.utilities.plain_text import excerpt

STATE_OF_ACTION = {"pause": "paused", "resume": "running", "stop": "stopped"}
OF_A_SITE = ("leave", "return")


def act(coordinator: Coordinator, run: str, action: api.RunAction, member: Member) -> api.RunState:
    """Do what an operator wants of a run, or a site of its part in it, and return the run's state.

    Raises:
        RefusedError: The member may not, or the run is not in a state for it.
    """
    name = require_role(member, "site") if action.action in OF_A_SITE else require_role(member, "operator")
    if not coordinator.book.has_run(run):
        raise _unknown_run(coordinator, run)
    with _between_closings(coordinator, run):
        if action.action == "reset":
            _reset(coordinator, run, name)
        elif action.action == "proceed":
            _proceed(coordinator, run, action.gathering, name)
        else:
            _change(coordinator, run, action.action, name)
    coordinator.announce(f"run {run}: {action.action} by {name}")
    coordinator.wake_everybody()
    if action.action == "stop":
        coordinator.closer.tidy_up(run)
    return coordinator.run_state(run)


def report_failure(coordinator: Coordinator, site: str, report: api.FailureReport) -> None:
    """Remember that a site cannot go on; with a quorum, the round does not wait for it.

    Raises:
        RefusedError: There is no such run, or the site has reported failures all day.
    """
    if not coordinator.book.has_run(report.run):
        raise _unknown_run(coordinator, report.run)
    if site in coordinator.book.control(report.run).left:
        return  # nobody waits for it, and that its training has ended follows
    if coordinator.failure_reports.wait_s(site, coordinator.clock()):
        raise RefusedError(
            f"site {site} has reported {FAILURES_PER_DAY} failures of late",
            "Look at its output.",
            code="too_many_requests",
        )
    coordinator.failure_reports.spend(site, coordinator.clock())
    report = report.model_copy(update={"reason": excerpt(report.reason, LOGGED_CHARACTERS)})
    event = Event(coordinator.clock(), "failure", site, None, report.model_dump(mode="json"))
    where = f"run {report.run}" + (f", round {report.round}" if report.round is not None else "")
    if report.round is None:
        coordinator.store.add_event(event)
    else:
        with coordinator.locks[report.run]:
            control = coordinator.book.control(report.run)
            _save(coordinator, report.run, replace(control, failed={**control.failed, site: report.round}), event)
        coordinator.wake_everybody()
    coordinator.announce(f"site {site} reports a failure in {where}: {report.reason}")


def _unknown_run(coordinator: Coordinator, run: str) -> RefusedError:
    return RefusedError(
        f"there is no run {run[:200]!r}", f"Runs: {', '.join(coordinator.book.runs()) or 'none'}.", code="unknown_run"
    )


def _change(coordinator: Coordinator, run: str, action: str, name: str) -> None:
    control = coordinator.book.control(run)
    if action == "leave":
        control = replace(control, left=control.left | {name})
    elif action == "return":
        control = replace(control, left=control.left - {name})
    else:
        control = replace(control, state=STATE_OF_ACTION[action])
    _save(coordinator, run, control, _event(coordinator, run, action, name))


def _proceed(coordinator: Coordinator, run: str, exchange: str | None, name: str) -> None:
    """Close an exchange with the contributions that there are, whoever is missing."""
    book = coordinator.book
    waiting = [
        one
        for one in book.open_exchanges()
        if isinstance(one.key, RunKey)
        and one.key.run == run
        and one.outcome is None
        and (one.waiting_for or one.lacks)
        and exchange in (None, str(one.key))
    ]
    if len(waiting) != 1:
        names = ", ".join(str(one.key) for one in waiting) or "none"
        raise RefusedError(
            f"run {run} has no single gathering to close; waiting: {names}", "Name one.", code="not_open"
        )
    key, counted = waiting[0].key, waiting[0].counted
    if not is_enough(waiting[0]):
        least = waiting[0].floor
        raise RefusedError(
            f"{key} cannot be closed with {', '.join(counted) or 'nobody'}: it needs at least {least} "
            f"contribution{'' if least == 1 else 's (--min-sites)'}, and that of "
            f"{', '.join(sorted(waiting[0].required)) or 'nobody in particular'}",
            "Sites that have left or were revoked can come back: nnUNetv2_train ... --c, or invite them "
            "again. Else stop the run.",
            code="too_early",
        )
    control = book.control(run)
    still_open = frozenset(one for one in control.forced if not book.is_closed(parse_key(one)))
    _save(
        coordinator,
        run,
        replace(control, forced=still_open | {str(key)}),
        _event(coordinator, str(key), "proceed", name),
    )


def _reset(coordinator: Coordinator, run: str, name: str) -> None:
    """Forget a run that has not begun, so that the sites can register anew."""
    if coordinator.book.latest_round(run) is not None:
        raise RefusedError(f"run {run} has closed rounds: it can be stopped, not forgotten", code="has_rounds")
    waited_for = [str(one.key) for one in coordinator.book if isinstance(one.key, RunKey) and one.key.run == run]
    coordinator.store.forget_run(run, _event(coordinator, run, "reset", name))
    coordinator.book.forget_run(run)
    coordinator.archive.forget(run)
    coordinator.closer.forget(run)
    for key in waited_for:
        coordinator.on_change(key)


@contextmanager
def _between_closings(coordinator: Coordinator, run: str) -> Iterator[None]:
    """Hold a run: until the block ends, no exchange of it is closed and nothing is contributed to one.

    What is being closed is closed first. So the last aggregate of a run that was stopped stays the last, and of one
    that was reset nothing is written any more.
    """
    while True:
        begun = coordinator.book.run_state(run).rounds_closed
        # The round that is open, begun or not, and what there may be before the first one.
        keys = {RegistrationKey(run), InitialKey(run), RoundKey(run, begun)}
        keys |= {AdmissionKey(run, site) for site in coordinator.settings.sites}
        with ExitStack() as held:
            for name in (*sorted(keys), run):  # the run's lock last, as everywhere
                held.enter_context(coordinator.locks[name])
            if coordinator.book.run_state(run).rounds_closed == begun:
                yield
                return


def _save(coordinator: Coordinator, run: str, control: RunControl, event: Event) -> None:
    coordinator.store.save_control(run, control, event)
    coordinator.book.controls[run] = control


def _event(coordinator: Coordinator, key: str, action: str, name: str) -> Event:
    return Event(coordinator.clock(), "control", name, key, {"action": action})
