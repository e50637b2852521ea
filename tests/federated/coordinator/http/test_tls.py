"""Certificates of a coordinator."""

import hashlib
import http.client
import json
import signal
import ssl
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import requests
from fake_federation import PROJECT, coordinator_process, make_census, make_client, wait_until
from patience import MUCH_LONGER_S, PATIENCE_S

from nnunetv2.federated.commands.api_client import ask
from nnunetv2.federated.coordinator.http import tls
from nnunetv2.federated.errors import CoordinatorUnreachable, FederationError
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.certificates import fingerprint_of, only_certificate
from nnunetv2.federated.protocol.document import write_document
from nnunetv2.federated.protocol.keys import CensusKey
from nnunetv2.federated.site.credential import load_credential


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tls.private_certificate(tmp_path_factory.mktemp("tls"), ["coordinator.example", "10.1.2.3"], now=1000.0)


def serve_once(certificate) -> int:
    """Answer TLS handshakes on a free port until one has been answered; return the port."""
    import socket

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.certificate, certificate.key)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    def answer():
        with listener:
            connection, _ = listener.accept()
            try:
                with context.wrap_socket(connection, server_side=True) as secure:
                    secure.recv(1000)
                    secure.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
            except ssl.SSLError:
                pass  # the client did not trust us

    threading.Thread(target=answer, daemon=True).start()
    return port


def test_a_site_that_knows_the_authority_trusts_the_coordinator(made):
    context = ssl.create_default_context(cafile=str(made.authority))
    connection = http.client.HTTPSConnection("127.0.0.1", serve_once(made), context=context, timeout=PATIENCE_S)
    connection.request("GET", "/")
    assert connection.getresponse().status == 204
    connection.close()


def test_nobody_else_does(made):
    connection = http.client.HTTPSConnection("127.0.0.1", serve_once(made), timeout=PATIENCE_S)
    with pytest.raises(ssl.SSLCertVerificationError):
        connection.request("GET", "/")
    connection.close()


def test_keys_are_private(made):
    for path in (made.key, made.authority.with_name("ca.key")):
        assert path.stat().st_mode & 0o077 == 0


def test_a_certificate_is_kept_until_it_nears_its_end_or_the_address_changes(tmp_path):
    first = tls.private_certificate(tmp_path, ["a.example"], now=0.0)
    content, authority = first.certificate.read_bytes(), tls.fingerprint(first.authority)
    assert tls.private_certificate(tmp_path, ["a.example"], now=1000.0).certificate.read_bytes() == content
    later = tls.CERTIFICATE_DAYS * 86_400 - tls.RENEWED_BEFORE_S + 1.0
    renewed = tls.private_certificate(tmp_path, ["a.example"], now=later).certificate.read_bytes()
    assert renewed != content
    assert tls.private_certificate(tmp_path, ["b.example"], now=later).certificate.read_bytes() != renewed
    assert tls.fingerprint(first.authority) == authority  # what sites have pinned stays


def test_a_fingerprint_is_what_openssl_shows(made):
    shown = ssl.PEM_cert_to_DER_cert(made.authority.read_text())
    import hashlib

    assert tls.fingerprint(made.authority) == hashlib.sha256(shown).hexdigest()
    with pytest.raises(FederationError, match="no certificate"):
        fingerprint_of("-----BEGIN NONSENSE-----")


def test_a_certificate_is_one_block_and_nothing_else(made):
    pem = made.authority.read_text()
    assert only_certificate(f"\n{pem}\n") == pem
    der = ssl.PEM_cert_to_DER_cert(pem)
    for text, words in (
        (pem + made.certificate.read_text(), "found 2 blocks"),
        (f"subject=/CN=a\n{pem}", "text beside it"),
        (pem.replace("CERTIFICATE", "TRUSTED CERTIFICATE"), "no certificate"),
        (made.authority.with_name("ca.key").read_text(), "no certificate"),
        (ssl.DER_cert_to_PEM_cert(der + b"more"), "more follows in its block"),
        (ssl.DER_cert_to_PEM_cert(der[:-1]), "is cut off"),
        (ssl.DER_cert_to_PEM_cert(b""), "no certificate"),
        (pem.replace("M", "*"), "no certificate"),
    ):
        for read in (only_certificate, fingerprint_of):
            with pytest.raises(FederationError, match=words):
                read(text)


def test_an_authority_that_was_added_to_stops_the_start(made, tmp_path):
    tls.private_certificate(tmp_path, ["a.example"])
    with (tmp_path / "ca.pem").open("a") as file:
        file.write(made.authority.read_text())
    with pytest.raises(FederationError, match=r"ca\.pem: expected one certificate"):
        tls.private_certificate(tmp_path, ["a.example"])


