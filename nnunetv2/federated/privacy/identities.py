"""Sign and verify with site identities, and number rosters for comparison.

An identity is an Ed25519 key that a site makes when it joins. Its signatures are bound to a purpose and to all parts
of their statement, each behind its length, so that no signature can be read as another one.

The roster's number has 40 digits, 132 bits: a coordinator that lies chooses keys in both of two views, so it takes
2^66 attempts until two rosters have one number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.protocol.messages import SignedKey

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

LENGTH_BYTES = 8
NUMBER_DIGITS = 40
GROUP_DIGITS = 5
RUN_KEY, SURVIVORS = "run key", "survivors"
"""Purposes of signatures."""


def length_prefixed(*parts: str | bytes | int) -> bytes:
    """Join parts, each behind its length, 8 bytes, big-endian: equal bytes mean equal parts.

    Args:
        parts: Texts as UTF-8; whole numbers from 0 on as their digits.
    """
    encoded = (part if isinstance(part, bytes) else str(part).encode() for part in parts)
    return b"".join(len(part).to_bytes(LENGTH_BYTES, "big") + part for part in encoded)


def public_of(key: Ed25519PrivateKey | X25519PrivateKey) -> str:
    """Return the public part of a key, in hexadecimal."""
    return key.public_key().public_bytes_raw().hex()


# -------------------------------------------------------------------------------------------------------- signatures
def sign(identity: Ed25519PrivateKey, purpose: str, *parts: str | bytes | int) -> str:
    """Sign parts for one purpose; return the signature in hexadecimal."""
    return identity.sign(_statement(purpose, parts)).hex()


def is_signed(signature: str, identity: str, purpose: str, *parts: str | bytes | int) -> bool:
    """Return whether a signature is that of an identity over these parts, for this purpose."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(identity))
        key.verify(bytes.fromhex(signature), _statement(purpose, parts))
    except (InvalidSignature, ValueError):  # the latter: no point of the curve, no hexadecimal
        return False
    return True


def _statement(purpose: str, parts: Iterable[str | bytes | int]) -> bytes:
    return length_prefixed(f"nnunet-fed {purpose}", *parts)


# ---------------------------------------------------------------------------------------------------------- run keys
def sign_run_key(
    identity: Ed25519PrivateKey, exchange_key: X25519PrivateKey, *, federation: str, gathering: str
) -> SignedKey:
    """Sign the key with which a site agrees on masks in a gathering."""
    public = public_of(exchange_key)
    return SignedKey(
        identity=public_of(identity),
        exchange_key=public,
        signature=sign(identity, RUN_KEY, federation, gathering, public),
    )


def check_run_keys(keys: Mapping[str, SignedKey], *, federation: str, gathering: str | Mapping[str, str]) -> None:
    """Check that run keys are signed by the identities beside them, and all different.

    Whether the identities are the right ones is asked elsewhere; see `site/roster.py`.

    Args:
        gathering: In which all have handed in theirs, or each site's own.

    Raises:
        RefusedError: `run_key_forged`: a key is not signed by that identity for this federation and gathering.
            `identity_repeated`: two sites have one identity, or one key.
    """
    for site, key in sorted(keys.items()):
        place = gathering if isinstance(gathering, str) else gathering[site]
        if not is_signed(key.signature, key.identity, RUN_KEY, federation, place, key.exchange_key):
            raise RefusedError(
                f"the key that the coordinator hands out for site {site} is not signed by that site for {place}: "
                "somebody may want to read what is masked. Nothing was sent",
                "Ask the coordinating site, and that site.",
                code="run_key_forged",
            )
    for what, values in (
        ("identity", {site: key.identity for site, key in keys.items()}),
        ("run key", {site: key.exchange_key for site, key in keys.items()}),
    ):
        check_distinct(values, what)


def check_distinct(values: Mapping[str, str], what: str) -> None:
    """Raise RefusedError `identity_repeated` if two sites have one value.

    Args:
        values: Site -> its identity, or its key.
        what: The kind of the values, such as "identity".
    """
    first_of: dict[str, str] = {}
    for site, value in sorted(values.items()):
        if (other := first_of.setdefault(value, site)) != site:
            raise RefusedError(
                f"sites {other} and {site} have one {what}, so they are one site under two names",
                "Let one of them leave, or join from a machine of its own.",
                code="identity_repeated",
            )


# --------------------------------------------------------------------------------------------------------- survivors
def sign_survivors(identity: Ed25519PrivateKey, *, federation: str, gathering: str, digest: str) -> str:
    """Confirm the sites whose updates are summed.

    Args:
        gathering: In which they are confirmed; it names run and round.
        digest: Of the survivors, their cohort and its keys: `secure_aggregation.protocol.survivors_digest`.
    """
    return sign(identity, SURVIVORS, federation, gathering, digest)


def check_confirmations(
    signatures: Mapping[str, str],
    identities: Mapping[str, str],
    *,
    federation: str,
    gathering: str,
    digest: str,
    least: int,
) -> None:
    """Check that enough sites of the cohort have confirmed exactly these survivors.

    Args:
        signatures: Site -> signature. Those that are no good, or of no site of the cohort, do not count.
        identities: Site -> identity, as this site trusts them, of the cohort.
        gathering, digest: As in `sign_survivors`.
        least: How many confirmations it takes.

    Raises:
        RefusedError: `survivors_unconfirmed`: there are fewer.
    """
    confirmed = [
        site
        for site, signature in signatures.items()
        if site in identities and is_signed(signature, identities[site], SURVIVORS, federation, gathering, digest)
    ]
    if len(confirmed) < least:
        raise RefusedError(
            f"{gathering}: {len(confirmed)} of the {least} sites that it takes have confirmed the set of sites "
            f"that is to be summed ({', '.join(sorted(confirmed)) or 'none'}): the coordinator may show different "
            "sets to different sites. This site gave nothing away",
            "Ask the coordinating site.",
            code="survivors_unconfirmed",
        )


# ----------------------------------------------------------------------------------------------------------- numbers
def roster_number(federation: str, identities: Mapping[str, str]) -> str:
    """Return the number of a roster, or of a site: 40 digits in fives.

    Args:
        identities: Name -> identity.
    """
    content = [part for name, identity in sorted(identities.items()) for part in (name, identity)]
    digest = hashlib.sha256(length_prefixed("nnunet-fed roster", federation, *content)).digest()
    digits = f"{int.from_bytes(digest, 'big') % 10**NUMBER_DIGITS:0{NUMBER_DIGITS}d}"
    return " ".join(digits[at : at + GROUP_DIGITS] for at in range(0, NUMBER_DIGITS, GROUP_DIGITS))


def is_number(text: str, number: str) -> bool:
    """Return whether a text is this number, apart from spaces and hyphens."""
    return "".join(text.split()).replace("-", "") == number.replace(" ", "")
