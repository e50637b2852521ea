"""Operate a federation from the command line: invite, revoke, steer runs, change settings, look at the audit log.

Talks to the coordinator that serves a folder, as the operator that its start has appointed on this machine, or to any
coordinator that this machine's credential belongs to, if that is an operator's. Needs the standard library only, and
pydantic: so does the coordinator's machine.
"""

from __future__ import annotations

import argparse
import http.client
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote, urlsplit

from nnunetv2.federated.commands import audit_log
from nnunetv2.federated.coordinator.storage import backup
from nnunetv2.federated.errors import CoordinatorUnreachable, FederationError, NotJoinedError, RefusedError
from nnunetv2.federated.protocol.certificates import load_chain, untrusted_certificate
from nnunetv2.federated.site.credential import SiteCredential, check_site_name, decode_invitation, load_credential
from nnunetv2.utilities.loopback import is_loopback
from nnunetv2.utilities.plain_text import printable_json, shell_command, show

if TYPE_CHECKING:
    from pydantic import BaseModel

    Model = TypeVar("Model", bound=BaseModel)

DEFAULT_FOLDER = Path("nnUNet_federation")
OPERATOR_FILE = "operator.json"
TIMEOUT_S = 60.0
LARGEST_ANSWER = 32 << 20
RUN_ACTIONS = {
    "pause": "take contributions, but close no round of a run",
    "resume": "close rounds again",
    "stop": "end a run with its last closed round",
    "reset": "forget a run in which no round has been closed, so that the sites can register anew",
    "proceed": "close what a run waits for with the contributions that there are",
}


# -------------------------------------------------------------------------------------------------------- requests
def ask(
    credential: SiteCredential, method: str, path: str, model: type[Model] | None = None, body: BaseModel | None = None
) -> Model | None:
    """Send one request to a coordinator and return its answer.

    Raises:
        RefusedError: The coordinator says no.
        CoordinatorUnreachable: Nobody answers.
    """
    from nnunetv2.federated.site.transports.answers import ForeignAnswerError, decode_answer, describe_foreign

    # What was not given on the command line is not sent: it stays as it is.
    data = None if body is None else body.model_dump_json(exclude_unset=True).encode()
    request = urllib.request.Request(
        f"{credential.url}/v1/{path}",
        method=method,
        data=data,
        headers={"Authorization": f"Bearer {credential.token}", "Content-Type": "application/json"},
    )
    try:
        try:
            with _opener(credential).open(request, timeout=TIMEOUT_S) as answer:
                content = answer.read(LARGEST_ANSWER)
            return decode_answer(model, content, answer.headers) if model is not None else None
        except ForeignAnswerError as error:
            raise FederationError(
                describe_foreign(request.full_url, answer.status, answer.reason, answer.headers)
            ) from error
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(error) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise untrusted_certificate(reason, credential.url) from error
        raise CoordinatorUnreachable(
            f"the coordinator at {credential.url} does not answer: {reason!s:.200}. Is it running?"
        ) from error


def moment_of(seconds: float) -> str:
    """Return a coordinator's time as people read it; what no clock shows stays a number."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (OverflowError, OSError, ValueError):
        return f"{seconds:g} s after 1970"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Send the token nowhere else."""

    def redirect_request(self, *_: object) -> None:
        return None


def _opener(credential: SiteCredential) -> urllib.request.OpenerDirector:
    # As the library that training uses: what this site has pinned, else the file in the variable, else the system's.
    context = ssl.create_default_context(cafile=credential.authority or os.environ.get("REQUESTS_CA_BUNDLE") or None)
    if credential.client_certificate is not None:
        load_chain(context, credential.client_certificate, credential.client_key)
    handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=context), _NoRedirects()]
    if is_loopback(urlsplit(credential.url).hostname):
        handlers.append(urllib.request.ProxyHandler({}))
    return urllib.request.build_opener(*handlers)


def _refusal(error: urllib.error.HTTPError) -> FederationError:
    from nnunetv2.federated.site.transports.answers import describe_foreign, find_problem

    problem = find_problem(error.read(LARGEST_ANSWER), error.headers)
    if problem is None:
        return FederationError(describe_foreign(error.url, error.code, error.reason, error.headers))
    return RefusedError(problem.message, problem.remedy, code=problem.code)


# -------------------------------------------------------------------------------------------------------- commands
def invite(credential: SiteCredential, arguments: argparse.Namespace) -> None:
    """Invite a site, an observer or an operator, and print the line that it has to type, or the link to open."""
    from nnunetv2.federated.protocol.api import InviteAnswer, InviteRequest
    from nnunetv2.federated.protocol.strict_json import validated

    request = validated(
        lambda: InviteRequest(
            name=check_site_name(arguments.name), role=arguments.role, lifetime_s=arguments.days * 86_400
        ),
        "the invitation",
    )
    answer = ask(credential, "POST", "members", InviteAnswer, request)
    show(
        f"Send {answer.role} {answer.name} this line; it is good once, until {moment_of(answer.expires)}:",
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
    show(f"The credential of {arguments.name} is revoked. `invite {arguments.name}` lets it back in.")


def steer(credential: SiteCredential, arguments: argparse.Namespace) -> None:
    """Pause, resume, stop, reset or proceed with a run."""
    from nnunetv2.federated.protocol.api import RunAction, RunState

    action = RunAction(action=arguments.command, gathering=getattr(arguments, "gathering", None))
    state = ask(credential, "POST", f"runs/{quote(arguments.run)}/actions", RunState, action)
    rounds = f"{state.rounds_closed} of {state.num_rounds}" if state.num_rounds else f"{state.rounds_closed}"
    show(f"run {state.run}: {state.state}, {rounds} rounds closed")


def change_settings(credential: SiteCredential, arguments: argparse.Namespace) -> None:
    """Change settings of a federation at work, or show them."""
    from nnunetv2.federated.protocol.api import FederationSettings, SettingsChange
    from nnunetv2.federated.protocol.strict_json import validated

    given = {
        name: getattr(arguments, name)
        for name in ("quorum", "deadline_s", "late_updates", "validate_every", "min_sites")
        if getattr(arguments, name) is not None
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
    commands.choices["proceed"].add_argument("--gathering", metavar="KEY", help="which, if the run waits for several")
    _add(commands, "settings", change_settings, "show the settings, or change them while the federation is at work")
    _add_settings(commands.choices["settings"])
    audit_log.add_commands(commands)
    backup.add_commands(commands)
    return parser


def add_folder_option(parser: argparse.ArgumentParser) -> None:
    """Add `--folder` to a parser; `operator_credential` takes its value."""
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="F",
        help="folder of the federation, on the coordinator's "
        f"machine (default: ./{DEFAULT_FOLDER} if it is there, else the credential of this machine)",
    )


def _add(commands: argparse._SubParsersAction, name: str, function: Callable[..., None], text: str) -> None:
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


def operator_credential(folder: Path | None) -> SiteCredential:
    """Return the credential of the operator on this machine.

    Raises:
        NotJoinedError: The folder is served by no coordinator now, or this machine has no credential.
    """
    if folder is None and not DEFAULT_FOLDER.is_dir():
        return load_credential()
    path = (folder or DEFAULT_FOLDER) / OPERATOR_FILE
    if not path.exists():
        raise NotJoinedError(
            f"no coordinator serves {path.parent} at the moment: start nnUNetv2_fed_coordinator "
            f"--folder {path.parent}, or name another --folder"
        )
    return load_credential(path)


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
