"""Write the table of exchanges in wire-protocol.md from the steps of the protocol.

    python documentation/make_exchanges.py

A test compares the page with the steps.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from nnunetv2.federated.exchanges.steps import STEPS, AnyStep
from nnunetv2.federated.exchanges.steps.base import kind_of

TARGET = Path(__file__).with_name("wire-protocol.md")
BEGIN, END = "<!-- begin: make_exchanges.py -->\n", "<!-- end: make_exchanges.py -->\n"
SHORT = {"number": "n", "again": "n"}
"""Part of a key -> its name in the table, where that is another one."""


def table() -> str:
    """Return the table, one row per step."""
    return "".join(f"{line}\n" for line in _lines())


def with_table(page: str) -> str:
    """Return the page with the table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


def _lines() -> Iterator[str]:
    yield "| key | contribution (kind; tensors) | result (kind; tensors) | closed with |"
    yield "|---|---|---|---|"
    for step in STEPS:
        key = re.sub(r"\{(\w+)\}", lambda part: f"<{SHORT.get(part[1], part[1])}>", step.key.pattern)
        results = ", or ".join(f"`{kind_of(one)}`" for one in step.results)
        yield (
            f"| `{key}` | `{kind_of(step.contribution)}`{step.contribution_note} | {results}{step.result_note} "
            f"| {_closed_with(step)} |"
        )


def _closed_with(step: AnyStep) -> str:
    if step.closing_note:
        return step.closing_note
    if "{site}" in step.key.pattern:
        return "that of the site"
    sites = "all, or the quorum at the deadline" if step.policy.by_quorum else "all"
    return f"{sites}; at least `min_sites`" if step.policy.pooled else sites


if __name__ == "__main__":
    TARGET.write_text(with_table(TARGET.read_text(encoding="utf-8")), encoding="utf-8")
