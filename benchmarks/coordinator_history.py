"""Measure the coordinator's costs of status, page and figures after few and many rounds.

    python -m benchmarks.coordinator_history [--sites 200] [--rounds 20 2000] [--requests 15]

Rows of rounds are written directly: the measurement is of reading, not of the rounds themselves. Times are milliseconds
of the fastest request, so that other load of the machine hardly counts. The overview is asked for at intervals at which
it is computed anew. All should be the same after any number of rounds: the last column is the ratio to the first block.
"""

from __future__ import annotations

import argparse
import json
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.federation import RUN, begin_run
from nnunetv2.federated.coordinator.members import create_federation
from nnunetv2.federated.coordinator.storage import audit_log
from nnunetv2.federated.coordinator.storage.store import DATABASE_FILE, Store
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.document import TensorSpec
from nnunetv2.federated.protocol.keys import RoundKey

INTERVAL_S = 0.6
"""Between two requests: an overview is shared for half a second."""
PATHS = {
    "status": "v1/status",
    "overview": "v1/overview",
    "figures": "metrics",
    "curves": f"v1/runs/{RUN}/curves?since={{since}}",
}
DIGEST = "0" * 64


def write_history(folder: Path, *, sites: int, rounds: int) -> None:
    """Write a federation of which so many rounds are over."""
    names = tuple(f"s{number:03d}" for number in range(sites))
    with Store(folder) as store:
        create_federation(
            store, FederationSettings(federation="history", sites=names, num_epochs=10**6), now=time.time()
        )
    begin_run(folder, {"w": TensorSpec("F32", (2, 4))})
    with sqlite3.connect(folder / DATABASE_FILE) as database:
        last = database.execute("SELECT number, hash FROM events ORDER BY number DESC LIMIT 1").fetchone()
        begin = time.time() - 60.0 * rounds
        for number in range(rounds):
            moment = begin + 60.0 * number
            last = _write_exchange(database, RoundKey(RUN, number), names, moment, last)
            record = json.dumps(_record(number, names, moment))
            database.execute("INSERT INTO rounds VALUES (?, ?, ?)", (RUN, number, record))
    database.close()


def _write_exchange(
    database: sqlite3.Connection, key: str, names: Sequence[str], moment: float, last: tuple[int, str]
) -> tuple[int, str]:
    """Write a closed exchange with its lines of the log, and return number and hash of the last line."""
    outcome = {"closed": True, "time": moment + 9, "contributors": names, "missing": []}
    database.execute("INSERT INTO gatherings VALUES (?, ?, '[]', ?)", (key, moment, json.dumps(outcome)))
    database.executemany(
        "INSERT INTO contributions VALUES (?, ?, ?, 1000, ?)", [(key, name, DIGEST, moment) for name in names]
    )
    database.executemany("INSERT INTO traffic VALUES (?, ?, 1000, 1000, ?)", [(name, key, moment) for name in names])
    lines = [(moment, "contribution", name, key, json.dumps({"digest": DIGEST, "bytes": 1000})) for name in names]
    lines.append(
        (
            moment + 9,
            "closing",
            None,
            key,
            json.dumps({"digest": DIGEST, "contributions": dict.fromkeys(names, DIGEST), "missing": []}),
        )
    )
    for line in lines:
        row = (last[0] + 1, *line)
        last = (row[0], audit_log.chained_hash(last[1], row))
        database.execute(
            "INSERT INTO events (number, time, kind, site, key, detail, hash) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (*row, last[1]),
        )
    return last


def _record(number: int, names: Sequence[str], moment: float) -> dict[str, object]:
    site = {
        "weight": 1.0,
        "digest": DIGEST,
        "bytes": 1000,
        "received": moment,
        "metrics": {"train_losses": 0.5},
        "earlier": None,
        "change_norm": 1.0,
        "change_rms": 1.0,
    }
    return {
        "round": number,
        "opened": moment,
        "closed": moment + 9,
        "digest": DIGEST,
        "missing": [],
        "failed": [],
        "outliers": [],
        "settings": {},
        "sites": dict.fromkeys(names, site),
    }


def measure(folder: Path, *, rounds: int, requests: int) -> dict[str, float]:
    """Serve a folder and return the cost of each question, and the coordinator's memory in MiB."""
    code = "import sys; from nnunetv2.federated.commands.coordinator import main; sys.exit(main(sys.argv[1:]))"
    begin = time.monotonic()
    with (folder.parent / "coordinator.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "--folder", folder, "--port", "0"], stdout=log, stderr=log
        )
    try:
        while not (folder / "operator.json").exists():
            if process.poll() is not None or time.monotonic() - begin > 300:
                raise RuntimeError((folder.parent / "coordinator.log").read_text(encoding="utf-8"))
            time.sleep(0.01)
        found = {"start s": time.monotonic() - begin}
        operator = json.loads((folder / "operator.json").read_text(encoding="utf-8"))

        def ask(path: str) -> Callable[[], object]:
            request = urllib.request.Request(
                f"{operator['url']}/{path}", headers={"Authorization": f"Bearer {operator['token']}"}
            )
            return lambda: urllib.request.urlopen(request, timeout=120).read()

        for name, path in PATHS.items():
            question = ask(path.format(since=max(0, rounds - 20)))
            times = []
            for _ in range(requests):
                times.append(_milliseconds(question))
                time.sleep(INTERVAL_S)
            found[name] = min(times)
        resident = Path(f"/proc/{process.pid}/statm").read_text(encoding="ascii").split()[1]
        found["MiB"] = int(resident) * resource.getpagesize() / 2**20
        return found
    finally:
        process.terminate()
        process.wait(60)


def _milliseconds(question: Callable[[], object]) -> float:
    begin = time.perf_counter()
    question()
    return 1000 * (time.perf_counter() - begin)


def verify_log(folder: Path) -> tuple[float, float]:
    """Verify a log, and return seconds and the most memory in MiB."""
    code = (
        "import resource, sys; from nnunetv2.federated.commands.admin import main; main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, "--folder", folder, "verify-log"], capture_output=True, text=True, check=True
    )
    return time.monotonic() - begin, float(done.stdout.split()[-1])


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line per number of rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=200)
    parser.add_argument("--rounds", type=int, nargs="+", default=[20, 2000])
    parser.add_argument("--requests", type=int, default=15)
    arguments = parser.parse_args(argv)
    first: dict[str, float] = {}
    for rounds in arguments.rounds:
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work) / "federation"
            write_history(folder, sites=arguments.sites, rounds=rounds)
            found = measure(folder, rounds=rounds, requests=arguments.requests)
            found["verify-log s"], found["verify-log MiB"] = verify_log(folder)
        first = first or found
        print(f"{arguments.sites} sites, {rounds} rounds")
        for name, value in found.items():
            print(f"  {name:16} {value:10.1f}   x {value / first[name]:.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
