"""Provide a certificate: the operator's own, or one of a private authority.

    <folder>/tls/ca.pem      the private authority; its fingerprint is in every invitation, so sites trust nothing else
    <folder>/tls/ca.key      its key, readable by its owner only
    <folder>/tls/server.pem  the coordinator's certificate, made anew before it expires or when the address changes
    <folder>/tls/server.key
    <folder>/clients.pem     with --client-authority, while the coordinator runs: all that clients are known by
    <folder>/operator.pem    and the certificate of the operator on this machine, made anew by each start
    <folder>/operator.key

Certificates are made by the `openssl` command, which comes with every server: no package is needed for them.
"""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path

from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.protocol.certificates import check_authorities, check_chain, fingerprint_of
from nnunetv2.utilities.atomic_write import replacing, save_json_atomically

AUTHORITY_DAYS = 3650
CERTIFICATE_DAYS = 397
"""The most that browsers accept."""
RENEWED_BEFORE_S = 60 * 86_400
"""Time left at which a start makes a new certificate."""
OPENSSL_TIMEOUT_S = 60.0
OF_THIS_START = ("operator.pem", "operator.key", "clients.pem")
"""Files of no use when the coordinator has stopped."""
BACKDATED_S = 86_400
"""By how much certificates are dated back: the clocks of sites may lag behind."""
_CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


@dataclass(frozen=True)
class Certificate:
    """The files with which a server speaks TLS."""

    certificate: Path
    key: Path
    authority: Path | None = None
    """The private authority that sites have to know; None where any public one will do."""
    clients: Path | None = None
    """Authorities of the certificates that everybody has to show; None where nobody needs one."""
    operator: tuple[Path, Path] | None = None
    """Certificate and key for the operator on this machine, where everybody has to show one."""


