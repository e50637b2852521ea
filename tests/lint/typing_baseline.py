"""Run mypy and compare the number of errors of each file with a baseline that may only shrink.

    python tests/lint/typing_baseline.py            fails where a file has more errors than the baseline says
    python tests/lint/typing_baseline.py --update   writes the new numbers, if they are fewer in all

Numbers instead of messages: those change with every release of mypy, NumPy and torch.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

BASELINE = Path(__file__).with_name("typing_baseline.txt")
PROJECT = Path(__file__).resolve().parents[2]
_ERROR = re.compile(r"^(?P<file>[^:]+):\d+: error: ", re.MULTILINE)


def run_mypy() -> str:
    """Return the report of mypy on the whole package.

    Raises:
        RuntimeError: mypy itself failed.
    """
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=PROJECT, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"mypy failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def count_errors(report: str) -> Counter[str]:
    """Count the errors of each file in a report of mypy."""
    return Counter(match["file"] for match in _ERROR.finditer(report))


def read_baseline(text: str) -> Counter[str]:
    """Read lines of a number and a file."""
    return Counter({file: int(number) for number, file in (line.split() for line in text.splitlines())})


def format_baseline(counts: Counter[str]) -> str:
    """Write lines of a number and a file, in the order of the files."""
    return "".join(f"{counts[file]} {file}\n" for file in sorted(counts) if counts[file])


def describe_growth(report: str, baseline: Counter[str]) -> list[str]:
    """Return the lines of a report on files that have more errors than the baseline says."""
    grown = count_errors(report) - baseline
    return [line for line in report.splitlines() if (match := _ERROR.match(line)) and match["file"] in grown]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="write the new numbers, if they are fewer in all")
    arguments = parser.parse_args(argv)
    report = run_mypy()
    found, known = count_errors(report), read_baseline(BASELINE.read_text(encoding="utf-8"))
    if arguments.update:
        if found.total() > known.total():
            print(f"{found.total()} errors, but {BASELINE.name} has {known.total()} only", file=sys.stderr)
            return 1
        BASELINE.write_text(format_baseline(found), encoding="utf-8")
    elif grown := describe_growth(report, known):
        print(*grown, f"More errors than {BASELINE.name} allows", sep="\n", file=sys.stderr)
        return 1
    elif found.total() < known.total():
        print(f"{known.total() - found.total()} errors fewer than before: `make typing-baseline` notes it")
    print(f"mypy: {found.total()} errors, none of them new")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
