"""Create or reopen a federation's folder and serve it."""

from __future__ import annotations

import argparse
import io
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from nnunetv2.federated.commands.coordinator_options import build_parser
from nnunetv2.federated.coordinator.http.listen_address import ListenAddress, open_socket, settle_address, tls_options
from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.privacy.cryptography_library import require_cryptography
from nnunetv2.federated.protocol.invitation import check_site_name
from nnunetv2.federated.protocol.rounds import DEFAULT_EPOCHS
from nnunetv2.federated.site.credential import OPERATOR_FILE, SiteCredential, new_token, save_credential
from nnunetv2.utilities.plain_text import shell_command, show

if TYPE_CHECKING:
    import socket

    from nnunetv2.federated.coordinator.http.endpoint import Endpoint
    from nnunetv2.federated.coordinator.http.tls import Certificate
    from nnunetv2.federated.coordinator.service import Coordinator
    from nnunetv2.federated.coordinator.storage.store import Store
    from nnunetv2.federated.protocol.api import FederationSettings, Secure

DEFAULT_SITES = ("site1", "site2", "site3")
STATE_FILE = "coordinator.json"
STOP_TIMEOUT_S = 5
"""Seconds that downloads may still take after the coordinator was told to stop; sites resume them."""


# -------------------------------------------------------------------------------------------------------- settings
def given_settings(arguments: argparse.Namespace) -> dict[str, object]:
    """Return the settings that were given on the command line, by their names in FederationSettings."""
    from nnunetv2.federated.coordinator.founding import SETTINGS_OF_OPTIONS

    given = {
        SETTINGS_OF_OPTIONS[option]: value
        for option, value in vars(arguments).items()
        if option in SETTINGS_OF_OPTIONS and value is not None
    }
    if "secure" in given:
        given["secure"] = secure_settings(arguments)
    if "initial_weights" in given:
        given["initial_weights"] = digest_of_weights(arguments.initial_weights)
    if "sites" in given:
        given["sites"] = tuple(sorted(check_site_name(name) for name in given["sites"]))
    return given


def secure_settings(arguments: argparse.Namespace) -> Secure:
    """Return how updates are masked, as the command line says."""
    from nnunetv2.federated.protocol.api import Secure
    from nnunetv2.federated.protocol.strict_json import validated

    require_cryptography("--secure")
    return validated(lambda: Secure(k=arguments.secure), "--secure")


def digest_of_weights(path: Path) -> str:
    """Return the SHA-256 of a checkpoint that is to be handed to all sites."""
    from nnunetv2.federated.protocol.document import file_digest

    if not path.is_file():
        raise FederationError(
            f"there are no initial weights {path}. A federation that exists keeps a copy: leave the option out there"
        )
    return file_digest(path)


def new_settings(given: dict[str, object], folder: Path) -> FederationSettings:
    """Return the settings of a new federation in a folder."""
    from nnunetv2.federated.coordinator.founding import check_settings, with_implied
    from nnunetv2.federated.protocol.api import FederationSettings
    from nnunetv2.federated.protocol.strict_json import validated

    if "sites" not in given:
        given = {**given, "sites": ask_for_sites(folder)}
    given = with_implied(given, k=getattr(given.get("secure"), "k", None))
    values = {"federation": f"federation-{secrets.token_hex(4)}", "num_epochs": DEFAULT_EPOCHS, **given}
    settings = validated(lambda: FederationSettings.model_validate(values), "the command line")
    check_settings(settings)
    return settings


def ask_for_sites(folder: Path) -> tuple[str, ...]:
    """Ask the person at the terminal for the sites' names.

    Without an answer, use the default.

    Raises:
        FederationError: There is nobody to ask. A folder that was mistyped becomes no federation.
    """
    if not sys.stdin.isatty():
        raise FederationError(
            f"{folder} holds no federation yet: name its sites to found one, for example "
            "--sites north south west, or choose the --folder that holds one"
        )
    question = f"Names of the sites, with blanks between them [{' '.join(DEFAULT_SITES)}]: "
    words = input(question).replace(",", " ").split()
    if not words:
        log(f"the sites are called {', '.join(DEFAULT_SITES)}; choose other names with --sites and another --folder")
    return tuple(sorted(check_site_name(word) for word in words or DEFAULT_SITES))


