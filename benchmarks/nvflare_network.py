"""A network of NVIDIA FLARE on the loopback interface: real certificates, a process each for server, sites and relay.

The engine runs in an environment of its own, which `make nvflare` creates; this process knows nothing of it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
HOME = Path(os.environ.get("FEDNNUNET_NVFLARE", PROJECT / ".venv-nvflare"))
PYTHON = HOME / "bin" / "python"
NETWORK = "loopback"
ADMIN = "admin@test.org"
ENDED = ("FINISHED", "ABORTED", "FAILED")
ADMIN_CODE = """
import json, sys
from nvflare.fuel.flare_api.flare_api import new_secure_session
out = sys.stdout
sys.stdout = sys.stderr
session = new_secure_session(sys.argv[1], sys.argv[2], timeout=120.0)
for line in sys.stdin:
    name, arguments = json.loads(line)
    try:
        value = getattr(session, name)(*arguments)
    except Exception as error:
        value = {"error": f"{type(error).__name__}: {error}"}
    out.write(json.dumps(value, default=str) + "\\n")
    out.flush()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listening_addresses(pids: set[int]) -> set[str]:
    """Return the addresses on which processes listen, as `ss` tells them."""
    table = subprocess.run(["ss", "-H", "-tlnp"], capture_output=True, text=True, check=True).stdout
    return {
        line.split()[3].rpartition(":")[0] for line in table.splitlines() if any(f"pid={pid}," in line for pid in pids)
    }


