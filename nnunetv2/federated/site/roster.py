"""Remember the identities of the other sites: as first seen, or as verified by people.

    FILE.roster.json   {version, federation, identities: {name: identity}, verified: {name: identity}, number}

FILE is the credential. The coordinator tells the identities, and is not trusted with them: one that differs from the
pinned one is refused, and under `nnUNet_fed_trust=verified` so is every one that people have not compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from nnunetv2.federated.errors import FederationError, RefusedError, WireError
from nnunetv2.federated.privacy.identities import check_distinct, check_run_keys, is_number, public_of, roster_number
from nnunetv2.federated.privacy.trust import VARIABLE, Trust, trust_mode
from nnunetv2.federated.protocol.messages import MAX_SITES, Part, PublicKey, SignedKey, SiteName, Text
from nnunetv2.federated.protocol.strict_json import decode_json
from nnunetv2.federated.site.credential import SiteCredential
from nnunetv2.federated.site.identity import beside, load_identity
from nnunetv2.federated.site.private_files import locked, write_private

MAX_REMEMBERED = 10 * MAX_SITES
"""Sites, also those that have left."""
Identities = Annotated[dict[SiteName, PublicKey], Field(max_length=MAX_REMEMBERED)]


class Roster(Part):
    """The identities of a federation's sites, as this site knows them."""

    version: Literal[1] = 1
    federation: Text
    identities: Identities = {}
    """Name -> identity as first seen, or as verified since."""
    verified: Identities = {}
    """Those that people have compared, all at once, by `number`."""
    number: Text | None = None


@dataclass(frozen=True)
class TrustedKeys:
    """The sites of a cohort, with identities and run keys that this site accepts."""

    mode: Trust
    keys: Mapping[str, SignedKey]
    new: tuple[str, ...] = ()
    """Those that were seen for the first time."""

    @property
    def identities(self) -> dict[str, bytes]:
        """Return the public keys of Ed25519 by site."""
        return {site: bytes.fromhex(key.identity) for site, key in self.keys.items()}

    @property
    def run_keys(self) -> dict[str, bytes]:
        """Return the public keys of X25519 by site."""
        return {site: bytes.fromhex(key.exchange_key) for site, key in self.keys.items()}

    def __str__(self) -> str:
        if self.mode == "verified":
            return f"identities of the sites: verified by people ({', '.join(sorted(self.keys))})"
        new = f"; seen for the first time: {', '.join(self.new)}" if self.new else ""
        return (
            f"identities of the sites: as first seen, not verified by people{new}. Compare the number that "
            f"nnUNetv2_fed_roster shows, and set {VARIABLE}=verified, to rule out a coordinator that invents sites"
        )


# ---------------------------------------------------------------------------------------------------------- the file
def roster_path(credential_file: Path | None = None) -> Path:
    """Return the file in which this site remembers the others."""
    return beside(credential_file, ".roster.json")


def load_roster(federation: str, credential_file: Path | None = None) -> Roster:
    """Return this site's roster of a federation, empty at first.

    Raises:
        FederationError: The file cannot be read: the damage may be meant to make a site forget.
    """
    path = roster_path(credential_file)
    try:
        roster = decode_json(Roster, path.read_bytes())
    except FileNotFoundError:
        return Roster(federation=federation)
    except (OSError, WireError) as error:
        raise FederationError(
            f"{path} cannot be read: {error}. It says who the other sites are: bring it back; or delete it, and "
            "compare the number of the roster with the other sites before you go on (nnUNetv2_fed_roster)"
        ) from error
    return roster if roster.federation == federation else Roster(federation=federation)


@contextmanager
def _changing(federation: str, credential_file: Path | None) -> Iterator[_Change]:
    """Yield the roster, and save it if the block changes it."""
    with locked(beside(credential_file, ".lock")):
        change = _Change(load_roster(federation, credential_file))
        before = change.roster
        yield change
        if change.roster != before:
            write_private(roster_path(credential_file), change.roster.model_dump_json(indent=4).encode())


@dataclass
class _Change:
    roster: Roster


