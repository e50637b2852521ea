"""Sites behind a proxy, a coordinator behind TLS: whole federations as hospitals have them.

The quick tests stay on loopback: the proxy alone knows what the coordinator's name means. The slow ones give every
site, the proxy and the coordinator a network namespace of its own, without a route between sites and coordinator.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from fake_federation import TEST_PATHS, make_client, wait_until
from patience import PATIENCE_S
from small_sites import CONFIGURATION, final_weights, make_sites, plan_command, shrink_plans, train_command

from nnunetv2.federated.commands.simulate import (
    LocalSite,
    RunningProcess,
    SimulationError,
    find_command,
    find_invitations,
    free_port,
    run_everywhere,
    wait_until_served,
)
from nnunetv2.federated.errors import CoordinatorUnreachable
from nnunetv2.federated.site.credential import SiteCredential, load_credential, save_credential

HERE = Path(__file__).resolve().parents[1]
EXAMPLE = HERE.parents[1] / "deploy" / "nginx.conf"
NAME = "coordinator.test"
"""Nobody has this name: only the proxy of the quick tests knows what it means."""
NUM_ROUNDS = 2

needs_nginx = pytest.mark.skipif(
    shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") is None,
    reason="nginx is not installed (apt-get install nginx-light)",
)


def with_proxy(sites: Sequence[LocalSite], address: str) -> list[LocalSite]:
    """Let sites reach the world through a proxy, and nothing without it."""
    variables = {"HTTPS_PROXY": address, "https_proxy": address, "NO_PROXY": "", "no_proxy": ""}
    return [replace(site, environment={**site.environment, **variables}) for site in sites]


# ------------------------------------------------------------------------------------------------------- processes
@dataclass
class Ground:
    """What one federation runs on; commands run at a place: "north", "south", "edge" (the proxy) or "centre"."""

    folder: Path
    prefix: Callable[[str], list[str]] = lambda place: []
    lines: list[str] = field(default_factory=list)

    def start(self, place: str, *command: str) -> RunningProcess:
        """Start a command."""
        return RunningProcess(
            place,
            [*self.prefix(place), *command],
            log_file=self.folder / "logs" / f"{place}.log",
            environment={**os.environ, "PYTHONUNBUFFERED": "1"},
            show=self.lines.append,
        )

    @contextmanager
    def running(self, place: str, *command: str) -> Iterator[RunningProcess]:
        """Run a command until the block is left."""
        process = self.start(place, *command)
        try:
            yield process
        finally:
            process.stop()

    def everywhere(
        self, sites: Sequence[LocalSite], command_of: Callable[[LocalSite], Sequence[str]], step: str
    ) -> None:
        """Run one command per site, at the same time."""

        def command(site: LocalSite) -> list[str]:
            program, *arguments = command_of(site)
            return [*self.prefix(site.name), find_command(program), *arguments]

        run_everywhere(sites, command, step=step, log_folder=self.folder / "logs", show=self.lines.append)

    @contextmanager
    def proxy(self, host: str, *options: str) -> Iterator[int]:
        """Run the outbound proxy and yield its port."""
        log = str(self.folder / "proxy.txt")
        with self.running(
            "edge", sys.executable, str(HERE / "connect_proxy.py"), "--host", host, "--log", log, *options
        ):
            found: list[str] = []
            wait_until(
                lambda: (
                    found.extend(m[1] for line in self.lines if (m := re.fullmatch(r"\[edge\] (\d+)", line))) or found
                )
            )
            yield int(found[0])

    @contextmanager
    def coordinator(self, sites: Sequence[LocalSite], *options: str, folder: str = "coordinator") -> Iterator[None]:
        """Run a coordinator until the block is left."""
        with self.running(
            "centre",
            find_command("nnUNetv2_fed_coordinator"),
            "--folder",
            str(self.folder / folder),
            "--sites",
            *[site.name for site in sites],
            *options,
        ) as process:
            wait_until_served(process, self.folder / folder / "coordinator.json", self.lines)
            yield

    def join(self, sites: Sequence[LocalSite]) -> None:
        """Let all sites join."""
        invitations = find_invitations(self.lines, sites)
        self.everywhere(sites, lambda site: ["nnUNetv2_fed_join", invitations[site.name]], "join")

    @contextmanager
    def nginx(self, *, port: int, address: str, backend: int) -> Iterator[None]:
        """Run nginx as the example under deploy/ has it, with the coordinator's private authority."""
        tls = self.folder / "coordinator" / "tls"
        server = EXAMPLE.read_text()
        for line in re.findall(r"#private (\w+)", server):
            server = re.sub(rf"^ *{line} .*;\n", "", server, flags=re.M)
        server = server.replace("#private ", "").replace("/var/lib/nnunet-coordinator/federation/tls", str(tls))
        server = server.replace("listen 443", f"listen {address}:{port}").replace(":8750/", f":{backend}/")
        config = self.folder / "nginx.conf"
        temporary = "".join(
            f"{kind}_temp_path {self.folder}/nginx-{kind};\n"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        config.write_text(
            f"{'user root;' if os.geteuid() == 0 else ''} daemon off; pid {self.folder}/nginx.pid;\n"
            f"error_log stderr; events {{}}\nhttp {{ access_log off;\n{temporary}{server}}}\n"
        )
        with self.running("centre", find_nginx(), "-c", str(config), "-e", "stderr"):
            wait_until(lambda: (self.folder / "nginx.pid").exists())
            yield

    def connections(self) -> set[str]:
        """Return what the proxy was asked for."""
        return set((self.folder / "proxy.txt").read_text().splitlines())


def find_nginx() -> str:
    return shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")


def fake_training(site: LocalSite) -> list[str]:
    """Return a command that trains a few numbers as a site."""
    code = (
        f"import sys; sys.path[:0] = {TEST_PATHS}; import fake_federation as f\n"
        f"with f.make_client(f.load_credential()) as client:\n"
        f"    print('digest', f.train(client, seed={len(site.name)}, num_rounds={NUM_ROUNDS}))\n"
    )
    return [sys.executable, "-c", code]


def question(site: LocalSite) -> list[str]:
    """Return a command that asks the coordinator something."""
    code = (
        f"import sys; sys.path[:0] = {TEST_PATHS}; import fake_federation as f\n"
        "with f.make_client(f.load_credential(), give_up_after_s=1) as client:\n"
        "    print(client.settings().federation)\n"
    )
    return [sys.executable, "-c", code]


def bare_sites(folder: Path) -> list[LocalSite]:
    return [LocalSite(name=name, dataset="0", credential=folder / name / "site.json") for name in ("north", "south")]


def digests(ground: Ground) -> set[str]:
    return {line.split()[-1] for line in ground.lines if "] digest " in line}


# ----------------------------------------------------------------------------------------------- quick: on loopback
def test_sites_behind_a_proxy_train_over_tls_with_the_pinned_authority(tmp_path):
    ground, port = Ground(tmp_path), free_port()
    with ground.proxy("127.0.0.1", "--place", f"{NAME}:{port}", f"127.0.0.1:{port}") as proxy:
        sites = with_proxy(bare_sites(tmp_path), f"http://127.0.0.1:{proxy}")
        with ground.coordinator(
            sites, "--tls", "--port", str(port), "--url", f"https://{NAME}:{port}", "--epochs", str(NUM_ROUNDS)
        ):
            ground.join(sites)
            ground.everywhere(sites, fake_training, "train")
    assert len(digests(ground)) == 1
    assert ground.connections() == {f"CONNECT {NAME}:{port}"}
    for site in sites:
        authority = Path(load_credential(site.credential).authority)
        assert authority.read_text() == (tmp_path / "coordinator" / "tls" / "ca.pem").read_text()


@needs_nginx
def test_the_example_for_nginx_serves_a_federation_under_a_path_prefix(tmp_path):
    ground, port, front = Ground(tmp_path), free_port(), free_port()
    with ExitStack() as stack:
        proxy = stack.enter_context(ground.proxy("127.0.0.1", "--place", f"{NAME}:443", f"127.0.0.1:{front}"))
        sites = with_proxy(bare_sites(tmp_path), f"http://127.0.0.1:{proxy}")
        stack.enter_context(
            ground.coordinator(
                sites, "--tls", "--port", str(port), "--url", f"https://{NAME}/federation", "--epochs", str(NUM_ROUNDS)
            )
        )
        stack.enter_context(ground.nginx(port=front, address="127.0.0.1", backend=port))
        ground.join(sites)
        ground.everywhere(sites, fake_training, "train")
        authority = tmp_path / "coordinator" / "tls" / "ca.pem"
        page = request(authority, front, "GET /federation/")
        figures = request(authority, front, "GET /federation/metrics")
        guesses = [
            request(authority, front, "POST /federation/v1/session", '{"token": "eve.0123456789abcdef"}')
            for _ in range(11)
        ]
    assert len(digests(ground)) == 1
    assert ground.connections() == {f"CONNECT {NAME}:443"}
    assert "Strict-Transport-Security" in page and "<!doctype html>" in page.lower()
    assert '"unauthorized"' in figures
    # Who guesses is known by the address that nginx saw, not by the one that the guesser claims.
    assert "too many failed logins from 127.0.0.1" in guesses[-1]


def request(authority: Path, port: int, what: str, body: str = "") -> str:
    """Send a request for the host NAME to a port of this machine, and return the answer with its headers."""
    import ssl

    context = ssl.create_default_context(cafile=str(authority))
    with (
        socket.create_connection(("127.0.0.1", port), 10) as plain,
        context.wrap_socket(plain, server_hostname=NAME) as secure,
    ):
        secure.sendall(
            (
                f"{what} HTTP/1.1\r\nHost: {NAME}\r\nConnection: close\r\nX-Forwarded-For: 198.51.100.7\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
            ).encode()
        )
        return b"".join(iter(lambda: secure.recv(1 << 16), b"")).decode()


@needs_nginx
def test_the_example_for_nginx_is_accepted_as_it_stands(tmp_path):
    """With a certificate of its own in the place of the one that an operator has."""
    from nnunetv2.federated.coordinator.http.tls import private_certificate

    made = private_certificate(tmp_path / "tls", ["coordinator.example"])
    server = re.sub(r"^( *ssl_certificate_key ).*;", rf"\1{made.key};", EXAMPLE.read_text(), flags=re.M)
    server = re.sub(r"^( *ssl_certificate ).*;", rf"\1{made.certificate};", server, flags=re.M)
    config = tmp_path / "nginx.conf"
    config.write_text(f"pid {tmp_path}/nginx.pid; error_log stderr; events {{}} http {{ access_log off;\n{server}}}\n")
    done = subprocess.run([find_nginx(), "-t", "-c", str(config), "-e", "stderr"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_whoever_has_taken_the_address_of_the_coordinator_is_refused(tmp_path):
    ground, port = Ground(tmp_path), free_port()
    sites = bare_sites(tmp_path)
    with ground.coordinator(sites, "--tls", "--port", str(port)):
        ground.join(sites[:1])
        invitations = find_invitations(ground.lines, sites)
    with Ground(tmp_path).coordinator(sites, "--tls", "--port", str(port), folder="impostor"):
        with pytest.raises(SimulationError, match="the coordinator's certificate is not trusted"):
            ground.everywhere(sites[:1], question, "ask")
        with pytest.raises(SimulationError, match="the coordinator's certificate is not trusted"):
            ground.everywhere(sites[:1], lambda site: ["nnUNetv2_fed_status"], "status")
        with pytest.raises(SimulationError, match="is not the coordinator of the invitation"):
            ground.everywhere(sites[1:], lambda site: ["nnUNetv2_fed_join", invitations[site.name]], "join")
        assert not sites[1].credential.exists()
    with (
        Ground(tmp_path).coordinator(sites, "--port", str(port), folder="plain"),
        pytest.raises(SimulationError, match="the encrypted connection to the coordinator broke"),
    ):
        ground.everywhere(sites[:1], question, "ask")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("407 Proxy Authentication Required", "tunnel connection failed: 407 proxy authentication required"),
        ("403 Forbidden", "tunnel connection failed: 403 forbidden"),
        (None, "connection refused"),
    ],
)
def test_a_proxy_that_lets_nobody_out_is_named_as_what_is_wrong(answer, words, monkeypatch):
    proxy = socket.create_server(("127.0.0.1", 0))
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
    thread = threading.Thread(target=answer_all, args=(proxy, f"HTTP/1.1 {answer}\r\n\r\n".encode()))
    if answer is None:
        proxy.shutdown(socket.SHUT_RDWR)
    thread.start()
    try:
        credential = SiteCredential(f"https://{NAME}", "test", "north", "north.0123456789abcdef")
        with (
            make_client(credential, give_up_after_s=0.1) as client,
            pytest.raises(CoordinatorUnreachable, match=f"HTTPS_PROXY does not lead .*{words}"),
        ):
            client.settings()
    finally:
        with suppress(OSError):
            proxy.shutdown(socket.SHUT_RDWR)  # which ends accept()
        thread.join(PATIENCE_S)
        proxy.close()


def answer_all(listener: socket.socket, answer: bytes) -> None:
    """Give everybody the same answer, until the listener is shut down."""
    with suppress(OSError):
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)


