"""Give birth to coordinators and sites that can be killed, within milliseconds: a process that knows everything forks.

Run as a program, it is that process: it reads one order per line, as JSON, and answers with the process id.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from patience import PATIENCE_S

HERE = Path(__file__).resolve().parent


class Nursery:
    """The side of the test: starts the program, and asks it for processes."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "nursery.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=HERE.parents[1],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, HERE.parents[:2]))},
        )
        self._lock = threading.Lock()
        assert self._process.stdout.readline() == "ready\n"

    def start(self, **order: object) -> int:
        """Start a coordinator or a site and return its process id."""
        return self._ask(order)

    def is_alive(self, pid: int) -> bool:
        """Tell whether a process of the nursery still runs. Its id stays its own until this was asked."""
        return bool(self._ask({"role": "patient", "pid": pid}))

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to a process of the nursery, if it still runs."""
        self._ask({"role": "victim", "pid": pid, "signal": int(number)})

    def _ask(self, order: dict) -> int:
        with self._lock:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            return int(self._process.stdout.readline())

    def close(self) -> None:
        """End it, and what it has started."""
        self._process.stdin.close()
        self._process.wait(PATIENCE_S)
        self._process.stdout.close()


# ------------------------------------------------------------------------------------------------- in the nursery
def main() -> None:
    import fake_federation  # noqa: F401 - so that children have it already

    from nnunetv2.federated.coordinator.http import connections, tls  # noqa: F401
    from nnunetv2.federated.coordinator.storage.store import Store  # noqa: F401

    children: set[int] = set()
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if order["role"] == "patient":
            answer = is_alive(children, order["pid"])
        elif order["role"] == "victim":
            answer = is_alive(children, order["pid"])
            if answer:
                os.kill(order["pid"], order["signal"])
        else:
            answer = os.fork() or be_born(order)
            children.add(answer)
        print(int(answer), flush=True)
    for pid in list(children):
        if is_alive(children, pid):
            os.kill(pid, signal.SIGKILL)


def is_alive(children: set[int], pid: int) -> bool:
    """Tell whether a child still runs; the id of one that is dead belongs to somebody else from now on."""
    if pid in children and os.waitpid(pid, os.WNOHANG)[0]:
        children.discard(pid)
    return pid in children


def be_born(order: dict) -> NoReturn:
    """Become what was ordered; never returns."""
    status = 1
    try:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for descriptor, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
            os.dup2(source, descriptor)
        status = {"coordinator": coordinate, "site": take_part}[order["role"]](order)
    except BaseException:  # noqa: BLE001  a forked process ends here, whatever happened
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def coordinate(order: dict) -> int:
    """Be a coordinator, which may be doomed to die at a record of its journal."""
    from nnunetv2.federated.commands import coordinator

    if order.get("die_at"):
        doom(order["die_at"], order["side"], skip_start=order["skip_start"])
    return coordinator.main(order["arguments"])


def take_part(order: dict) -> int:
    """Be a fake site until the run is over; leave the digest of the last aggregate in a file."""
    import fake_federation as f

    file = Path(order["credential"])
    with f.make_client(f.load_credential(file)) as client:
        if client.credential.secure is not None:
            import masked_sites

            site = masked_sites.MaskedSite(client, client.credential, file, seed=order["seed"])
            site.pause_s = order["pause_s"]
            Path(order["digest"]).write_text(site.train(order["num_rounds"]), encoding="ascii")
            return 0
        digest = f.train(
            client,
            seed=order["seed"],
            num_rounds=order["num_rounds"],
            pause_s=order["pause_s"],
            num_cases=order["num_cases"],
        )
    Path(order["digest"]).write_text(digest, encoding="ascii")
    return 0


def doom(record: int, side: str, *, skip_start: bool) -> None:
    """Let this process kill itself at a transaction of the database: just before or just after it is committed.

    Args:
        record: Counted from 1.
        skip_start: Whether those do not count that come before the coordinator says that it serves.
    """
    from nnunetv2.federated.commands import coordinator
    from nnunetv2.federated.coordinator.storage.database import Database

    original, write_state_file = Database.transaction, coordinator.write_state_file
    count, serves = 0, not skip_start

    @contextmanager
    def transaction(self):
        nonlocal count
        with original(self) as connection:
            yield connection
            count += serves
            if count == record and side == "before":
                os.kill(os.getpid(), signal.SIGKILL)
        if count == record:
            os.kill(os.getpid(), signal.SIGKILL)

    def state_file_written(*args):
        nonlocal serves
        write_state_file(*args)
        serves = True

    Database.transaction, coordinator.write_state_file = transaction, state_file_written


if __name__ == "__main__":
    main()
