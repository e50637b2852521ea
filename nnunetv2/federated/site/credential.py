"""Load and save the credential of a site, and make its token.

credential   ~/.config/nnunet/federated_site.json, or the file in nnUNet_fed_site; only its owner can read it
authority    the same with .ca.pem at its end: who vouches for the coordinator, where no public authority does

Where sites aggregate securely, `identity.py` and `roster.py` keep further files beside it.
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nnunetv2.federated.errors import FederationError, NotJoinedError
from nnunetv2.federated.protocol.certificates import only_certificate
from nnunetv2.federated.site.private_files import write_private

if TYPE_CHECKING:
    from nnunetv2.federated.protocol.api import FederationSettings
    from nnunetv2.federated.protocol.messages import Networks, Precision

CREDENTIAL_VERSION = 2
ENGINE_VERSION = 3
"""Of a credential for the gateway of an engine, which earlier versions would take for a coordinator."""
CREDENTIAL_VARIABLE = "nnUNet_fed_site"
OPERATOR_FILE = "operator.json"
"""Credential of the operator on the coordinator's machine, in the federation's folder."""
TOKEN_BYTES = 32


@dataclass(frozen=True)
class SiteCredential:
    """A site's identity, its proof, and the coordinator that both are for."""

    url: str
    """Where the coordinator is, such as https://coordinator.example:8750."""
    federation: str
    site: str
    token: str
    """The bearer token `<site>.<secret>`; its holder counts as the site."""
    insecure: bool = False
    """Whether someone has allowed plain HTTP beyond this machine."""
    authority: str | None = None
    """File with the private authority that vouches for the coordinator; nobody else is trusted then."""
    client_certificate: str | None = None
    """File with the certificate that this site shows, where the coordinator asks for one."""
    client_key: str | None = None
    """File with its key; None if that is in the same file."""
    joined_with: str | None = None
    """SHA-256 of the invitation's secret: a new invitation asks for a new token."""
    precision: Precision | None = None
    """How weights travel in this federation, where that is not float32."""
    secure: int | None = None
    """From how many sites on this federation sums behind masks, as it was when this site joined; None: in clear."""
    networks: Networks | None = None
    """Whether sites have networks of their own in this federation, where they have."""
    labels: Literal["union"] | None = None
    """Set where the sites of this federation may annotate different classes."""
    through: str | None = None
    """The engine that carries everything to the coordinator, `nvflare:<project>/<federation>`; `url` is its gateway on
    this machine then, at another port for each job. None: `url` is the coordinator."""

    @property
    def coordinator(self) -> str:
        """The name of the coordinator in allow-lists, the same for every job of an engine."""
        return self.through or self.url

    def agreeing_with(self, settings: FederationSettings) -> SiteCredential:
        """Return the credential with the settings that commands of its site read from it."""
        return replace(
            self,
            precision=None if settings.precision == "float32" else settings.precision,
            networks=None if settings.networks == "equal" else settings.networks,
            labels=None if settings.labels == "equal" else settings.labels,
            secure=None if settings.secure is None else settings.secure.k,
        )

    def __repr__(self) -> str:
        return f"SiteCredential(url={self.url!r}, federation={self.federation!r}, site={self.site!r}, token=...)"


def credential_path() -> Path:
    """Return the file of this site's credential."""
    chosen = os.environ.get(CREDENTIAL_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path.home() / ".config" / "nnunet" / "federated_site.json"


def load_credential(path: Path | None = None) -> SiteCredential:
    """Read the credential of this site.

    Raises:
        NotJoinedError: There is none, or it cannot be read.
    """
    path = path or credential_path()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotJoinedError(
            f"this site has not joined a federation: {path} does not exist. Run nnUNetv2_fed_join "
            "with the invitation from the coordinating site, or let the environment variable "
            f"{CREDENTIAL_VARIABLE} name the credential"
        ) from None
    except (OSError, ValueError) as error:
        raise NotJoinedError(f"the credential {path} cannot be read: {error}") from error
    needed, known = {"url", "federation", "site", "token"}, {field.name for field in fields(SiteCredential)}
    version = content.pop("version", None) if isinstance(content, dict) else None
    if version not in (1, CREDENTIAL_VERSION, ENGINE_VERSION) or not needed <= content.keys() <= known:
        raise NotJoinedError(
            f"the credential {path} is not of version {CREDENTIAL_VERSION} or {ENGINE_VERSION}: "
            "join again with a new invitation and --replace"
        )
    if content.get("authority"):
        _check_authority(Path(content["authority"]), path)
    return SiteCredential(**content)


def _check_authority(authority: Path, credential: Path) -> None:
    """Check that a credential trusts one authority alone.

    TLS would trust every further certificate in the file.

    Earlier versions kept everything that the coordinator's address had answered when a site joined.
    """
    if not authority.is_file():
        raise NotJoinedError(
            f"{authority} is missing: it says who vouches for the coordinator, and belongs "
            f"to the credential {credential}. Bring it back, or join again with a new invitation and "
            "--replace"
        )
    try:
        only_certificate(authority.read_text(encoding="ascii"))
    except (OSError, ValueError, FederationError) as error:
        raise NotJoinedError(
            f"{authority} does not hold the coordinator's authority alone ({error}), so that somebody "
            "in between may be believed: ask the coordinating site to revoke this site's credential, "
            "and join again with a new invitation and --replace"
        ) from error


def save_credential(credential: SiteCredential, path: Path | None = None) -> Path:
    """Write the credential atomically, readable by its owner only, and return its path."""
    path = path or credential_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {name: value for name, value in asdict(credential).items() if value is not None}
    version = CREDENTIAL_VERSION if credential.through is None else ENGINE_VERSION
    write_private(path, json.dumps({"version": version, **known}, indent=4).encode())
    return path


def new_token(site: str) -> str:
    """Make the secret token of a site."""
    return f"{site}.{secrets.token_urlsafe(TOKEN_BYTES)}"