# ----------------------------------------------------------------------------------------- slow: network namespaces
PLACES = {"north": 1, "south": 2, "centre": 3}
"""Who hangs on the proxy's machine, by which of its networks. There the proxy has .1, and the other one .2."""
PROXY_PORT = 3128


def run_ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def namespaces() -> Iterator[Callable[[str], list[str]]]:
    """Make a network namespace per place, each joined to that of the proxy only; yield what runs a command there.

    No packet is passed on from one network to another, and none leaves this machine.
    """
    name_of = {place: f"nnunet-{os.getpid()}-{place}" for place in (*PLACES, "edge")}
    try:
        for name in name_of.values():
            run_ip("netns", "add", name)
            run_ip("-n", name, "link", "set", "lo", "up")
        for place, number in PLACES.items():
            run_ip(
                "-n",
                name_of["edge"],
                "link",
                "add",
                f"to-{place}",
                "type",
                "veth",
                "peer",
                "name",
                "outside",
                "netns",
                name_of[place],
            )
            for name, device, host in ((name_of["edge"], f"to-{place}", 1), (name_of[place], "outside", 2)):
                run_ip("-n", name, "address", "add", f"10.77.{number}.{host}/24", "dev", device)
                run_ip("-n", name, "link", "set", device, "up")
        yield lambda place: [shutil.which("ip"), "netns", "exec", name_of[place]]
    finally:
        for name in name_of.values():
            with suppress(subprocess.CalledProcessError):
                run_ip("netns", "delete", name)


