"""Change the course of a run: pause, stop, reset, failures, departures.

pause    contributions are taken, no round is closed      resume   rounds are closed again
stop     the run is over with its last closed round       proceed  close an exchange with the contributions so far
reset    forget a run in which no round has been closed
abandon  close the open round with the average before, where updates are masked and too few sites can unmask them
leave    rounds do not wait for the site any more         return   they do again
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Literal

from nnunetv2.federated.coordinator.members import Member, require_role
from nnunetv2.federated.coordinator.state import FederationState
from nnunetv2.federated.coordinator.storage.audit_log import LOGGED_CHARACTERS, Event
from nnunetv2.federated.coordinator.token_bucket import TokenBucket
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.exchanges.exchange import Closed, is_enough
from nnunetv2.federated.exchanges.steps import keys_that_stop_with, parse_key, step_of
from nnunetv2.federated.protocol import api
from nnunetv2.federated.protocol.keys import AdmissionKey, RoundKey, RunKey, SurvivorsKey, UploadKey
from nnunetv2.utilities.plain_text import excerpt

STATE_OF_ACTION: dict[str, Literal["paused", "running", "stopped"]] = {
    "pause": "paused",
    "resume": "running",
    "stop": "stopped",
}
OF_A_SITE = ("leave", "return")
FAILURES_PER_DAY = 200
"""Failures that one site may report in the long run, and at once: a training that fails reports one."""


def act(state: FederationState, run: str, action: api.RunAction, member: Member) -> api.RunState:
    """Apply a member's action to a run and return the run's state.

    Raises:
        RefusedError: The member may not, or the run is not in a state for it.
    """
    name = require_role(member, "site") if action.action in OF_A_SITE else require_role(member, "operator")
    if not state.registry.has_run(run):
        raise _unknown_run(state, run)
    with _between_closings(state, run):
        if action.action == "reset":
            _reset(state, run, name)
        elif action.action == "proceed":
            _proceed(state, run, action.gathering, name)
        elif action.action == "abandon":
            _abandon(state, run, name)
        else:
            _change(state, run, action.action, name)
        state.log(f"run {run}: {action.action} by {name}")
    return state.registry.run_state(run)


class FailureBudget:
    """The failures that each site may report, since the start. Thread-safe.

    Args:
        clock: Seconds, from any moment on: that of the day may be set back, and sites would be refused until then.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._bucket = TokenBucket(per_s=FAILURES_PER_DAY / 86_400, at_once=FAILURES_PER_DAY)

    def spend(self, site: str) -> None:
        """Count a report, or raise RefusedError if the site has reported failures all day."""
        if self._bucket.take(site, self._clock()):
            raise RefusedError(
                f"site {site} has reported {FAILURES_PER_DAY} failures of late",
                "Look at its output.",
                code="too_many_requests",
            )


def report_failure(state: FederationState, budget: FailureBudget, site: str, report: api.FailureReport) -> None:
    """Remember that a site cannot go on.

    With a quorum, the round does not wait for it.

    Raises:
        RefusedError: There is no such run, or the site has reported failures all day.
    """
    if not state.registry.has_run(report.run):
        raise _unknown_run(state, report.run)
    if site in state.registry.control(report.run).left:
        return  # nobody waits for it, and that its training has ended follows
    budget.spend(site)
    report = report.model_copy(update={"reason": excerpt(report.reason, LOGGED_CHARACTERS)})
    event = state.event("failure", site, None, report.model_dump(mode="json"))
    where = f"run {report.run}" + (f", round {report.round}" if report.round is not None else "")
    if report.round is None:
        state.store.add_event(event)
    else:
        state.report_failure(report.run, site, report.round, event)
    state.log(f"site {site} reports a failure in {where}: {report.reason}")


def _unknown_run(state: FederationState, run: str) -> RefusedError:
    return RefusedError(
        f"there is no run {run[:200]!r}", f"Runs: {', '.join(state.registry.runs()) or 'none'}.", code="unknown_run"
    )


