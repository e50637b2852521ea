"""Sites whose clock lags join all the same; where dates are the reason, the clock is named."""

from __future__ import annotations

import ssl
import subprocess
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from fake_federation import make_client

from nnunetv2.federated.commands.api_client import ask
from nnunetv2.federated.coordinator.http import tls
from nnunetv2.federated.errors import CoordinatorUnreachable, FederationError
from nnunetv2.federated.protocol import api
from nnunetv2.federated.site.authority import coordinator_time
from nnunetv2.federated.site.credential import SiteCredential
from nnunetv2.federated.site.enrolment import request_to_join

BOTH_CLOCKS = r"by the clock of this machine, .* by that of the coordinator"


@contextmanager
def https_server(certificate: tls.Certificate):
    """Answer every request with 404 over TLS; yield the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.certificate, certificate.key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None  # clients that do not trust it
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"https://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def credential_for(url: str, certificate: tls.Certificate) -> SiteCredential:
    return SiteCredential(url, "test", "A", "A.secret-secret-secret", authority=str(certificate.authority))


@pytest.mark.parametrize("hours_behind", [0, 1, 23])
def test_certificates_are_good_for_clocks_that_lag(tmp_path, hours_behind):
    made = tls.private_certificate(tmp_path, ["coordinator.example"])
    moment = int(time.time()) - hours_behind * 3600
    subprocess.run(
        ["openssl", "verify", "-attime", str(moment), "-CAfile", made.authority, made.certificate],
        check=True,
        capture_output=True,
    )


@pytest.mark.parametrize(
    ("begins_in_s", "days", "cause"), [(7200, 397, "not yet valid"), (-86_400, -0.5, "has expired")]
)
def test_where_dates_are_the_reason_the_clocks_are_named(tmp_path, monkeypatch, begins_in_s, days, cause):
    monkeypatch.setattr(tls, "BACKDATED_S", -begins_in_s)
    monkeypatch.setattr(tls, "CERTIFICATE_DAYS", days)
    made = tls.private_certificate(tmp_path, ["127.0.0.1"])
    lines: list[str] = []
    with https_server(made) as url:
        credential = credential_for(url, made)
        with (
            make_client(credential, lines, give_up_after_s=0.3, pause_s=0.01) as client,
            pytest.raises(CoordinatorUnreachable, match=f"{cause}.*{BOTH_CLOCKS}"),
        ):
            client.settings()
        assert lines and lines[0].endswith("; trying again"), "a training waits until the clock is set"
        with pytest.raises(FederationError, match=f"{cause}.*{BOTH_CLOCKS}"):
            ask(credential, "GET", "status", api.Status)
        with pytest.raises(FederationError, match=f"{cause}.*{BOTH_CLOCKS}"):
            request_to_join(credential, "secret")


def test_another_authority_stays_final(tmp_path):
    made, other = (tls.private_certificate(tmp_path / name, ["127.0.0.1"]) for name in ("made", "other"))
    with (
        https_server(made) as url,
        make_client(credential_for(url, other)) as client,
        pytest.raises(FederationError, match="is not trusted: it is not the one that this site joined") as info,
    ):
        client.settings()
    assert not isinstance(info.value, CoordinatorUnreachable) and "clock" not in str(info.value)


def test_a_coordinator_that_does_not_tell_the_time_is_no_further_error():
    assert coordinator_time("https://127.0.0.1:9") is None