def test_clients_are_known_by_certificates_and_nothing_else(made, tmp_path):
    chain = tmp_path / "chain.pem"
    chain.write_text(f"the authority\n{made.authority.read_text()}and one below it\n{made.certificate.read_text()}")
    required = tls.require_clients_of(made, chain, tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_verify_locations(required.clients)
    assert context.cert_store_stats()["x509"] == 3, "the authority, one below it, and the operator on this machine"
    authority = made.authority.read_text()
    for content, words in (
        (authority + made.key.read_text(), "PRIVATE KEY"),
        (authority + authority.replace("CERTIFICATE", "TRUSTED CERTIFICATE"), "TRUSTED CERTIFICATE"),
        ("", "no certificate"),
        (authority[:100], "no certificate"),
        (authority + authority[:100], "no certificate"),
    ):
        chain.write_text(content)
        with pytest.raises(FederationError, match=rf"--client-authority .*chain\.pem cannot be used: .*{words}"):
            tls.require_clients_of(made, chain, tmp_path)
    with pytest.raises(FederationError, match="missing"):
        tls.require_clients_of(made, tmp_path / "missing.pem", tmp_path)


def test_nobody_is_asked_for_a_password(made, tmp_path):
    import subprocess

    locked = tmp_path / "locked.key"
    subprocess.run(
        ["openssl", "pkey", "-in", made.key, "-aes128", "-passout", "pass:secret", "-out", locked],
        check=True,
        capture_output=True,
    )
    with pytest.raises(FederationError, match=r"locked\.key cannot be used for TLS: the key has a password"):
        tls.given_certificate(made.certificate, locked)


def test_given_files_are_checked(made, tmp_path):
    assert tls.given_certificate(made.certificate, made.key).authority is None
    with pytest.raises(FederationError, match="does not exist"):
        tls.given_certificate(tmp_path / "missing.pem", made.key)
    with pytest.raises(FederationError, match="cannot be used for TLS"):
        tls.given_certificate(made.certificate, made.authority.with_name("ca.key"))


def test_without_openssl_the_way_out_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FederationError, match="--tls-certificate"):
        tls.private_certificate(tmp_path / "tls", ["a.example"])


# ------------------------------------------------------------------------------------------------------------- stop
@pytest.mark.slow
def test_a_stop_does_not_wait_for_idle_connections(tmp_path):
    """A client that keeps a connection for its next request does not take part in closing it, as TLS wants it."""
    with coordinator_process(tmp_path / "federation", "--sites", "A", "B", "--tls", grace_s=MUCH_LONGER_S) as process:
        sessions = [requests.Session() for _ in range(3)]
        for session in sessions:
            session.get(
                f"{process.url}/v1/session", verify=tmp_path / "federation" / "tls" / "ca.pem", timeout=PATIENCE_S
            )
        assert process.stop() == 0
        for session in sessions:
            session.close()


@pytest.mark.slow
def test_a_stop_lets_an_upload_end(tmp_path):
    with coordinator_process(tmp_path / "federation", "--sites", "A", "B", "--tls", grace_s=MUCH_LONGER_S) as process:
        token = process.credentials()["A"].token
        write_document(tmp_path / "census", make_census(), {}, [])
        body = (tmp_path / "census").read_bytes()
        context = ssl.create_default_context(cafile=str(tmp_path / "federation" / "tls" / "ca.pem"))
        connection = http.client.HTTPSConnection("127.0.0.1", process.port, context=context, timeout=PATIENCE_S)
        connection.putrequest("PUT", f"/v1/gatherings/{CensusKey()}")
        for name, value in (
            ("Authorization", f"Bearer {token}"),
            ("Content-Length", str(len(body))),
            ("X-Content-SHA256", hashlib.sha256(body).hexdigest()),
        ):
            connection.putheader(name, value)
        connection.endheaders(body[:10])
        wait_until(lambda: any((tmp_path / "federation" / "incoming").iterdir()))
        process.process.send_signal(signal.SIGTERM)
        time.sleep(1.0)
        connection.send(body[10:])
        answer = connection.getresponse()
        assert answer.status == 200 and json.loads(answer.read())["waiting_for"] == ["B"]
        assert process.stop() == 0
        connection.close()


# -------------------------------------------------------------------------------------------- certificates of clients
def signed_pair(folder, name: str, authority: Path, key: Path) -> tuple[Path, Path]:
    """Let an authority sign a certificate for a client, as people do with openssl; return it and its key."""
    certificate, own, request = folder / f"{name}.pem", folder / f"{name}.key", folder / f"{name}.csr"
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    for words in (
        ("req", *curve, "-subj", f"/CN={name}", "-keyout", own, "-out", request),
        ("x509", "-req", "-in", request, "-CA", authority, "-CAkey", key, "-set_serial", "7", "-out", certificate),
    ):
        subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)
    return certificate, own


