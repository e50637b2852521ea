"""Settle a coordinator's listening address, public URL and TLS."""

from __future__ import annotations

import argparse
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nnunetv2.federated.coordinator.http.tls import (
    Certificate,
    given_certificate,
    private_certificate,
    require_clients_of,
)
from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.protocol.invitation import check_url
from nnunetv2.utilities.loopback import is_loopback

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8750
NOTHING = "none"
"""Word that takes a remembered file or address back, on the command line."""
_CAN_BE_TAKEN_BACK = ("url", "tls_certificate", "tls_key", "client_authority")


def open_socket(host: str, port: int) -> socket.socket:
    """Return a listening socket."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY where it sees this protocol. Without it, each answer waits 40 ms for an acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except (OSError, TypeError) as error:  # the latter for a text that can be no host name
        listener.close()
        raise FederationError(
            f"cannot listen on {host[:200]}:{port}: {getattr(error, 'strerror', None) or error}. Choose another --host "
            "or --port"
        ) from error
    return listener


@dataclass(frozen=True, kw_only=True)
class ListenAddress:
    """Listening address, public URL and TLS of a coordinator; kept between starts."""

    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    url: str | None = None
    tls: bool = False
    insecure: bool = False
    tls_certificate: str | None = None
    tls_key: str | None = None
    client_authority: str | None = None

    def __post_init__(self) -> None:
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise FederationError(f"--tls-certificate and --tls-key go together, {NOTHING} with {NOTHING}")
        if self.client_authority and not self.speaks_tls:
            raise FederationError(
                "--client-authority needs TLS: give --tls, --tls-certificate and --tls-key, or a --host beyond this "
                f"machine; or --client-authority {NOTHING}"
            )
        if self.host in ("0.0.0.0", "::", "") and self.url is None:
            raise FederationError(
                f"--host {self.host} listens everywhere: say with --url how sites reach this "
                "coordinator, such as https://coordinator.example:8750"
            )

        if self.url is not None and check_url(self.url).startswith("http:") and self.speaks_tls:
            raise FederationError(
                f"--url {self.url} is plain HTTP, but the coordinator speaks TLS: give an https address; --no-tls on "
                "this machine; or --insecure, at every change of the address, where the network itself is protected"
            )

    @property
    def speaks_tls(self) -> bool:
        """Whether the coordinator itself encrypts: where it is told to, and beyond this machine."""
        return self.tls or bool(self.tls_certificate) or not (is_loopback(self.host) or self.insecure)

    @property
    def is_exposed(self) -> bool:
        """Whether other machines connect without encryption."""
        return not (self.speaks_tls or is_loopback(self.host))

    @property
    def public_url(self) -> str:
        """The address that goes into invitations."""
        if self.url is not None:
            return check_url(self.url)
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.speaks_tls else 'http'}://{host}:{self.port}"

    @property
    def local_url(self) -> str:
        """The address for programs on this machine.

        A given certificate is good for the public address only.
        """
        if self.tls_certificate:
            return self.public_url
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::", "") else self.host
        return replace(self, host=host, url=None, tls=self.speaks_tls).public_url

    def certificate(self, folder: Path) -> Certificate | None:
        """Return the certificate for TLS, made on the first start; None without TLS."""
        if not self.speaks_tls:
            return None
        if self.tls_certificate and self.tls_key:
            certificate = given_certificate(Path(self.tls_certificate), Path(self.tls_key))
        else:
            hosts = {self.host, urlsplit(self.public_url).hostname or ""} - {"0.0.0.0", "::", ""}
            certificate = private_certificate(folder / "tls", sorted(hosts))
        if self.client_authority is None:
            return certificate
        return require_clients_of(certificate, Path(self.client_authority), folder)


def settle_address(stored: Mapping[str, Any], arguments: argparse.Namespace) -> ListenAddress:
    """Merge the options of a start into the stored address.

    But `insecure` holds for one address: another host or public URL needs a new decision.

    Raises:
        FederationError: The options contradict each other, or those of earlier starts.
    """
    known = {field.name for field in fields(ListenAddress)}
    before = {name: value for name, value in stored.items() if name in known}
    given = {
        name: _settled(name, value) for name, value in vars(arguments).items() if name in known and value is not None
    }
    if any(name in given and given[name] != before.get(name) for name in ("host", "url")):
        before.pop("insecure", None)
    address = ListenAddress(**{**before, **given})
    if given.get("tls") is False and address.speaks_tls:
        why = "it has a certificate" if address.tls_certificate else f"--host {address.host} is beyond this machine"
        raise FederationError(
            f"--no-tls: the coordinator still speaks TLS, since {why}. Give --tls-certificate {NOTHING} --tls-key "
            f"{NOTHING}, --host {DEFAULT_HOST}, or, where the network itself is protected, --insecure"
        )
    return address


def _settled(name: str, value: Any) -> Any:
    """Return an option's value as it is kept.

    Files are absolute paths; an option that was taken back is None.
    """
    if name in _CAN_BE_TAKEN_BACK and value == NOTHING:
        return None
    return str(value.resolve()) if isinstance(value, Path) else value


def tls_options(certificate: Certificate | None) -> dict[str, object]:
    """Return uvicorn's options for a certificate."""
    if certificate is None:
        return {}
    options: dict[str, object] = {"ssl_certfile": str(certificate.certificate), "ssl_keyfile": str(certificate.key)}
    if certificate.clients is not None:
        options |= {"ssl_ca_certs": str(certificate.clients), "ssl_cert_reqs": ssl.CERT_REQUIRED}
    return options