# ---------------------------------------------------------------------------------------------------------- checking
def trusted_keys(
    keys: Mapping[str, SignedKey],
    credential: SiteCredential,
    *,
    gathering: str | Mapping[str, str],
    credential_file: Path | None = None,
) -> TrustedKeys:
    """Accept the run keys of a cohort, or refuse them.

    To be asked before anything masked is made for these sites. Identities that were never seen are pinned, unless
    people are to verify them.

    Args:
        keys: Site -> run key, this site included, as the coordinator tells them.
        gathering: In which all have handed in theirs, or each site's own.

    Raises:
        RefusedError: `run_key_forged`: a key is not signed by the identity beside it. `identity_changed`: a site, or
            this one, has another identity than is known here. `identity_repeated`: two sites have one, or one key.
            `roster_unverified`: people have not compared one that is needed.
        FederationError: The roster cannot be read, or `nnUNet_fed_trust` is neither of its values.
    """
    mode = trust_mode()
    identities = {site: key.identity for site, key in keys.items()}
    _check_own(identities, credential, credential_file)
    check_run_keys(keys, federation=credential.federation, gathering=gathering)
    with _changing(credential.federation, credential_file) as change:
        roster = change.roster
        _check_pinned(identities, roster, credential)
        if mode == "verified":
            _check_verified(identities, roster)
        new = tuple(sorted(identities.keys() - roster.identities.keys()))
        if len(roster.identities) + len(new) > MAX_REMEMBERED:
            raise FederationError(
                f"the coordinator has named more than {MAX_REMEMBERED} different sites: nothing was sent. Ask the "
                "coordinating site"
            )
        if new:
            change.roster = roster.model_copy(update={"identities": {**roster.identities, **identities}})
    return TrustedKeys(mode, dict(keys), new)


def changed_identities(identities: Mapping[str, str], roster: Roster) -> list[str]:
    """Return the sites whose identities are not the ones that are known here."""
    return sorted(site for site, identity in identities.items() if roster.identities.get(site, identity) != identity)


def unverified_identities(identities: Mapping[str, str], roster: Roster) -> list[str]:
    """Return the sites whose identities people have not compared."""
    return sorted(site for site, identity in identities.items() if roster.verified.get(site) != identity)


def _check_own(identities: Mapping[str, str], credential: SiteCredential, credential_file: Path | None) -> None:
    told = identities.get(credential.site)
    if told != public_of(load_identity(credential_file)):
        found = "no identity" if told is None else "another identity"
        raise RefusedError(
            f"the coordinator tells {found} for this site, {credential.site}, than the one that it joined with: "
            "somebody may stand in for it. Nothing was sent",
            "If this site's identity was lost and made anew, join again with a new invitation; else ask the "
            "coordinating site.",
            code="identity_changed",
        )


def _check_pinned(identities: Mapping[str, str], roster: Roster, credential: SiteCredential) -> None:
    if changed := changed_identities(identities, roster):
        raise RefusedError(
            f"site {changed[0]} has another identity than the one that this site knows"
            + (f", and so have {', '.join(changed[1:])}" if changed[1:] else "")
            + ": it has joined anew, or somebody stands in for it. Nothing was sent",
            f"Ask {', '.join(changed)} by telephone whether it has joined anew. If so, compare the number that "
            "nnUNetv2_fed_roster shows with theirs, and confirm it: nnUNetv2_fed_roster --verified NUMBER.",
            code="identity_changed",
        )


def _check_verified(identities: Mapping[str, str], roster: Roster) -> None:
    if unverified := unverified_identities(identities, roster):
        raise RefusedError(
            f"nobody at this site has verified the identity of {', '.join(unverified)} ({VARIABLE}=verified). "
            "Nothing was sent",
            "Compare the number that nnUNetv2_fed_roster shows with the other sites, over another way than the "
            "coordinator, and confirm it: nnUNetv2_fed_roster --verified NUMBER.",
            code="roster_unverified",
        )


# --------------------------------------------------------------------------------------------------------- verifying
def verify(
    identities: Mapping[str, str], typed: str, credential: SiteCredential, credential_file: Path | None = None
) -> None:
    """Record that people have compared these identities, replacing pinned ones.

    Args:
        identities: Name -> identity, as the coordinator tells them now.
        typed: The number that another site has read out.

    Raises:
        RefusedError: `identity_changed`: it is not the number of these identities, or this site's own is another.
    """
    _check_own(identities, credential, credential_file)
    check_distinct(identities, "identity")
    number = roster_number(credential.federation, identities)
    if not is_number(typed, number):
        raise RefusedError(
            f"the number of the roster that the coordinator shows this site is {number}, not the one that was typed",
            "Compare digit by digit. If the other sites have another number, the coordinator shows different "
            "rosters, or one has just changed: look again at all sites, and tell the coordinating site.",
            code="identity_changed",
        )
    with _changing(credential.federation, credential_file) as change:
        change.roster = change.roster.model_copy(
            update={
                "identities": {**change.roster.identities, **identities},
                "verified": dict(identities),
                "number": number,
            }
        )