def open_federation(
    store: Store, given: dict[str, object], *, initial_weights: Path | None = None
) -> FederationSettings:
    """Return the settings of the federation in a folder.

    It is created if there is none.

    Args:
        initial_weights: The checkpoint whose digest is in `given`.
    """
    from nnunetv2.federated.coordinator.founding import check_membership, settle

    def found(given: dict[str, object]) -> FederationSettings:
        settings = new_settings(given, store.folder)
        if initial_weights is not None and settings.initial_weights is not None:
            from nnunetv2.federated.coordinator.models.checkpoint_reader import write_weights

            target = store.given_path(settings.initial_weights)
            target.parent.mkdir(mode=0o700, exist_ok=True)
            write_weights(initial_weights, target, settings.precision)
        return settings

    check_membership(store, "invitations")
    return settle(store, given, found=found, membership="invitations", log=log)


# ----------------------------------------------------------------------------------------------------------- serve
def log(line: str) -> None:
    """Show a line to the person at the coordinator, with the time.

    Sites do not suffer from a log that is full.
    """
    with suppress(OSError, ValueError):
        show(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}", flush=True)


def print_invitations(coordinator: Coordinator, endpoint: Endpoint) -> None:
    """Print the join command of every member that has not joined."""
    members, federation = coordinator.members, coordinator.settings.federation
    invitations = members.open_invitations(time.time())
    with suppress(OSError):
        if invitations:
            show("Send each site its own line; a line is good for one site, once, until it expires:")
        for record in invitations:
            assert record.secret is not None, "an open invitation has its secret"
            invitation = endpoint.invitation(
                federation, record.member, record.secret, with_identity=members.needs_identity(record.member)
            )
            show(f"  {record.member}:  {shell_command('nnUNetv2_fed_join', invitation)}")
        sys.stdout.flush()