@pytest.fixture
def ground(tmp_path):
    """Yield a ground whose places are network namespaces."""
    if shutil.which("ip") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command ip")
    with ExitStack() as stack:
        try:
            prefix = stack.enter_context(namespaces())
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield Ground(tmp_path, prefix)


@pytest.mark.parametrize("front", ["coordinator", pytest.param("nginx", marks=needs_nginx)])
def test_hospitals_plan_train_and_predict_through_their_proxy(ground, front):
    address = f"10.77.{PLACES['centre']}.2"
    options = ["--epochs", str(NUM_ROUNDS), "--iterations", "2", "--val-iterations", "1"]
    place = {"coordinator": ["--host", address], "nginx": ["--tls", "--url", f"https://{address}/federation"]}[front]
    sites = make_sites(ground.folder)
    with ExitStack() as stack:
        stack.enter_context(ground.proxy("0.0.0.0", "--port", str(PROXY_PORT)))
        sites = [with_proxy([site], f"http://10.77.{PLACES[site.name]}.1:{PROXY_PORT}")[0] for site in sites]
        with ground.coordinator(sites, *place, *options), ExitStack() as inner:
            if front == "nginx":
                inner.enter_context(ground.nginx(port=443, address=address, backend=8750))
            ground.join(sites)
            ground.everywhere(sites, lambda site: ["nnUNetv2_fed_status"], "status")
            assert cannot_do_without_proxy(ground, sites[0])
            ground.everywhere(sites, plan_command, "plan")
            for site in sites:
                shrink_plans(site)
            ground.everywhere(sites, train_command, "train")
        ground.everywhere(sites, lambda site: predict_command(site, ground.folder / site.name / "out"), "predict")
        check_impostor(ground, sites[0], address)
    check_results(ground, sites)
    port = 443 if front == "nginx" else 8750
    assert f"CONNECT {address}:{port}" in ground.connections()
    assert {line.split()[0] for line in ground.connections()} == {"CONNECT"}, "something went in plain text"


