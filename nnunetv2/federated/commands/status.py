"""Show the state of a federation: sites, runs, pending exchanges, recent failures.

Any member may ask. Needs the standard library only, and pydantic.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from nnunetv2.federated.commands.api_client import add_folder_option, ask, operator_credential
from nnunetv2.federated.errors import RefusedError
from nnunetv2.utilities.durations import format_duration, format_moment
from nnunetv2.utilities.plain_text import printable, printable_json, show

if TYPE_CHECKING:
    from pydantic import BaseModel

    from nnunetv2.federated.protocol.api import (
        DeclaredPrivacy,
        GatheringStatus,
        Outlooks,
        RunOutlook,
        RunProgress,
        RunState,
        SiteStatus,
        Status,
    )
    from nnunetv2.federated.site.credential import SiteCredential

SHOWN_FAILURES = 10
Answer = TypeVar("Answer", bound="BaseModel")


# ----------------------------------------------------------------------------------------------------- describing
def describe(
    status: Status, *, url: str, outlooks: Outlooks | None = None, privacy: DeclaredPrivacy | None = None
) -> Iterator[str]:
    """Yield the lines that people read, all of them printable.

    Args:
        outlooks: The outlooks of the runs' averages; None where the coordinator does not say.
        privacy: The privacy that sites have declared for their trainings; None likewise.
    """
    yield from map(printable, _describe(status, url=url, outlooks=outlooks, privacy=privacy))


def _describe(status: Status, *, url: str, outlooks: Outlooks | None, privacy: DeclaredPrivacy | None) -> Iterator[str]:
    from nnunetv2.federated.exchanges.declared_privacy import describe_privacy
    from nnunetv2.federated.protocol.api import RunProgress

    yield f"Federation {status.federation} at {url}, {format_moment(status.time)}"
    progress = {one.run: one for one in status.progress}
    outlook_of = {one.run: one for one in outlooks.runs} if outlooks else {}
    privacy_of = {one.run: describe_privacy(one.sites) for one in privacy.runs} if privacy else {}
    for state in status.runs:
        yield ""
        yield from _describe_run(state, progress.get(state.run, RunProgress(run=state.run)), status)
        if state.run in outlook_of:
            yield from (f"  {line}" for line in _describe_outlook(outlook_of[state.run]))
        if privacy_of.get(state.run):
            yield f"  {privacy_of[state.run]}"
    elsewhere = [one for one in status.waiting if not one.key.startswith("runs/")]
    if elsewhere:
        yield ""
    for exchange in elsewhere:
        yield _describe_wait(exchange, exchange.key, status.time)
    if not status.runs and not elsewhere:
        yield "Nothing is under way."
    yield ""
    for site in status.sites:
        yield f"site {site.site}: {_describe_site(site, status.time)}"
    if status.failures:
        yield ""
    for failure in reversed(status.failures[-SHOWN_FAILURES:]):
        where = f"run {failure.run}" if failure.round is None else f"round {failure.round} of run {failure.run}"
        yield f"{format_moment(failure.time)}: site {failure.site} failed in {where}: {failure.reason}"


def _describe_run(state: RunState, progress: RunProgress, status: Status) -> Iterator[str]:
    total = f" of {state.num_rounds}" if state.num_rounds is not None else ""
    pace = _describe_pace(state, progress, status.time)
    yield f"run {state.run}: {state.state}, {state.rounds_closed}{total} rounds closed{pace}"
    waiting = [one for one in status.waiting if one.key.startswith(f"runs/{state.run}/")]
    for exchange in waiting:
        if not exchange.key.startswith(f"runs/{state.run}/validations/"):  # which nobody waits for
            yield "  " + _describe_wait(exchange, _name_of(exchange.key, state.run), status.time)
    of_round = {f"runs/{state.run}/{kind}/{state.open_round}" for kind in ("uploads", "survivors", "rounds")}
    is_begun = any(one.key in of_round for one in waiting)
    if state.open_round is not None and not is_begun:
        since = "" if progress.last_closed is None else f" since {format_duration(status.time - progress.last_closed)}"
        yield f"  all train{since}: round {state.open_round}; nobody has sent an update yet"
    if state.left:
        yield f"  left by {', '.join(state.left)}"
    found = progress.validation
    if found is not None:
        best = (
            "" if found.best_round is None else f"; best {_number(found.best_ema_dice)} after round {found.best_round}"
        )
        yield (
            f"  last validation, round {found.round}: pseudo Dice {_number(found.mean_dice)}, moving average "
            f"{_number(found.ema_dice)}{best}; per class {', '.join(_number(value) for value in found.dice)}"
        )


def _describe_outlook(outlook: RunOutlook) -> Iterator[str]:
    from nnunetv2.federated.exchanges.outlook import Outlook

    if outlook.networks:
        found = Outlook(outlook.trainer, outlook.obstacle, outlook.networks, outlook.coverage)
        yield from (str(found), *found.details())
    elif outlook.obstacle:
        yield f"no common model: {outlook.obstacle}"
    else:
        yield f"common model: with the network of {outlook.trainer}"


def _describe_pace(state: RunState, progress: RunProgress, now: float) -> str:
    from nnunetv2.federated.exchanges.pace import seconds_left

    if progress.round_s is None or state.closed:
        return ""
    left_s = seconds_left(state, round_s=progress.round_s, last_closed=progress.last_closed, now=now)
    left = "" if left_s is None else f", about {format_duration(left_s)} left"
    return f"; {format_duration(progress.round_s)} per round{left}"


def _describe_wait(exchange: GatheringStatus, name: str, now: float) -> str:
    since = format_duration(now - exchange.opened)
    if exchange.refusal:
        return f"{name} is refused, until a site sends something else or is revoked: {exchange.refusal}"
    if exchange.lacks and not exchange.waiting_for:
        return (
            f"waiting for {exchange.lacks} more since {since}: {name} needs more sites (--min-sites, --quorum) "
            f"than take part at the moment ({', '.join(exchange.contributed)} contributed)"
        )
    if not exchange.waiting_for:
        return f"all have contributed: {name}, since {since}; it is not closed yet"
    there = f" ({', '.join(exchange.contributed)} contributed)" if exchange.contributed else ""
    return f"waiting for {', '.join(exchange.waiting_for)} since {since}: {name}{there}"


def _name_of(key: str, run: str) -> str:
    """Name an exchange of a run as people do: `runs/<run>/rounds/17` is round 17."""
    rest = key.removeprefix(f"runs/{run}/").split("/")
    names = {
        "rounds": "round",
        "uploads": "masked updates of round",
        "survivors": "confirmations of round",
        "validations": "validation of round",
        "admissions": "admission of",
        "initial": "initial weights",
    }
    return " ".join([names.get(rest[0], rest[0]), *rest[1:]])


def _describe_site(site: SiteStatus, now: float) -> str:
    if site.state != "active":
        return "invited, has not joined yet" if site.state == "invited" else "revoked"
    seen = "joined" if site.last_seen is None else f"heard of {format_duration(now - site.last_seen)} ago"
    if not site.bytes_received and not site.bytes_sent:  # nothing yet, or not to be known here
        return seen
    return f"{seen}; it has sent {site.bytes_received / 1e6:,.1f} MB and got {site.bytes_sent / 1e6:,.1f} MB"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"


# ---------------------------------------------------------------------------------------------------- command lines
def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_fed_status`."""
    parser = argparse.ArgumentParser(description="Show what the federation is doing, and what everybody waits for.")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, for programs")
    add_folder_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `nnUNetv2_fed_status`."""
    arguments = build_parser().parse_args(argv)
    from nnunetv2.federated.protocol.api import Status

    credential = operator_credential(arguments.folder)
    status = ask(credential, "GET", "status", Status)
    lines = (
        printable_json(status.model_dump(mode="json"), indent=4).split("\n")
        if arguments.json
        else describe(
            status, url=credential.url, outlooks=_ask_for_outlooks(credential), privacy=_ask_for_privacy(credential)
        )
    )
    show(*lines)
    return 0


def _ask_for_outlooks(credential: SiteCredential) -> Outlooks | None:
    """Ask for the outlooks of the runs; None from an old coordinator."""
    from nnunetv2.federated.protocol.api import Outlooks

    return _ask_if_known(credential, "outlooks", Outlooks)


def _ask_for_privacy(credential: SiteCredential) -> DeclaredPrivacy | None:
    """Ask for the sites' declared privacy; None from an old coordinator."""
    from nnunetv2.federated.protocol.api import DeclaredPrivacy

    return _ask_if_known(credential, "privacy", DeclaredPrivacy)


def _ask_if_known(credential: SiteCredential, path: str, kind: type[Answer]) -> Answer | None:
    try:
        return ask(credential, "GET", path, kind)
    except RefusedError as error:
        if error.code != "unknown_path":
            raise
        return None


def status_entry() -> None:
    """Entry point of the console script `nnUNetv2_fed_status`."""
    from nnunetv2.utilities.command_line import run_command

    run_command(main)
