"""Leave a training run, so that the other sites go on without this one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from urllib.parse import quote

from nnunetv2.federated.commands.api_client import ask
from nnunetv2.federated.site.credential import load_credential
from nnunetv2.utilities.plain_text import show


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_fed_leave`."""
    parser = argparse.ArgumentParser(
        description="Let the other sites of a run go on without this one. What it has contributed stays. "
        "`nnUNetv2_train ... --c` returns to the run."
    )
    parser.add_argument("run", metavar="RUN", help="name of the run, as nnUNetv2_fed_status shows it")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `nnUNetv2_fed_leave`."""
    run = build_parser().parse_args(argv).run
    from nnunetv2.federated.protocol.api import RunAction, RunState

    credential = load_credential()
    state = ask(credential, "POST", f"runs/{quote(run)}/actions", RunState, RunAction(action="leave"))
    others = ", ".join(state.members) or "nobody"
    show(f"Site {credential.site} has left run {run}; it goes on with {others}. nnUNetv2_train ... --c returns to it.")
    return 0


def leave_entry() -> None:
    """Entry point of the console script `nnUNetv2_fed_leave`."""
    from nnunetv2.utilities.command_line import run_command

    run_command(main)