def predict_command(site: LocalSite, output: Path) -> list[str]:
    images = Path(site.environment["nnUNet_raw"]) / f"Dataset{site.dataset}_Phantom" / "imagesTs"
    return [
        "nnUNetv2_predict",
        "-d",
        site.dataset,
        "-c",
        CONFIGURATION,
        "-f",
        "0",
        "-tr",
        "nnUNetTrainerAsymFedAvg",
        "-i",
        str(images),
        "-o",
        str(output),
        "-device",
        "cpu",
        "-npp",
        "1",
        "-nps",
        "1",
    ]


def cannot_do_without_proxy(ground: Ground, site: LocalSite) -> bool:
    """Tell whether the way through the proxy is the only one."""
    direct = replace(site, environment={**site.environment, "HTTPS_PROXY": "", "https_proxy": ""})
    with pytest.raises(SimulationError, match="has not answered"):
        ground.everywhere([direct], question, "direct")
    return True


def check_impostor(ground: Ground, site: LocalSite, address: str) -> None:
    """See to it that a site talks to nobody else who has taken the coordinator's address."""
    known = load_credential(site.credential)
    other = f"https://{address}:8750"
    save_credential(replace(known, url=other), site.credential)
    impostor = Ground(ground.folder, ground.prefix)
    with (
        impostor.coordinator([site, replace(site, name="south")], "--host", address, folder="impostor"),
        pytest.raises(SimulationError, match="the coordinator's certificate is not trusted"),
    ):
        impostor.everywhere([site], question, "impostor")


def check_results(ground: Ground, sites: Sequence[LocalSite]) -> None:
    first, second = (final_weights(site) for site in sites)
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name], err_msg=name)
    for site in sites:
        assert [path.name for path in (ground.folder / site.name / "out").glob("*.nii.gz")] == ["phantom_005.nii.gz"]
        assert "https://" in load_credential(site.credential).url
