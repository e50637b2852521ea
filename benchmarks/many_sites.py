"""Measure the load of many sites on one coordinator over HTTP: memory, rates, polls.

    python -m benchmarks.many_sites [--sites 4 16 64 256] [--polling 1000] [--only round polling] [--folder F]

    round    so many sites upload a network of 31.2 million parameters at the same time, one round: a line per number of
             sites. The coordinator removes updates when they are summed; until then they take 119 MiB of disk per site
    polling  so many sites have joined and wait for a result: share of a core, and memory

Everything is that of `federation.py`: real processes on the loopback interface, sites that are played. Linux.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.federation import DISK_PROBES, MIB, RoundCosts, measure_idle, play_measured_round
from benchmarks.federation_coordinator import Memory

OVER_IDLE_MIB = 64
POLLING_SHARE = 0.15
POLLING_MIB = 200
HEAD = (
    "sites", "updates GiB", "upload MiB/s", "sum s", "sum MiB/s", "disk MiB/s", "processor s", "per site s",
    "over idle MiB", "of it anonymous",
)  # fmt: skip


def row(found: RoundCosts) -> list[str]:
    """Return the line of a round."""
    return [
        str(found.num_sites),
        f"{found.total / 1024:.2f}",
        f"{found.upload:.0f}",
        f"{found.closing:.2f}",
        f"{found.total / found.closing:.0f}",
        f"{statistics.mean(found.disk):.0f}",
        f"{found.cpu:.1f}",
        f"{found.cpu / found.num_sites:.2f}",
        f"{found.over_idle:.0f}",
        f"{found.peak.anonymous - found.idle.anonymous:.0f}",
    ]


def measure_rounds(folder: Path, numbers: Sequence[int]) -> None:
    """Print the costs of a round, for each number of sites that the disk has room for."""
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}", flush=True)
    for number in numbers:
        needed = (number + min(number, DISK_PROBES) + 8) * 120 * MIB  # the updates, and the probes of the disk's rate
        if shutil.disk_usage(folder).free < needed:
            print(f"| {number} | not measured: {folder} has less than {needed / MIB / 1024:.0f} GiB free |", flush=True)
            continue
        with tempfile.TemporaryDirectory(dir=folder) as name:
            print(f"| {' | '.join(row(play_measured_round(Path(name), number)))} |", flush=True)
    print(f"wanted: at most {OVER_IDLE_MIB} MiB over idle, whatever the number of sites")


def measure_polling(folder: Path, number: int) -> None:
    """Print the costs of sites that wait."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        share, memory = measure_idle(Path(name), number)
    print(describe_polling(number, share, memory), flush=True)


def describe_polling(number: int, share: float, memory: Memory) -> str:
    """Return the wanted figures beside the measured ones."""
    return (
        f"{number} sites that wait: {share:.1%} of a core (wanted: below {POLLING_SHARE:.0%}), {memory.rss:.0f} MiB "
        f"(wanted: below {POLLING_MIB})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=(4, 16, 64, 256))
    parser.add_argument("--polling", type=int, default=1000)
    parser.add_argument("--only", nargs="+", choices=("round", "polling"), default=("round", "polling"))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args(argv)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    if "polling" in arguments.only:
        measure_polling(arguments.folder, arguments.polling)
    if "round" in arguments.only:
        measure_rounds(arguments.folder, arguments.sites)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