def private_certificate(folder: Path, hosts: Sequence[str], *, now: float | None = None) -> Certificate:
    """Return a certificate for the names and addresses of a coordinator, from its private authority.

    Args:
        folder: Where authority and certificate are kept; both are made if they are missing or of no use any more.
        hosts: Names and IP addresses under which sites reach the coordinator.

    Raises:
        FederationError: There is no `openssl` command, or it fails.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    authority, authority_key = folder / "ca.pem", folder / "ca.key"
    if not (authority.exists() and authority_key.exists()):
        _make_authority(authority, authority_key)
    made = Certificate(folder / "server.pem", folder / "server.key", authority)
    hosts = sorted({*hosts, "localhost", "127.0.0.1"})
    now = time.time() if now is None else now
    if not _is_good(folder / "server.json", made, hosts, now):
        _make_certificate(made, authority_key, hosts)
        expires = now + CERTIFICATE_DAYS * 86_400
        save_json_atomically(
            {"hosts": hosts, "expires": expires, "authority": fingerprint(authority)}, folder / "server.json"
        )
    return made


def given_certificate(certificate: Path, key: Path) -> Certificate:
    """Return a certificate that the operator has brought along.

    Raises:
        FederationError: The files do not exist or do not belong together.
    """
    for path in (certificate, key):
        if not path.is_file():
            raise FederationError(f"{path} does not exist: expected a certificate or key in PEM format")
    check_chain(certificate, key)
    return Certificate(certificate, key)


def require_clients_of(certificate: Certificate, authority: Path, folder: Path) -> Certificate:
    """Return a certificate whose server asks everybody for one of an authority.

    The operator on this machine has none of it, and gets one that is made here and can vouch for nobody else.

    Args:
        folder: Where the operator's certificate is kept, outside of backups; each start makes another one.

    Raises:
        FederationError: The file is missing, or holds anything but certificates, all of which would be trusted.
    """
    try:
        authorities = authority.read_text(encoding="utf-8")
        check_authorities(authorities)
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(authority)
    except (OSError, ValueError, FederationError) as error:
        raise FederationError(
            f"--client-authority {authority} cannot be used: {error}. Expected the certificate of "
            "the authority of the sites' certificates in PEM format, and nothing else; --client-authority none asks "
            "nobody for one"
        ) from error
    own, key, clients = (folder / name for name in OF_THIS_START)
    _make_pair(own, key, name="operator on this machine", extensions=_OPERATOR, days=AUTHORITY_DAYS)
    with replacing(clients) as partial:
        partial.write_text(f"{authorities.rstrip()}\n{own.read_text(encoding='ascii')}", encoding="utf-8")
    return replace(certificate, clients=clients, operator=(own, key))


def fingerprint(certificate: Path) -> str:
    """Return the SHA-256 of the one certificate in a PEM file, as 64 hexadecimal digits.

    Raises:
        FederationError: The file does not hold one certificate alone.
    """
    try:
        return fingerprint_of(certificate.read_text(encoding="ascii"))
    except (ValueError, FederationError) as error:
        raise FederationError(
            f"{certificate}: {error}. Sites know this authority by its fingerprint: bring the file back as it was made"
        ) from error


# --------------------------------------------------------------------------------------------------------- making
def _make_authority(certificate: Path, key: Path) -> None:
    extensions = "basicConstraints=critical,CA:TRUE,pathlen:0\nkeyUsage=critical,keyCertSign,cRLSign\n"
    _make_pair(certificate, key, name="authority", extensions=extensions, days=AUTHORITY_DAYS)


def _make_certificate(made: Certificate, authority_key: Path, hosts: Sequence[str]) -> None:
    assert made.authority is not None, "a certificate that is made here is of the private authority"
    names = ",".join(f"{'IP' if _is_address(host) else 'DNS'}:{host}" for host in hosts)
    extensions = (
        f"subjectAltName={names}\nbasicConstraints=critical,CA:FALSE\n"
        "keyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth\n"
    )
    _make_pair(
        made.certificate,
        made.key,
        name="coordinator",
        extensions=extensions,
        days=CERTIFICATE_DAYS,
        signed_by=(made.authority, authority_key),
    )


# Without keyUsage: OpenSSL 1.1 takes a certificate for self-signed only if its key may sign certificates.
_OPERATOR = "basicConstraints=critical,CA:FALSE\nextendedKeyUsage=clientAuth\n"


def _make_pair(
    certificate: Path, key: Path, *, name: str, extensions: str, days: int, signed_by: tuple[Path, Path] | None = None
) -> None:
    """Make a key and its certificate.

    Args:
        signed_by: Certificate and key of the authority; None: the certificate signs itself.
    """
    with replacing(key) as new_key, replacing(certificate) as new_certificate:
        request = new_key.with_suffix(".csr")
        _openssl("req", *_CURVE, "-subj", f"/CN=nnU-Net federation {name}", "-keyout", new_key, "-out", request)
        authority, authority_key = (None, new_key) if signed_by is None else signed_by
        _sign(request, new_certificate, key=authority_key, authority=authority, extensions=extensions, days=days)
        request.unlink()
        new_key.chmod(0o600)


def _sign(request: Path, certificate: Path, *, key: Path, authority: Path | None, extensions: str, days: int) -> None:
    """Make a certificate of a request, valid since a day ago.

    By `openssl ca`, which lets a certificate begin when it is told to; `x509` and `req` do so in OpenSSL 3.4 only.

    Args:
        authority: Certificate of the authority; None where it signs itself.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "index.txt").touch()
        (folder / "extensions").write_text(extensions, encoding="ascii")
        (folder / "config").write_text(_AUTHORITY_CONFIG.format(folder=folder.as_posix()), encoding="utf-8")
        now = time.time()
        signed_by = ("-selfsign",) if authority is None else ("-cert", authority)
        dates = [
            time.strftime("%Y%m%d%H%M%SZ", time.gmtime(moment)) for moment in (now - BACKDATED_S, now + days * 86_400)
        ]
        _openssl(
            "ca",
            "-batch",
            "-notext",
            "-config",
            folder / "config",
            "-keyfile",
            key,
            *signed_by,
            "-in",
            request,
            "-startdate",
            dates[0],
            "-enddate",
            dates[1],
            "-extfile",
            folder / "extensions",
            "-out",
            certificate,
        )


_AUTHORITY_CONFIG = """[ca]
default_ca = federation
[federation]
new_certs_dir = {folder}
database = {folder}/index.txt
rand_serial = yes
default_md = sha256
policy = any
unique_subject = no
[any]
commonName = supplied
"""


def _is_good(record: Path, made: Certificate, hosts: Sequence[str], now: float) -> bool:
    """Return whether the certificate covers the hosts, fits its authority, and lasts."""
    if not (record.exists() and made.certificate.exists() and made.key.exists()):
        return False
    content = json.loads(record.read_text(encoding="utf-8"))
    assert made.authority is not None, "a certificate that is made here is of the private authority"
    return bool(
        content["hosts"] == list(hosts)
        and content["authority"] == fingerprint(made.authority)
        and now < content["expires"] - RENEWED_BEFORE_S
    )


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _openssl(*arguments: str | Path) -> None:
    command = shutil.which("openssl")
    if command is None:
        raise FederationError(
            "a private certificate needs the command openssl, which is not installed: install it; without "
            "--client-authority, you can also give a certificate (--tls-certificate, --tls-key), or put a proxy with "
            "TLS in front"
        )
    done = subprocess.run(
        [command, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=OPENSSL_TIMEOUT_S
    )
    if done.returncode != 0:
        raise FederationError(f"openssl {arguments[0]} failed: {done.stderr.strip()[-500:]}")
