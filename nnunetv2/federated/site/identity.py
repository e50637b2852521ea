"""Keep the identity of a site, and the keys with which it agrees on masks.

    FILE.identity.pem                                      Ed25519; made at the first join of a federation that
                                                           aggregates securely, and kept when the site joins again
    FILE.secure/<federation>/<gathering>/exchange_key.pem  X25519, of one run or one pooling; gone when that is over

FILE is the credential; only its owner can read these.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2.federated.errors import FederationError, NotJoinedError
from nnunetv2.federated.privacy.cryptography_library import require_cryptography
from nnunetv2.federated.privacy.identities import sign_run_key
from nnunetv2.federated.protocol.keys import segment
from nnunetv2.federated.site.credential import credential_path
from nnunetv2.federated.site.private_files import locked, write_private

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    from nnunetv2.federated.protocol.messages import SignedKey

EXCHANGE_KEY_FILE = "exchange_key.pem"


def beside(credential_file: Path | None, ending: str) -> Path:
    """Return the absolute path of a file that belongs to a credential."""
    path = credential_file or credential_path()
    return path.with_name(path.name + ending).absolute()


# ---------------------------------------------------------------------------------------------------------- identity
def identity_path(credential_file: Path | None = None) -> Path:
    """Return the file of this site's identity."""
    return beside(credential_file, ".identity.pem")


def load_identity(credential_file: Path | None = None) -> Ed25519PrivateKey:
    """Read the identity of this site.

    Raises:
        NotJoinedError: There is none, or it cannot be read.
    """
    path = identity_path(credential_file)
    if not path.exists():
        raise NotJoinedError(
            f"this site has no identity: {path} does not exist. Bring it back, or join again with a new invitation "
            "and tell the other sites, which will see another identity"
        )
    return _read_identity(path)


def make_identity(credential_file: Path | None = None) -> Ed25519PrivateKey:
    """Return the identity of this site, made and saved if there is none yet.

    Raises:
        NotJoinedError: There is one that cannot be read.
    """
    require_cryptography("a federation that aggregates securely")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    path = identity_path(credential_file)
    with locked(beside(credential_file, ".lock")):
        if path.exists():
            return _read_identity(path)
        identity = Ed25519PrivateKey.generate()
        write_private(path, _as_pem(identity))
        return identity


def _read_identity(path: Path) -> Ed25519PrivateKey:
    require_cryptography("a federation that aggregates securely")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        identity = _read_key(path)
        if not isinstance(identity, Ed25519PrivateKey):
            raise ValueError("it is a key of another kind")
        return identity
    except (OSError, ValueError) as error:
        raise NotJoinedError(
            f"the identity {path} cannot be read: {error}. Bring it back from a backup; or delete it, join again "
            "with a new invitation, and tell the other sites, which will see another identity"
        ) from error


# ------------------------------------------------------------------------------------------------------ exchange keys
def secure_folder(federation: str, gathering: str, credential_file: Path | None = None) -> Path:
    """Return the folder for keys and promises of a gathering, or of a run.

    Raises:
        ValueError: The gathering's key has other parts than keys have.
    """
    digest = hashlib.sha256(federation.encode()).hexdigest()[:16]  # its name can be any text
    return beside(credential_file, ".secure").joinpath(digest, *map(segment, gathering.split("/")))


def has_run_key(federation: str, gathering: str, credential_file: Path | None = None) -> bool:
    """Tell whether this site has a key for a gathering."""
    return (secure_folder(federation, gathering, credential_file) / EXCHANGE_KEY_FILE).exists()


def run_key(federation: str, gathering: str, credential_file: Path | None = None) -> tuple[X25519PrivateKey, SignedKey]:
    """Return this site's key for one gathering, signed by its identity.

    It is made the first time, and on the disk before this returns. Later calls, also after a crash, return the same one
    until it is forgotten.

    Args:
        federation, gathering: Bound to the key by the signature; the latter such as "runs/<run>/registration".

    Raises:
        NotJoinedError: This site has no identity.
        FederationError: The key is there and cannot be read.
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    identity = load_identity(credential_file)
    path = secure_folder(federation, gathering, credential_file) / EXCHANGE_KEY_FILE
    with locked(beside(credential_file, ".lock")):
        if path.exists():
            try:
                key = _read_key(path)
                if not isinstance(key, X25519PrivateKey):
                    raise ValueError("it is a key of another kind")
            except (OSError, ValueError) as error:
                raise FederationError(
                    f"the key {path} of {gathering} cannot be read: {error}. Bring it back, or ask the coordinating "
                    "site to begin the run anew"
                ) from error
        else:
            key = X25519PrivateKey.generate()
            write_private(path, _as_pem(key))
    return key, sign_run_key(identity, key, federation=federation, gathering=gathering)


def forget_run_keys(federation: str, run: str, credential_file: Path | None = None) -> None:
    """Delete all keys of a run that is over; no disk opens its masks later.

    Args:
        run: The part of the gatherings' keys before the last slashes: "runs/<run>", or "fingerprint".
    """
    folder = secure_folder(federation, run, credential_file)
    with locked(beside(credential_file, ".lock")):
        for path in list(folder.rglob(EXCHANGE_KEY_FILE)):
            path.unlink(missing_ok=True)
            with suppress(OSError):  # other files are in it, or it is gone
                path.parent.rmdir()


# -------------------------------------------------------------------------------------------------------------- files
def _as_pem(key: Ed25519PrivateKey | X25519PrivateKey) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _read_key(path: Path) -> PrivateKeyTypes:
    """Read a key of any kind.

    Raises:
        ValueError: It is damaged.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        return load_pem_private_key(path.read_bytes(), password=None)
    except (TypeError, UnsupportedAlgorithm) as error:  # the former: it has a password
        raise ValueError(str(error)) from error
