"""Show the sites of a federation as numbers that people compare, and remember the comparison."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from nnunetv2.federated.errors import FederationError
from nnunetv2.utilities.plain_text import show

if TYPE_CHECKING:
    from nnunetv2.federated.site.credential import SiteCredential
    from nnunetv2.federated.site.roster import Roster


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_fed_roster`."""
    parser = argparse.ArgumentParser(
        description="Show the sites of a federation that aggregates securely, each with the number of its identity, "
        "and the number of the roster. All sites must see the same number: read it to each other over another way "
        "than the coordinator, a telephone for example, and confirm it with --verified."
    )
    parser.add_argument(
        "--verified",
        metavar="NUMBER",
        nargs="+",
        help="the number of the roster that the other sites have read out: 40 digits, with or without blanks",
    )
    return parser


def describe(identities: Mapping[str, str], roster: Roster, credential: SiteCredential) -> Iterator[str]:
    """Yield the lines that people read."""
    from nnunetv2.federated.privacy.identities import roster_number
    from nnunetv2.federated.privacy.trust import trust_mode
    from nnunetv2.federated.site.roster import changed_identities, unverified_identities

    changed, unverified = changed_identities(identities, roster), unverified_identities(identities, roster)
    width = max(map(len, identities), default=0)
    yield f"Sites of {credential.federation}, as its coordinator tells them:"
    for site, identity in sorted(identities.items()):
        remark = "CHANGED since it was first seen" if site in changed else ""
        remark = remark or ("not verified" if site in unverified else "verified")
        own = ", this site" if site == credential.site else ""
        yield f"  {site:<{width}}  {roster_number(credential.federation, {site: identity})}  {remark}{own}"
    yield ""
    yield f"Number of the roster:  {roster_number(credential.federation, identities)}"
    if gone := sorted(roster.identities.keys() - identities.keys()):
        yield f"Seen before, not among them now: {', '.join(gone)}"
    yield ""
    if changed:
        yield f"Ask {', '.join(changed)} by telephone whether it has joined anew; if not, tell all sites to stop."
    if unverified:
        yield (
            "Read the number of the roster to the other sites, over another way than the coordinator. If all have "
            "the same: nnUNetv2_fed_roster --verified NUMBER."
        )
    else:
        yield "This roster was verified by people."
    yield (
        "This site masks for verified sites only (nnUNet_fed_trust=verified)."
        if trust_mode() == "verified"
        else "This site also masks for sites that nobody has verified (nnUNet_fed_trust=first_use); "
        "nnUNet_fed_trust=verified ends that."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `nnUNetv2_fed_roster`."""
    arguments = build_parser().parse_args(argv)
    from nnunetv2.federated.commands.api_client import ask
    from nnunetv2.federated.protocol import api
    from nnunetv2.federated.site.credential import load_credential
    from nnunetv2.federated.site.roster import load_roster, verify

    credential = load_credential()
    identities = ask(credential, "GET", "roster", api.Roster).sites
    if credential.secure is None:
        raise FederationError(
            f"{credential.federation} does not aggregate securely: its sites have no identities"
            if not identities
            else f"this site has joined {credential.federation} without an identity: join again with a new invitation"
        )
    if arguments.verified is not None:
        verify(identities, " ".join(arguments.verified), credential)
        show(f"Verified: {', '.join(sorted(identities))}. A site that is new or joins anew needs another look.")
        return 0
    show(*describe(identities, load_roster(credential.federation), credential))
    return 0


def roster_entry() -> None:
    """Entry point of the console script."""
    from nnunetv2.utilities.command_line import run_command

    run_command(main)
