"""What a stranger with many silent connections can take from members: nothing. And what is left of it at the end."""

import socket
import sqlite3
import ssl
import sys
from contextlib import closing

import pytest
from fake_federation import coordinator_process, wait_until

from benchmarks.silent_connections import OTHER_MEMBER, STRANGER, Member, Stranger, coordinator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="addresses of the loopback interface")
FILES = 256
PATIENCE_S = 60.0


@pytest.mark.parametrize("options", [[], ["--tls"]], ids=["plain", "tls"])
def test_a_thousand_silent_connections_of_one_address_cost_members_nothing(tmp_path, options):
    """With a quarter of that many files. A member behind that address is served too, on new and on old connections.

    There, a new one may still be silent when fifty others have come after it. Sites ask again.
    """
    with coordinator(tmp_path / "federation", *options, files=FILES) as server:
        neighbour, other = (Member(server, host, PATIENCE_S) for host in (STRANGER, OTHER_MEMBER))
        with closing(neighbour.connect()) as kept:
            assert neighbour.ask(kept) is not None
            before = server.memory_mib()
            with Stranger(server.address, 1000, seconds=300, reopens=True) as stranger:
                wait_until(lambda: stranger.opened > 1100, PATIENCE_S)
                assert None not in [other.ask_anew() for _ in range(10)]
                assert any(neighbour.ask_anew() is not None for _ in range(20))
                assert server.open_files() < FILES
                assert neighbour.ask(kept) is not None, "a member's connection was closed for a stranger's"
        assert server.memory_mib(peak=True) - before < 64
        assert "cannot be accepted" not in server.log.read_text()


# ------------------------------------------------------------------------------------------------------------ the end
def end_of(answer: bytes) -> bool:
    return b"\r\n\r\n" in answer and answer.endswith(b"}")


@pytest.mark.parametrize(
    "request_lines",
    [b"GET /v1/settings HTTP/1.1\r\nHost: x\r\nConnection: close", b"GET /v1/settings HTTP/1.0", b"this is no HTTP"],
)
def test_a_stop_is_orderly_though_clients_keep_closed_tls_connections_open(tmp_path, request_lines):
    """With TLS, both sides agree to the end of a connection. One that never does must not keep the other from it."""
    with coordinator_process(tmp_path / "federation", "--sites", "A", "B", "--tls") as process:
        credential = process.credentials()["A"]
        context = ssl.create_default_context(cafile=credential.authority)
        with (
            socket.create_connection(("127.0.0.1", process.port), timeout=30) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1", suppress_ragged_eofs=True) as connection,
        ):
            connection.sendall(request_lines + f"\r\nAuthorization: Bearer {credential.token}\r\n\r\n".encode())
            answer = b""
            while not end_of(answer):  # reading on, this side would take part in the end
                answer += connection.recv(1 << 16)
            assert process.stop() == 0
        assert "Traceback" not in process.text() and "the coordinator has stopped" in process.text()
    with closing(sqlite3.connect(tmp_path / "federation" / "coordinator.sqlite")) as database:
        counted = database.execute("SELECT sum(sent) FROM traffic WHERE site = 'A'").fetchone()[0]
    assert (counted or 0) > 0 or b"400" in answer, "the counters are written when a coordinator stops"
