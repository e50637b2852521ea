"""Show and verify the audit log of a folder, served or not.

    nnUNetv2_fed_admin --folder F log [--since 2d] [--json]      who did what, when
    nnUNetv2_fed_admin --folder F verify-log [--head HASH]       is the log unbroken, with HASH in it?

The database is opened for reading only: looking at a log changes nothing, not even in a folder that was restored.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from nnunetv2.federated.coordinator.storage import audit_log
from nnunetv2.federated.coordinator.storage.audit_log import Row
from nnunetv2.federated.coordinator.storage.read_only import open_read_only, read_log
from nnunetv2.federated.errors import FederationError
from nnunetv2.utilities.plain_text import printable, printable_json, show

SECONDS_OF_UNIT = {"m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 7 * 86_400.0}
SHORTEST_HEAD = 12
"""Digits of a hash that have to be typed at least: with fewer, another line may have them too."""


def parse_since(text: str, now: float) -> float:
    """Parse "2026-11-23", "2026-11-23 14:05" or "36h" (m, h, d, w) to seconds since 1970.

    Raises:
        FederationError: It is none of these.
    """
    if match := re.fullmatch(r"([0-9]{1,6})([mhdw])", text):
        return now - int(match[1]) * SECONDS_OF_UNIT[match[2]]
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise FederationError(
            f"--since {text!r} is no time: expected 2026-11-23, '2026-11-23 14:05', or how long ago, "
            "such as 30m, 36h, 7d, 2w"
        ) from None


# -------------------------------------------------------------------------------------------------------- commands
def show_log(folder: Path, arguments: argparse.Namespace) -> None:
    """Print the audit log, one line per event."""
    since = parse_since(arguments.since, time.time()) if arguments.since else 0.0
    with open_read_only(folder) as connection:
        for line in read_log(connection):
            if line[1] >= since:
                show(_as_json(line) if arguments.json else _as_text(line))


def verify_log(folder: Path, arguments: argparse.Namespace) -> None:
    """Check the chain of the audit log, and print its last hash.

    Raises:
        FederationError: A line was changed, removed, inserted or moved, or the head that was noted is not there.
    """
    wanted = None if not arguments.head else parse_head(arguments.head)
    last, noted = None, None

    def seen() -> Iterator[Row]:
        """Yield the lines, one at a time: a log may be larger than the memory."""
        nonlocal last, noted
        for last in read_log(connection):
            if wanted is not None and noted is None and last[-1].startswith(wanted):
                noted = last[0]
            yield last

    with open_read_only(folder) as connection:
        broken = audit_log.first_break(seen())
    if broken is not None:
        raise FederationError(
            f"the audit log of {folder} is broken at line {broken.number}: {broken.reason}. What "
            "comes before that line holds; compare with a backup"
        )
    count = last[0] if last is not None else 0
    show(f"The chain of {count} lines holds.")
    if wanted is not None:
        if noted is None:
            raise FederationError(
                "no line of the audit log has the head that was noted: the log was cut off before "
                "it, or was written anew from some earlier line on"
            )
        show(
            f"The head that was noted is that of line {noted}: nothing up to there was changed or cut off, "
            f"{count - noted} line(s) came after it."
        )
    if last is not None:
        show(f"Head of line {count}, {_as_time(last[1])}, to be noted elsewhere:", f"  {last[-1]}")


def parse_head(head: str) -> str:
    """Return a hash that was noted, whole or its first digits.

    Raises:
        FederationError: It is none.
    """
    wanted = head.strip().lower()
    if not re.fullmatch(f"[0-9a-f]{{{SHORTEST_HEAD},64}}", wanted):
        raise FederationError(f"--head {head!r} is no hash: expected {SHORTEST_HEAD} to 64 hexadecimal digits")
    return wanted


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `log` and `verify-log` to the operator's command."""
    log = commands.add_parser(
        "log", help="show the audit log of a folder", description="Show the audit log of a folder: who did what, when."
    )
    log.add_argument(
        "--since",
        metavar="TIME",
        help="only from then on: 2026-11-23, '2026-11-23 14:05', or how long ago, such as 30m, 36h, 7d",
    )
    log.add_argument("--json", action="store_true", help="one JSON object per line, hashes included")
    log.set_defaults(function_of_folder=show_log)
    verify = commands.add_parser(
        "verify-log",
        help="check that nothing in the audit log was changed or removed",
        description="Check that no line of the audit log was changed, removed, inserted or "
        "moved, and print the hash of its last line, to be noted elsewhere.",
    )
    verify.add_argument(
        "--head",
        metavar="HASH",
        help="a hash that was noted earlier, or its first digits: finds out whether the end of the log was cut off",
    )
    verify.set_defaults(function_of_folder=verify_log)


# ------------------------------------------------------------------------------------------------------- text of a line
def describe(kind: str, key: str | None, detail: Mapping[str, Any]) -> str:
    """Describe a line of the log in a few printable words."""
    return printable(_describe(kind, key, detail))


def _describe(kind: str, key: str | None, detail: Mapping[str, Any]) -> str:
    if kind in ("invitation", "revocation"):
        return f"{detail.get('member')}" + (f" as {detail['role']}" if "role" in detail else "")
    if kind == "admission":
        return f"{', '.join(detail['sites'])} through NVFlare"
    if kind == "failure":
        number = detail.get("round")
        return f"{detail.get('run')}{'' if number is None else f' round {number}'}: {detail.get('reason')}"
    if kind == "closing":
        missing = f", without {', '.join(detail['missing'])}" if detail.get("missing") else ""
        return f"{key} from {', '.join(detail.get('contributions', {}))}{missing}"
    about = {
        "contribution": "{key}, {bytes} bytes",
        "model": "{key}: {outcome}",
        "control": "{action} {key}",
        "late": "{key}, {seconds:.1f} s late",
        "refusal": "{key}: {message}",
        "fetch": "the model of {key}",
        "rehearsal": "{bytes} bytes without content, not kept",
    }.get(kind)
    if about is not None:
        return about.format(key=key, **detail)
    return " ".join(part for part in (key, printable_json(dict(detail)) if detail else "") if part)


def _as_text(line: Row) -> str:
    number, moment, kind, who, key, detail, _ = line
    return f"{number:6d}  {_as_time(moment)}  {kind:12}  {who or '-':12}  {describe(kind, key, json.loads(detail))}"


def _as_json(line: Row) -> str:
    names = ("number", "time", "kind", "site", "key", "detail", "hash")
    return printable_json({**dict(zip(names, line)), "detail": json.loads(line[5])})


def _as_time(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