def processes_below(pid: int) -> set[int]:
    """Return a process and all its descendants."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = dict(map(int, line.split()) for line in table.splitlines())
    found = {pid}
    while more := {one for one, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def hide_torch(folder: Path) -> Path:
    """Return a folder that makes Python believe that torch is not installed."""
    code = (
        "import sys\n"
        "class Hidden:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"
        "sys.meta_path.insert(0, Hidden)\n"
    )
    (folder / "without_torch").mkdir()
    (folder / "without_torch" / "sitecustomize.py").write_text(code)
    return folder / "without_torch"


SESSION_S = 20 * 60
"""NVFlare ends the session of an administrator who is silent for half an hour, and answers nothing then."""


class Network:
    """A provisioned network, and its processes once they are started.

    Args:
        folder: Everything lies here.
        sites: Names of the sites.
        relay: Whether a relay stands between server and sites.
        environment: Further variables of all processes.
    """

    def __init__(
        self, folder: Path, sites: Sequence[str], *, relay: bool = False, environment: dict[str, str] | None = None
    ) -> None:
        self.folder = folder
        self.sites = tuple(sites)
        self.port = free_port()
        self.relay_port = free_port() if relay else None
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(folder / "home"), **(environment or {})}
        self.environment.pop("PYTHONPATH", None)
        self.processes: dict[str, subprocess.Popen] = {}
        self._admin: subprocess.Popen | None = None
        self._asked = 0.0
        (folder / "home").mkdir(parents=True)
        self._provision()

    # --------------------------------------------------------------------------------------------------- provisioning
    def kit(self, name: str) -> Path:
        return self.folder / "ws" / NETWORK / "prod_00" / name

    def _provision(self) -> None:
        relay = self.relay_port is not None
        participants = [
            {
                "name": "server",
                "type": "server",
                "org": "test",
                "fed_learn_port": self.port,
                "admin_port": self.port,
                "default_host": "localhost",
                "connection_security": "mtls",
            },
            {"name": ADMIN, "type": "admin", "org": "test", "role": "project_admin"},
            *(
                {"name": name, "type": "client", "org": "test", **({"connect_to": {"name": "relay"}} if relay else {})}
                for name in self.sites
            ),
        ]
        if relay:
            participants.append(
                {
                    "name": "relay",
                    "type": "relay",
                    "org": "test",
                    "default_host": "localhost",
                    "listening_host": {
                        "default_host": "localhost",
                        "port": self.relay_port,
                        "scheme": "tcp",
                        "connection_security": "mtls",
                    },
                }
            )
        builders = "nvflare.lighter.impl"
        project = {
            "api_version": 3,
            "name": NETWORK,
            "participants": participants,
            "builders": [
                {"path": f"{builders}.workspace.WorkspaceBuilder", "args": {"template_file": ["master_template.yml"]}},
                {"path": f"{builders}.static_file.StaticFileBuilder", "args": {"config_folder": "config"}},
                {"path": f"{builders}.cert.CertBuilder", "args": {}},
                {"path": f"{builders}.signature.SignatureBuilder", "args": {}},
            ],
        }
        (self.folder / "project.yml").write_text(json.dumps(project))  # which is YAML, too
        self.run([str(HOME / "bin" / "nvflare"), "provision", "-p", "project.yml", "-w", "ws"], cwd=self.folder)
        # By default the server listens on all interfaces, and keeps jobs in /tmp.
        self.edit(
            self.kit("server") / "startup" / "fed_server.json",
            lambda c: c["servers"][0]["service"].update(target=f"localhost:{self.port}"),
        )
        resources = self.kit("server") / "local" / "resources.json.default"
        text = resources.read_text().replace("/tmp/nvflare", str(self.folder / "storage"))
        resources.with_suffix("").write_text(text)
        self.edit(resources.with_suffix(""), lambda c: c["servers"][0].update(max_num_clients=1000))
        for name in self.sites:
            local = self.kit(name) / "local"
            shutil.copy(local / "resources.json.default", local / "resources.json")

    @staticmethod
    def edit(path: Path, change: Callable[[dict], object]) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content, indent=2))

    def allow(self, name: str, line: str) -> None:
        """Add a class to a participant's list."""
        path = self.kit(name) / "local" / "resources.json"
        self.edit(path, lambda c: c["class_allow_list"].append(line.strip().strip('",')))

    def run(self, command: Sequence[str], *, cwd: Path | None = None) -> str:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=240,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    def engine(self, *arguments: str) -> str:
        """Run nnUNetv2_fed_engine."""
        return self.run([str(HOME / "bin" / "nnUNetv2_fed_engine"), *map(str, arguments)])

    # ------------------------------------------------------------------------------------------------------ processes
    def start(self, name: str, **environment: str) -> None:
        """Start server, relay or site."""
        if name == "server":
            module, extra = "server.server_train", ["-s", "fed_server.json", "--set", "secure_train=true", "org=test"]
        elif name == "relay":
            module, extra = (
                "relay.relay",
                ["-s", "fed_relay.json", "--set", "secure_train=true", "uid=relay", "org=test"],
            )
        else:
            module = "client.client_train"
            extra = ["-s", "fed_client.json", "--set", "secure_train=true", f"uid={name}", "org=test"]
        (self.kit(name) / "transfer").mkdir(exist_ok=True)
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [
                    *(str(PYTHON), "-u", "-m", f"nvflare.private.fed.app.{module}"),
                    *("-m", str(self.kit(name)), *extra, "config_folder=config"),
                ],
                env={**self.environment, **environment},
                cwd=self.kit(name),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start_all(self) -> None:
        for name in ("server", *(("relay",) if self.relay_port else ()), *self.sites):
            self.start(name)

    def pids(self) -> set[int]:
        """Return all processes of the network."""
        found: set[int] = set()
        for process in self.processes.values():
            found |= processes_below(process.pid)
        return found

    def kill(self, name: str) -> None:
        """End a participant and all that it has started, as a power failure would."""
        process = self.processes.pop(name)
        for pid in processes_below(process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()

    def stop(self) -> None:
        """End everything, at once."""
        self.forget_admin()
        for name in list(self.processes):
            self.kill(name)

    def forget_admin(self) -> None:
        """Log in anew at the next question: the server has been another one since."""
        if self._admin is not None:
            self._admin.kill()
            self._admin.wait()
            self._admin = None

    def log(self, name: str) -> str:
        """Return the logs of a participant and its jobs."""
        files = [self.folder / f"{name}.log", *sorted(self.kit(name).rglob("log.txt"))]
        return "\n".join(file.read_text(errors="replace") for file in files if file.exists())

    # ----------------------------------------------------------------------------------------------------------- jobs
    def ask(self, name: str, *arguments: object):
        """Ask the server as its administrator."""
        if time.monotonic() - self._asked > SESSION_S:
            self.forget_admin()
        self._asked = time.monotonic()
        if self._admin is None or self._admin.poll() is not None:
            with (self.folder / "admin.log").open("ab") as log:
                self._admin = subprocess.Popen(
                    [str(PYTHON), "-c", textwrap.dedent(ADMIN_CODE), ADMIN, str(self.kit(ADMIN))],
                    env=self.environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
        assert self._admin.stdin is not None and self._admin.stdout is not None
        self._admin.stdin.write(json.dumps([name, arguments]) + "\n")
        self._admin.stdin.flush()
        line = self._admin.stdout.readline()
        assert line, (self.folder / "admin.log").read_text()[-3000:]
        return json.loads(line)

    def wait_for_sites(self, patience_s: float) -> None:
        """Wait until all sites are connected."""
        deadline = time.monotonic() + patience_s
        found: object = None
        while time.monotonic() < deadline:
            try:
                found = self.ask("get_system_info")
            except AssertionError as error:  # a busy server is late, and the administrator gives up
                found = error
            if isinstance(found, str) and all(site in found for site in self.sites):
                return
            time.sleep(1)
        raise AssertionError(f"not all sites are connected: {found}; {self.log('server')[-3000:]}")

    def submit(self, job: Path) -> str:
        found = self.ask("submit_job", str(job))
        assert isinstance(found, str), found
        return found

    def status(self, job: str) -> str:
        meta = self.ask("get_job_meta", job)
        return str(meta.get("status", meta))

    def wait_for_job(self, job: str, patience_s: float) -> str:
        """Wait until a job has ended; return how."""
        deadline = time.monotonic() + patience_s
        status = ""
        while time.monotonic() < deadline:
            status = self.status(job)
            if status.startswith(ENDED):
                return status
            time.sleep(1)
        raise AssertionError(f"job {job} is still {status}; {self.log('server')[-3000:]}")


@contextmanager
def running_network(folder: Path, sites: Sequence[str], **options) -> Iterator[Network]:
    """Provision a network, and end all its processes with the block."""
    network = Network(folder, sites, **options)
    try:
        yield network
    finally:
        network.stop()
