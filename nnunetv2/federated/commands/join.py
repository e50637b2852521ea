"""Join a federation from the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nnunetv2.utilities.plain_text import show


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_fed_join`."""
    parser = argparse.ArgumentParser(description="Join a federation as one of its sites.")
    parser.add_argument("invitation", metavar="INVITE", help="the word nnunet-fed:... from the coordinating site")
    parser.add_argument(
        "--replace", action="store_true", help="give up the credential of another federation that this site holds"
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="allow plain HTTP to another machine; only where the network itself is protected",
    )
    parser.add_argument(
        "--client-certificate",
        type=Path,
        metavar="FILE",
        help="certificate to show to a coordinator that asks for one (PEM)",
    )
    parser.add_argument("--client-key", type=Path, metavar="FILE", help="its key, if that is in another file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `nnUNetv2_fed_join`."""
    arguments = build_parser().parse_args(argv)
    from nnunetv2.federated.protocol.invitation import decode_invitation
    from nnunetv2.federated.site.enrolment import join

    show(
        join(
            decode_invitation(arguments.invitation),
            replace=arguments.replace,
            insecure=arguments.insecure,
            client_certificate=arguments.client_certificate,
            client_key=arguments.client_key,
        )
    )
    return 0


def join_entry() -> None:
    """Entry point of the console script."""
    from nnunetv2.utilities.command_line import run_command

    run_command(main)