def command(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the federation in a process of its own."""
    code = f"from nnunetv2.federated.commands import {program}; raise SystemExit({program}.main() or 0)"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=PROJECT)


@pytest.fixture
def guarded(tmp_path):
    """A coordinator that lets only those connect who show a certificate of a hospital's authority."""
    hospital = tls.private_certificate(tmp_path / "hospital", ["hospital.example"]).authority
    folder = tmp_path / "federation"
    with coordinator_process(folder, "--sites", "A", "B", "--tls", "--client-authority", str(hospital)) as process:
        wait_until((folder / "operator.json").exists)
        yield process, hospital


@pytest.mark.slow
def test_the_operator_of_this_machine_operates_where_everybody_shows_a_certificate(guarded, tmp_path):
    process, _ = guarded
    for program, words, shown in (
        ("admin", ("settings",), '"sites": ['),  # what the health check of the container asks
        ("admin", ("invite", "C"), "nnUNetv2_fed_join"),
        ("status", (), "Federation"),
    ):
        done = command(program, "--folder", str(process.folder), *words)
        assert done.returncode == 0 and shown in done.stdout, done.stderr
    key = process.folder / "operator.key"
    assert key.stat().st_mode & 0o077 == 0
    first = key.read_bytes()
    assert process.stop() == 0
    assert not [path.name for path in process.folder.iterdir() if path.suffix in (".pem", ".key")]
    process.options = ()
    process.start()
    wait_until((process.folder / "operator.json").exists)
    assert key.read_bytes() != first, "each start makes another one"
    assert command("admin", "--folder", str(process.folder), "settings").returncode == 0


@pytest.mark.slow
def test_nobody_else_connects_where_everybody_shows_a_certificate(guarded, tmp_path):
    process, hospital = guarded
    operator = load_credential(process.folder / "operator.json")

    def asks_with(certificate, key):
        return ask(
            replace(
                operator,
                client_certificate=None if certificate is None else str(certificate),
                client_key=None if key is None else str(key),
            ),
            "GET",
            "settings",
            FederationSettings,
        )

    stranger = tls.private_certificate(tmp_path / "stranger", ["stranger.example"])
    authority = process.folder / "tls" / "ca.pem"
    own = process.folder / "operator.pem", process.folder / "operator.key"
    for certificate, key in (
        (None, None),
        (stranger.certificate, stranger.key),
        tls.require_clients_of(stranger, hospital, tmp_path).operator,  # by name, it is the operator
        signed_pair(tmp_path, "of-the-coordinator", authority, authority.with_name("ca.key")),
        signed_pair(tmp_path, "of-the-operator", *own),  # whose certificate vouches for nobody
    ):
        with pytest.raises(CoordinatorUnreachable):
            asks_with(certificate, key)
    site = signed_pair(tmp_path, "site", hospital, hospital.with_name("ca.key"))
    assert asks_with(*site).sites == ("A", "B")
    assert asks_with(*own).sites == ("A", "B")


# -------------------------------------------------------------------------------------------------- whom commands trust
@pytest.mark.slow
def test_authorities_are_a_file_or_a_folder(tmp_path, monkeypatch):
    with coordinator_process(tmp_path / "federation", "--sites", "A", "B", "--tls") as process:
        wait_until((process.folder / "operator.json").exists)
        operator = load_credential(process.folder / "operator.json")
        authority = Path(operator.authority)
        show_hash = ["openssl", "x509", "-noout", "-hash", "-in", str(authority)]
        name = subprocess.run(show_hash, check=True, capture_output=True, text=True).stdout.strip()
        (tmp_path / "authorities").mkdir()
        (tmp_path / "authorities" / f"{name}.0").write_bytes(authority.read_bytes())
        trusting = replace(operator, authority=None)
        for bundle in (authority, tmp_path / "authorities"):
            monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(bundle))
            assert ask(trusting, "GET", "settings", FederationSettings).sites == ("A", "B")
        (tmp_path / "empty").mkdir()
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "empty"))
        with pytest.raises(FederationError, match="certificate is not trusted"):
            ask(trusting, "GET", "settings", FederationSettings)
        (tmp_path / "text.pem").write_text("no certificate")
        for bundle in (tmp_path / "missing.pem", tmp_path / "text.pem"):
            monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(bundle))
            with pytest.raises(FederationError, match=f"REQUESTS_CA_BUNDLE, {bundle}, cannot be used") as refusal:
                ask(trusting, "GET", "settings", FederationSettings)
            assert not isinstance(refusal.value, CoordinatorUnreachable)
        with pytest.raises(FederationError, match=r"the coordinator's authority, .*missing\.pem, cannot be used"):
            ask(replace(operator, authority=str(tmp_path / "missing.pem")), "GET", "settings", FederationSettings)


# --------------------------------------------------------------------------------------------------------- this machine
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="addresses of the loopback interface")
@pytest.mark.parametrize("options", [[], ["--tls"]], ids=["plain", "tls"])
def test_nobody_asks_a_proxy_for_a_coordinator_on_any_address_of_this_machine(tmp_path, monkeypatch, options):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody is there
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with coordinator_process(tmp_path / "federation", "--sites", "A", "B", "--host", "127.0.0.3", *options) as process:
        site = process.credentials()["A"]  # asks for the authority, and joins
        with make_client(site) as client:
            assert client.settings().sites == ("A", "B")
        operator = load_credential(tmp_path / "federation" / "operator.json")
        assert ask(operator, "GET", "settings", FederationSettings).sites == ("A", "B")