def _change(state: FederationState, run: str, action: str, name: str) -> None:
    control = state.registry.control(run)
    if action == "resume" and control.state == "stopped" and state.settings.secure is not None:
        raise RefusedError(
            f"run {run} was stopped, and its sites have deleted the keys with which they masked in it",
            "Begin another federation; its sites can start from the model of this one (--initial-weights).",
            code="run_stopped",
        )
    now = state.registry.run_state(run)
    if action == "pause" and now.closed:
        raise RefusedError(f"run {run} is {now.state}: it cannot be paused any more", code="not_open")
    if action == "leave":
        control = replace(control, left=control.left | {name})
    elif action == "return":
        control = replace(control, left=control.left - {name})
    else:
        control = replace(control, state=STATE_OF_ACTION[action])
    state.set_control(run, control, _event(state, run, action, name))


def _proceed(state: FederationState, run: str, exchange: str | None, name: str) -> None:
    """Close an exchange with the contributions that there are, whoever is missing."""
    waiting = [
        one
        for one in state.registry.open_exchanges()
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
            f"contribution{'' if least == 1 else f's ({_reason(state)})'}, and that of "
            f"{', '.join(sorted(waiting[0].required)) or 'nobody in particular'}",
            "Sites that have left or were revoked can come back: nnUNetv2_train ... --c, or invite them "
            "again. Else stop the run.",
            code="too_early",
        )
    control = state.registry.control(run)
    still_open = frozenset(one for one in control.forced if not state.registry.is_closed(parse_key(one)))
    control = replace(control, forced=still_open | {str(key)})
    state.set_control(run, control, _event(state, str(key), "proceed", name))


def _reason(state: FederationState) -> str:
    """Name the options from which the least number of contributions follows."""
    return "--min-sites" if state.settings.secure is None else "--secure: so many unmask a sum, or are asked for"


def _reset(state: FederationState, run: str, name: str) -> None:
    """Forget a run that has not begun, so that the sites can register anew."""
    if state.registry.latest_round(run) is not None:
        raise RefusedError(f"run {run} has closed rounds: it can be stopped, not forgotten", code="has_rounds")
    state.forget_run(run, _event(state, run, "reset", name))


def _abandon(state: FederationState, run: str, name: str) -> None:
    """Close the open round of a run without any update: sites go on from the average before."""
    number = state.registry.run_state(run).open_round
    if state.settings.secure is None or number is None:
        raise RefusedError(
            f"run {run} has no round with masked updates that could be abandoned",
            "Close what it waits for with what there is (proceed), or stop it.",
            code="not_open",
        )
    members = tuple(sorted(state.registry.cohort(run, number)))
    cohort = state.registry.next_cohort(run, number, ())
    for key in (UploadKey(run, number), SurvivorsKey(run, number), RoundKey(run, number)):
        exchange = state.registry.begin(key)  # closed also where nobody has come, for whoever comes later
        if exchange.is_closed:
            continue
        outcome = Closed(state.clock(), contributors=(), missing=members)
        done = replace(exchange, outcome=replace(outcome, cohort=cohort) if isinstance(key, RoundKey) else outcome)
        state.store.result_folder(key)
        with state.closing(key):
            computed = step_of(key).abandon(done, state.settings, state.documents)
            state.close(done, computed.digest, record=computed.record)
    state.store.add_event(_event(state, str(RoundKey(run, number)), "abandon", name))


@contextmanager
def _between_closings(state: FederationState, run: str) -> Iterator[None]:
    """Hold a run: no closing and no contribution until the block ends.

    A closing in progress is finished first. So the last aggregate of a run that was stopped stays the last, and nothing
    more is written of a run that was reset.
    """
    while True:
        begun = state.registry.run_state(run).rounds_closed
        # The open round, begun or not, and the exchanges that may precede the first one.
        keys: set[str] = {*keys_that_stop_with(run, begun)}
        keys |= {AdmissionKey(run, site) for site in state.settings.sites}
        with ExitStack() as held:
            for name in (*sorted(keys), run):  # the run's lock last, as everywhere
                held.enter_context(state.locks[name])
            if state.registry.run_state(run).rounds_closed == begun:
                yield
                return


def _event(state: FederationState, key: str, action: str, name: str) -> Event:
    return state.event("control", name, key, {"action": action})
