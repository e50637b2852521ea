"""Operate a federation: members, runs, settings, audit log, backups.

Talks to the coordinator that serves a folder, as the operator that its start has appointed on this machine, or to any
coordinator that this machine's credential belongs to, if that is an operator's. Needs the standard library only, and
pydantic: so does the coordinator's machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from urllib.parse import quote

from nnunetv2.federated.commands import audit_log, backup
from nnunetv2.federated.commands.api_client import DEFAULT_FOLDER, add_folder_option, ask, operator_credential
from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.protocol.invitation import check_site_name, decode_invitation
from nnunetv2.utilities.durations import format_moment
from nnunetv2.utilities.plain_text import printable_json, shell_command, show

if TYPE_CHECKING:
    from nnunetv2.federated.site.credential import SiteCredential

RUN_ACTIONS = {
    "pause": "take contributions, but close no round of a run",
    "resume": "close rounds again",
    "stop": "end a run with its last closed round",
    "reset": "forget a run in which no round has been closed, so that the sites can register anew",
    "proceed": "close what a run waits for with the contributions that there are",
    "abandon": "close the open round of a run whose updates are masked with the average before, without any of them",
}


# -------------------------------------------------------------------------------------------------------- commands
def invite(credential: SiteCredential, arguments: argparse.Namespace) -> None:
    """Invite a member, and print its command line, or its link."""
    from nnunetv2.federated.protocol.api import InviteAnswer, InviteRequest
    from nnunetv2.federated.protocol.strict_json import validated

    request = validated(
        lambda: InviteRequest(
            name=check_site_name(arguments.name), role=arguments.role, lifetime_s=arguments.days * 86_400
        ),
        "the invitation",
    )
    answer = ask(credential, "POST", "members", InviteAnswer, request)
    if not answer.invitation:
        show(f"{answer.name} takes part again; it comes through NVFlare and needs no invitation.")
        return
    show(
        f"Send {answer.role} {answer.name} this line; it is good once, until {format_moment(answer.expires)}:",
        f"  {shell_command('nnUNetv2_fed_join', answer.invitation)}",
    )
    if answer.role != "site":
        show(
            "or this link to the page, which its browser opens:",
            f"  {decode_invitation(answer.invitation).url}/#{answer.invitation}",
        )


def revoke(credential: SiteCredential, arguments: argparse.Namespace) -> None:
    """Take a credential away."""
    ask(credential, "DELETE", f"members/{quote(arguments.name)}")
    show(f"{arguments.name} is revoked, with its credential if it has one. `invite {arguments.name}` lets it back in.")


def steer(credential: SiteCredential, arguments: argparse.Namespace) -> None:
    """Pause, resume, stop, reset or proceed with a run, or abandon its open round."""
    from nnunetv2.federated.protocol.api import RunAction, RunState

    action = RunAction(action=arguments.command, gathering=arguments.gathering)
    state = ask(credential, "POST", f"runs/{quote(arguments.run)}/actions", RunState, action)
    rounds = f"{state.rounds_closed} of {state.num_rounds}" if state.num_rounds else f"{state.rounds_closed}"
    show(f"run {state.run}: {state.state}, {rounds} rounds closed")


def change_settings(credential: SiteCredential, arguments: argparse.Namespace) -> None:
    """Change settings of a federation at work, or show them."""
    from nnunetv2.federated.protocol.api import FederationSettings, SettingsChange
    from nnunetv2.federated.protocol.strict_json import validated

    given = {
        name: value
        for name, value in vars(arguments).items()
        if name in ("quorum", "deadline_s", "late_updates", "validate_every", "min_sites") and value is not None
    }
    if arguments.wait_for_all:
        if "quorum" in given or "deadline_s" in given:
            raise FederationError("--wait-for-all is without --quorum and --deadline: give one or the other")
        given |= {"quorum": None, "deadline_s": None}
    if given:
        change = validated(lambda: SettingsChange(**given), "the command line")
        settings = ask(credential, "PATCH", "settings", FederationSettings, change)
    else:
        settings = ask(credential, "GET", "settings", FederationSettings)
    content = {**settings.model_dump(mode="json"), "min_sites": settings.min_sites}
    show(*printable_json(content, indent=4).split("\n"))


# ---------------------------------------------------------------------------------------------------- command line
def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_fed_admin`."""
    parser = argparse.ArgumentParser(description="Operate a federation whose coordinator is running.")
    add_folder_option(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add(commands, "invite", invite, "invite a site, an observer or an operator; or one again that lost its credential")
    commands.choices["invite"].add_argument("name", metavar="NAME")
    commands.choices["invite"].add_argument("--role", choices=("site", "observer", "operator"), default="site")
    commands.choices["invite"].add_argument(
        "--days", type=float, default=14.0, metavar="N", help="days until the invitation expires (default: %(default)g)"
    )
    _add(commands, "revoke", revoke, "take a credential away, at once")
    commands.choices["revoke"].add_argument("name", metavar="NAME")
    for action, text in RUN_ACTIONS.items():
        _add(commands, action, steer, text)
        commands.choices[action].add_argument("run", metavar="RUN", help="name of the run")
        commands.choices[action].set_defaults(gathering=None)
    commands.choices["proceed"].add_argument("--gathering", metavar="KEY", help="which, if the run waits for several")
    _add(commands, "settings", change_settings, "show the settings, or change them while the federation is at work")
    _add_settings(commands.choices["settings"])
    audit_log.add_commands(commands)
    backup.add_commands(commands)
    return parser


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, function: Callable[..., None], text: str
) -> None:
    commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.").set_defaults(function=function)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quorum", type=int, metavar="N", help="sites that suffice to close a round at its deadline")
    parser.add_argument(
        "--deadline",
        dest="deadline_s",
        type=float,
        metavar="S",
        help="seconds after its first update at which a round closes with its quorum",
    )
    parser.add_argument("--wait-for-all", action="store_true", help="neither quorum nor deadline")
    parser.add_argument("--late-updates", choices=("drop", "carry"))
    parser.add_argument("--validate-every", type=int, metavar="N")
    parser.add_argument(
        "--min-sites", type=int, metavar="N", help="nothing is averaged over fewer sites; can be raised, not lowered"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `nnUNetv2_fed_admin`."""
    arguments = build_parser().parse_args(argv)
    if "function_of_folder" in arguments:  # needs no coordinator
        arguments.function_of_folder(arguments.folder or DEFAULT_FOLDER, arguments)
        return 0
    arguments.function(operator_credential(arguments.folder), arguments)
    return 0


def admin_entry() -> None:
    """Entry point of the console script."""
    from nnunetv2.utilities.command_line import run_command

    run_command(main)