def serve(store: Store, listener: socket.socket, address: ListenAddress, certificate: Certificate | None) -> None:
    """Serve a federation until a signal says to stop."""
    from nnunetv2.federated.coordinator.app import build_app
    from nnunetv2.federated.coordinator.http.connections import GuardedServer, allow_many_files, guarded_config
    from nnunetv2.federated.coordinator.http.endpoint import Endpoint
    from nnunetv2.federated.coordinator.http.rate_limits import Limits
    from nnunetv2.federated.coordinator.http.tls import OF_THIS_START
    from nnunetv2.federated.coordinator.malloc import return_what_is_freed
    from nnunetv2.federated.coordinator.service import Coordinator
    from nnunetv2.federated.protocol.certificates import only_certificate

    return_what_is_freed()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names and reasons come from anywhere
    private = (
        only_certificate(certificate.authority.read_text(encoding="ascii"))
        if certificate and certificate.authority
        else None
    )
    endpoint = Endpoint(address.public_url, private)
    coordinator = Coordinator(store, log=log)
    app = build_app(coordinator, endpoint)

    class Server(GuardedServer):
        """Let waiting requests go at once when a signal comes, and say where the server is once it is up."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            settings = coordinator.settings
            print_invitations(coordinator, endpoint)
            log(
                f"{settings.federation} with {', '.join(settings.sites)} is served at {endpoint.url}; "
                f"folder {store.folder}"
            )
            try:
                with trouble_names(store.folder):
                    write_state_file(store.folder, endpoint.url)
                    appoint_operator(coordinator, address, certificate)
            except FederationError:
                await self.shutdown(sockets)
                raise

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            coordinator.notifier.stop()
            super().handle_exit(sig, frame)

    config = guarded_config(app, timeout_graceful_shutdown=STOP_TIMEOUT_S, **tls_options(certificate))
    try:
        with harmless_signals():
            Server(config, Limits().within_files(allow_many_files())).run(sockets=[listener])
    finally:
        with trouble_names(store.folder):
            for name in (STATE_FILE, OPERATOR_FILE, *OF_THIS_START):
                (store.folder / name).unlink(missing_ok=True)
        log("the coordinator has stopped")


def appoint_operator(coordinator: Coordinator, address: ListenAddress, certificate: Certificate | None) -> None:
    """Write the credential with which nnUNetv2_fed_admin on this machine operates the federation."""
    from nnunetv2.federated.coordinator.members import LOCAL_OPERATOR

    token = new_token(LOCAL_OPERATOR)
    coordinator.members.appoint_local_operator(token)
    authority = str(certificate.authority) if certificate and certificate.authority else None
    own, key = map(str, certificate.operator) if certificate and certificate.operator else (None, None)
    save_credential(
        SiteCredential(
            address.local_url,
            coordinator.settings.federation,
            LOCAL_OPERATOR,
            token,
            insecure=address.insecure,
            authority=authority,
            client_certificate=own,
            client_key=key,
        ),
        coordinator.state.store.folder / OPERATOR_FILE,
    )


@contextmanager
def harmless_signals() -> Iterator[None]:
    """Make SIGINT and SIGTERM do nothing.

    uvicorn acts on them itself, stops, and then raises them once more.
    """
    signals = (signal.SIGINT, signal.SIGTERM)
    earlier = [signal.signal(number, lambda *_: None) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, earlier):
            signal.signal(number, handler)


@contextmanager
def trouble_names(folder: Path) -> Iterator[None]:
    """Turn trouble with a folder's files into a FederationError with a remedy."""
    try:
        yield
    except OSError as error:
        raise FederationError(
            f"the federation in the folder {folder} cannot be written: {error}. Make room on its "
            "disk, let this user write there, or choose another --folder"
        ) from error


def write_state_file(folder: Path, url: str) -> None:
    """Let other programs on this machine know where the coordinator is."""
    from nnunetv2.utilities.atomic_write import replacing

    with replacing(folder / STATE_FILE) as partial:
        partial.write_text(json.dumps({"url": url, "pid": os.getpid()}), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `nnUNetv2_fed_coordinator`."""
    arguments = build_parser().parse_args(argv)
    from nnunetv2.federated.coordinator.storage.store import Store

    folder = arguments.folder.resolve()
    with trouble_names(folder):
        store = Store(folder)
    with store:
        with trouble_names(folder):
            open_federation(store, given_settings(arguments), initial_weights=arguments.initial_weights)
        before = store.load_meta("address") or {}
        address = settle_address(before, arguments)
        with open_socket(address.host, address.port) as listener:
            address = replace(address, port=listener.getsockname()[1])
            with trouble_names(folder):
                certificate = address.certificate(folder)
                store.save_meta("address", asdict(address))  # now that it works: later starts rely on it
            log_protection(address, was_insecure=bool(before.get("insecure")))
            serve(store, listener, address, certificate)
    return 0


def log_protection(address: ListenAddress, *, was_insecure: bool) -> None:
    """Log that connections are not encrypted, or that they are now, unlike before."""
    if address.is_exposed:
        log(
            f"connections to {address.host} are not encrypted (--insecure). Later starts keep to that for this --host "
            "and --url; --no-insecure ends it"
        )
    elif was_insecure and address.speaks_tls:
        log(
            "the coordinator speaks TLS now: --insecure was given for another address. If this network is protected "
            "too, start again with --insecure"
        )


def coordinator_entry() -> None:
    """Entry point of the console script."""
    from nnunetv2.utilities.command_line import run_command

    run_command(main)
